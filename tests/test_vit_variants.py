"""Methods of FusedViT on every variant: attention maps, classifiers, sizes, inner features."""

import pytest
import torch
from torch import nn
from vit_pairs import CONFIGS, images, logits_and_grads, needs_timm, pair, same

from vitkernels.models import attention_maps, attention_rollout

pytestmark = pytest.mark.skipif(**needs_timm)


def their_maps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """softmax(q k^T scale) of each of timm's blocks, from what enters its attention."""
    maps = []

    def keep(attn, inputs):
        B, N, _ = inputs[0].shape
        q, k, _ = attn.qkv(inputs[0]).view(B, N, 3, attn.num_heads, -1).unbind(2)
        q, k = attn.q_norm(q).transpose(1, 2), attn.k_norm(k).transpose(1, 2)
        maps.append((q @ k.transpose(-2, -1) * attn.scale).softmax(-1))

    for block in model.blocks:
        block.attn.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(x)
    return maps


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_maps_and_rollout(name, checkpointing):
    theirs, ours = pair(name)
    ours.set_grad_checkpointing(checkpointing)
    x = images(name)
    expected, maps = their_maps(theirs, x), ours.attention_maps(x)
    assert len(maps) == len(ours.blocks) == len(expected)
    for got, truth in zip(maps, expected, strict=True):
        assert got.shape == truth.shape and got.dtype == torch.float32
        assert (got - truth).abs().max() < 1e-5
    grid = ours.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
    N = ours.num_prefix_tokens + grid[0] * grid[1]
    rollout = attention_rollout(maps)
    assert rollout.shape == (2, N, N)
    truth = torch.eye(N).expand(2, N, N)
    for m in expected:
        truth = torch.bmm(0.5 * (m.mean(1) + torch.eye(N)), truth)
    assert torch.allclose(rollout, truth, atol=1e-5)
    prefix = list(range(ours.num_prefix_tokens))
    if prefix:  # what the class and register tokens look at
        for got, truth in zip(attention_maps(ours, x, rows=prefix), expected, strict=True):
            assert torch.allclose(got, truth[:, :, prefix], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pool", [None, "", "avg", "avgmax", "max", "token"])
def test_another_classifier(name, pool):
    theirs, ours = pair(name)
    if pool == "token" and not ours.has_class_token:
        return
    for model in (theirs, ours):
        model.reset_classifier(4, pool)
    ours.head.load_state_dict(theirs.head.state_dict())
    x = images(name)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)
    assert ours.num_classes == theirs.num_classes and ours.global_pool == theirs.global_pool


@pytest.mark.parametrize("name", ["class_token", "no_embed_class", "average_pool", "clip"])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (64, 16), (40, 56), (104, 24)])
@pytest.mark.parametrize("pad", [False, True])
def test_dynamic_sizes(name, size, pad):
    options = {"dynamic_img_size": True, "dynamic_img_pad": pad, "reg_tokens": 2}
    theirs, ours = pair(name, **options)
    x = torch.randn(2, 3, size[0] - 3 * pad, size[1] - 5 * pad)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("dynamic_size", "dynamic_pad")])
@pytest.mark.parametrize("size", [{"img_size": 3}, {"img_size": (2, 5)}, {"patch_size": 2}])
def test_input_sizes(name, size):
    theirs, ours = pair(name)
    ph, pw = theirs.patch_embed.patch_size
    if "img_size" in size:
        n = size["img_size"] if isinstance(size["img_size"], tuple) else (size["img_size"],) * 2
        size = {"img_size": (n[0] * ph, n[1] * pw)}
    else:
        size = {"patch_size": (2 * ph, pw), "img_size": (4 * ph, 3 * pw)}
    for model in (theirs, ours):
        model.set_input_size(**size)
    x = torch.randn(2, theirs.patch_embed.proj.in_channels, *size["img_size"])
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 5e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("norm", [False, True])
def test_inner_features_of_every_variant(name, norm):
    theirs, ours = pair(name)
    x = images(name)
    options = {"indices": [0, -1], "norm": norm, "return_prefix_tokens": True}
    (last, expected), (mine, got) = (
        model.forward_intermediates(x, **options) for model in (theirs, ours)
    )
    same({"last": mine}, {"last": last})
    expected, got = (torch.utils._pytree.tree_leaves(features) for features in (expected, got))
    assert [t.shape for t in got] == [t.shape for t in expected]
    for a, b in zip(got, expected, strict=True):
        same({"y": a}, {"y": b})


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_on_every_variant(name):
    theirs, ours = pair(name, drop_path_rate=0.3)
    x, results = images(name, batch=4), []
    for model in (theirs, ours):
        model.train().set_grad_checkpointing()
        torch.manual_seed(9)
        results.append(logits_and_grads(model, x))
    same(results[1], results[0], 5e-5)
