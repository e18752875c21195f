"""Blocks chained by Pending, and what hooks on any part of a FusedViT see: what timm's would."""

import pytest
import torch
from torch import nn
from vit_pairs import images, logits_and_grads, needs_timm, pair, same

from vitkernels.nn import Block, LayerNorm, Linear, Pending

pytestmark = pytest.mark.skipif(**needs_timm)


def spy(monkeypatch) -> list[type]:
    """The types that enter the blocks."""
    seen = []
    forward = Block.forward

    def watched(self, x, *args, **kwargs):
        seen.append(type(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", watched)
    return seen


@pytest.mark.parametrize("name", ["registers_layer_scale", "average_pool", "no_final_norm"])
def test_chained_blocks_equal_separate_ones(name, monkeypatch):
    _, ours = pair(name, drop_path_rate=0.3)
    ours.train()
    x, seen = images(name, batch=4), spy(monkeypatch)
    torch.manual_seed(2)
    chained = logits_and_grads(ours, x)
    assert seen == [Pending] * 3
    ours.blocks[0].register_forward_hook(lambda *_: None)
    torch.manual_seed(2)
    separate = logits_and_grads(ours, x)
    assert seen[3:] == [torch.Tensor] * 3
    same(chained, separate)


def test_pending_in_pending_out():
    block = Block(48, 3, init_values=0.5).eval()
    x = torch.randn(2, 5, 48)
    out = block(Pending(x))
    assert isinstance(out, Pending) and out.gamma is not block.ls2.gamma
    assert torch.allclose(out.stream + out.gamma * out.branch, block(x), atol=1e-6)
    assert torch.utils._pytree.tree_map(lambda t: t, out) is not None


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
    "blocks", "blocks.0", "blocks.2", "blocks.1.norm1", "blocks.1.attn", "blocks.1.ls1",
    "blocks.1.drop_path1", "blocks.1.norm2", "blocks.1.mlp", "blocks.1.ls2", "blocks.2.drop_path2",
    "norm", "head", "patch_embed", "patch_embed.proj", "patch_embed.norm", "pos_drop",
    "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.act",
    "blocks.1.mlp.fc2", "blocks.2.mlp.drop1",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_the_tensors_that_timm_passes(kind, place):
    theirs, ours = pair("registers_layer_scale", drop_path_rate=0.5)
    x = images()
    logs = []
    for model in (theirs, ours):
        torch.manual_seed(4)
        log = []
        HOOKS[kind](model.get_submodule(place), log)
        logits_and_grads(model.train(), x)
        logs.append(log)
    expected, got = logs
    assert len(got) == len(expected) == 1
    assert all(isinstance(t, torch.Tensor) for t in got[0])
    for i, (a, b) in enumerate(zip(got[0], expected[0], strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        same({f"{i}": a.detach()}, {f"{i}": b.detach()}, 2e-5)


def test_hooks_may_change_what_passes():
    theirs, ours = pair()
    x = images()
    for model in (theirs, ours):
        model.blocks[1].register_forward_hook(lambda m, args, out: out * 0.5)
        model.blocks[2].norm2.register_forward_hook(lambda m, args, out: out + 1)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


@pytest.mark.parametrize("place", ["blocks.1.attn.q_norm", "blocks.2.attn.k_norm"])
def test_hooks_may_change_queries_and_keys_that_have_no_norm(place):
    theirs, ours = pair()
    for model in (theirs, ours):
        model.get_submodule(place).register_forward_hook(lambda m, args, out: out * 3)
    x = images()
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


def test_global_hooks_see_tensors():
    _, ours = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append((type(m), type(out)))
    )
    try:
        ours(images())
    finally:
        handle.remove()
    assert all(out is torch.Tensor for _, out in seen)
    counts = {LayerNorm: 7, Linear: 13, nn.GELU: 3, nn.Conv2d: 1}
    assert {kind: sum(m is kind for m, _ in seen) for kind in counts} == counts


def test_replaced_modules_are_respected():
    theirs, ours = pair("registers_layer_scale")
    x = images()
    for model in (theirs, ours):
        model.blocks[0].norm2 = nn.Identity()
        model.blocks[1].ls2 = nn.Identity()
        model.norm = nn.LayerNorm(48)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


def test_subclasses_are_called_as_timm_calls_them():
    theirs, ours = pair()
    x = images()

    class Doubled(LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    for block in ours.blocks:
        norm = Doubled(48)
        norm.load_state_dict(block.norm2.state_dict())
        block.norm2 = norm
    for block in theirs.blocks:
        block.norm2.register_forward_hook(lambda m, args, out: 2 * out)
    same({"y": ours(x)}, {"y": theirs(x)})
