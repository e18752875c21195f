"""Blocks chained by Pending, and what hooks on any part of a FusedSwin see: what timm's would.

Ours see maps (B, H, W, C) where timm's see windows (attention) or tokens (MLP): the same rows.
"""

import pytest
import torch
from swin_pairs import images, logits_and_grads, needs_timm, pair, same
from torch import nn

from vitkernels.nn import LayerNorm, Linear, Pending, SwinBlock
from vitkernels.ops.window_attention.reference import to_windows

pytestmark = pytest.mark.skipif(**needs_timm)


def spy(monkeypatch) -> list[type]:
    """The types that enter the blocks."""
    seen = []
    forward = SwinBlock.forward

    def watched(self, x):
        seen.append(type(x))
        return forward(self, x)

    monkeypatch.setattr(SwinBlock, "forward", watched)
    return seen


@pytest.mark.parametrize("name", ["v1", "v1_odd_maps"])
def test_chained_blocks_equal_separate_ones(name, monkeypatch):
    _, ours = pair(name, drop_path_rate=0.3)
    ours.train()
    x, seen = images(name, batch=4), spy(monkeypatch)
    torch.manual_seed(2)
    chained = logits_and_grads(ours, x)
    assert seen == [Pending] * 6
    for stage in ours.layers:
        stage.blocks[0].register_forward_hook(lambda *_: None)
    torch.manual_seed(2)
    separate = logits_and_grads(ours, x)
    assert seen[6:] == [torch.Tensor] * 6
    same(chained, separate)


def test_pending_in_pending_out():
    block = SwinBlock(32, (8, 8), 1, window_size=4, shift_size=2).eval()
    x = torch.randn(2, 8, 8, 32)
    out = block(Pending(x))
    assert isinstance(out, Pending)
    assert torch.allclose(out.stream + out.branch, block(x), atol=1e-6)


HOOKS = {
    "forward": lambda module, log: module.register_forward_hook(
        lambda m, args, out: log.append((args[0], out))
    ),
    "pre": lambda module, log: module.register_forward_pre_hook(
        lambda m, args: log.append((args[0],))
    ),
    "backward": lambda module, log: module.register_full_backward_hook(
        lambda m, grad_in, grad_out: log.append((*grad_in, *grad_out))
    ),
    "backward_pre": lambda module, log: module.register_full_backward_pre_hook(
        lambda m, grad_out: log.append(grad_out)
    ),
}
PLACES = [
    "layers", "layers.0", "layers.1", "layers.2", "layers.1.downsample", "layers.1.downsample.norm",
    "layers.1.downsample.reduction", "layers.1.blocks.1", "layers.1.blocks.1.norm1",
    "layers.1.blocks.1.attn", "layers.1.blocks.0.attn", "layers.1.blocks.1.drop_path1",
    "layers.1.blocks.1.norm2", "layers.1.blocks.1.mlp", "layers.1.blocks.1.drop_path2", "norm",
    "head", "head.global_pool", "head.drop", "head.fc", "patch_embed", "patch_embed.proj",
    "patch_embed.norm", "layers.1.blocks.1.mlp.fc1", "layers.1.blocks.1.mlp.act",
    "layers.1.blocks.1.mlp.fc2", "layers.1.blocks.1.attn.proj",
]  # fmt: skip


def as_timm(place: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Our map as timm's windows or tokens."""
    if tensor.shape == like.shape:
        return tensor
    if ".attn" in place:
        shift = (2, 2) if place.startswith("layers.1.blocks.1") else (0, 0)
        tensor = to_windows(tensor, (4, 4), shift)
    return tensor.reshape(like.shape)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_hooks_see_the_tensors_that_timm_passes(name, kind):
    theirs, ours = pair(name, drop_path_rate=0.5)
    x = images(name)
    for place in PLACES:
        logs = []
        for model in (theirs, ours):
            torch.manual_seed(4)
            log = []
            handle = HOOKS[kind](model.get_submodule(place), log)
            logits_and_grads(model.train(), x)
            handle.remove()
            logs.append(log)
        expected, got = logs
        assert len(got) == len(expected) == 1, place
        assert all(isinstance(t, torch.Tensor) for t in got[0]), place
        for a, b in zip(got[0], expected[0], strict=True):
            a = as_timm(place, a.detach(), b)
            assert a.dtype == b.dtype, place
            same({place: a}, {place: b.detach()}, 2e-5)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_hooks_may_change_what_passes(name):
    theirs, ours = pair(name)
    x = images(name)
    for model in (theirs, ours):
        model.layers[1].blocks[1].register_forward_hook(lambda m, args, out: out * 0.5)
        model.layers[2].blocks[0].norm2.register_forward_hook(lambda m, args, out: out + 1)
        model.layers[1].downsample.norm.register_forward_hook(lambda m, args, out: out * 2)
        model.layers[0].register_forward_hook(lambda m, args, out: out - 1)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_global_hooks_see_tensors(name):
    _, ours = pair(name)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append((type(m), type(out)))
    )
    try:
        ours(images(name))
    finally:
        handle.remove()
    assert all(out is torch.Tensor for _, out in seen)
    counts = {LayerNorm: 16, nn.GELU: 6, nn.Conv2d: 1}
    counts[Linear] = {"v1": 4 * 6 + 2 + 1, "v2": 5 * 6 + 2 + 1}[name]  # v2: its bias stands apart
    assert {kind: sum(m is kind for m, _ in seen) for kind in counts} == counts


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_replaced_modules_are_respected(name):
    theirs, ours = pair(name)
    x = images(name)
    for model in (theirs, ours):
        model.layers[0].blocks[0].norm2 = nn.Identity()
        model.layers[1].blocks[1].drop_path2 = nn.Identity()
        model.layers[1].downsample.norm = nn.LayerNorm(128 if name == "v1" else 64)
        model.norm = nn.LayerNorm(128)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


def test_subclasses_are_called_as_timm_calls_them():
    theirs, ours = pair("v1")
    x = images()

    class Doubled(LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    for mine, their in zip(ours.layers, theirs.layers, strict=True):
        for a, b in zip(mine.blocks, their.blocks, strict=True):
            norm = Doubled(a.dim, eps=1e-5)
            norm.load_state_dict(a.norm2.state_dict())
            a.norm2 = norm
            b.norm2.register_forward_hook(lambda m, args, out: 2 * out)
    same({"y": ours(x)}, {"y": theirs(x)})
