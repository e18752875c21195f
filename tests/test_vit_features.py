"""What people do with a FusedViT besides calling it: compiling, copying, methods, pictures."""

import pytest
import torch
from model_checks import (
    COPIES,
    check_checkpointing,
    check_copy,
    check_dynamic_batch,
    check_export,
    check_frozen,
    check_functional_gradients,
    check_intermediates,
    check_one_graph,
)
from torch import nn
from vit_pairs import images, logits_and_grads, needs_timm, pair, same

from vitkernels import FusedViT
from vitkernels.models import attention_rollout
from vitkernels.nn import LayerScale

pytestmark = pytest.mark.skipif(**needs_timm)


# --- checkpointing, compiling, copying ------------------------------------------------------------


@pytest.mark.parametrize("name", ["registers_layer_scale", "clip"])
def test_gradient_checkpointing_changes_nothing(name):
    _, ours = pair(name, drop_path_rate=0.4, attn_drop_rate=0.2, proj_drop_rate=0.1)
    check_checkpointing(ours, images(name, batch=4))


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing", "autocast"])
@pytest.mark.parametrize("name", ["registers_layer_scale", "qk_norm"])
def test_compiles_as_one_graph(name, mode):
    _, ours = pair(name, depth=2, drop_path_rate=0.3, attn_drop_rate=0.1)
    check_one_graph(ours, images(name, batch=3), mode)


def test_dynamic_batch_compiles_once():
    check_dynamic_batch(pair()[1], (images(batch=batch) for batch in (2, 3, 5, 7)))


def test_every_size_and_number_dynamic():
    _, ours = pair(depth=1)
    torch._dynamo.reset()
    x = images()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    same(logits_and_grads(compiled, x), logits_and_grads(compiled, x), 0.0)
    same({"y": compiled(x)}, {"y": ours(x)})


def test_torch_export():
    check_export(pair("registers_layer_scale")[1], images())


@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    name = "registers_layer_scale"
    check_copy(pair(name)[1], images(), how, lambda: pair(name)[1])


def test_ours_loads_into_timm():
    theirs, ours = pair("registers_layer_scale")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    theirs.load_state_dict(ours.to_timm_state_dict(), strict=True)
    x = images()
    same({"y": ours(x)}, {"y": theirs(x)})


def test_functional_gradients():
    check_functional_gradients(pair()[1], images())


def test_frozen_parameters_get_no_gradient():
    check_frozen(pair("registers_layer_scale")[1], images(), ("head", "ls2"))


# --- timm's methods -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, -1], "return_prefix_tokens": True},
        {"indices": [1], "stop_early": True, "output_fmt": "NLC", "intermediates_only": True},
        {"indices": 1, "output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ],
)
@pytest.mark.parametrize("name", ["registers_layer_scale", "dynamic_pad", "siglip"])
def test_forward_intermediates(name, options):
    check_intermediates(*pair(name), images(name), options)


def test_intermediate_layers_and_pruning():
    theirs, ours = pair()
    x = images()
    for a, b in zip(
        ours.get_intermediate_layers(x, 2, reshape=True, norm=True),
        theirs.get_intermediate_layers(x, 2, reshape=True, norm=True),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)
    assert ours.prune_intermediate_layers([0, 1]) == theirs.prune_intermediate_layers([0, 1])
    assert len(ours.blocks) == 2
    same({"y": ours(x)}, {"y": theirs(x)})


@pytest.mark.parametrize("name", ["registers_layer_scale", "no_embed_class", "gray_not_square"])
@pytest.mark.parametrize("size", [{"img_size": (48, 35)}, {"patch_size": (4, 7)}])
def test_another_input_size(name, size):
    if "patch_size" in size and name != "gray_not_square":
        size = {"patch_size": 16}
    elif name != "gray_not_square":
        size = {"img_size": (48, 24)}
    theirs, ours = pair(name)
    theirs.set_input_size(**size)
    ours.set_input_size(**size)
    x = torch.randn(2, theirs.patch_embed.proj.in_channels, *ours.patch_embed.img_size)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


def test_classifier_and_optimizer_methods():
    theirs, ours = pair("registers_layer_scale")
    x = images()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.get_classifier() is ours.head
    assert ours.feature_info == theirs.feature_info
    pooled = ours.forward_head(ours.forward_features(x), pre_logits=True)
    for model in (theirs, ours):
        model.reset_classifier(0, "avg")
    same({"y": ours(x)}, {"y": theirs(x)})
    assert pooled.shape == ours(x).shape and isinstance(ours.head, nn.Identity)
    ours.reset_classifier(7)
    assert ours(x).shape == (2, 7) and ours.head.training == ours.training


def test_timm_optimizer_groups():
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    theirs, ours = pair()
    for make in (param_groups_weight_decay, param_groups_layer_decay):
        expected, got = make(theirs, 0.05), make(ours, 0.05)
        assert [len(g["params"]) for g in got] == [len(g["params"]) for g in expected]


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["registers_layer_scale", "qk_norm"])
def test_attention_maps_reproduce_the_attention(name):
    _, ours = pair(name)
    x, passed = images(name), []
    for block in ours.blocks:
        block.attn.register_forward_hook(lambda m, args, out: passed.append((args[0], out)))
    ours(x)
    maps = ours.attention_maps(x)
    for block, weights, (inp, out) in zip(ours.blocks, maps, passed[:3], strict=True):
        N = inp.shape[1]
        assert weights.shape == (2, 3, N, N)
        v = block.attn.qkv(inp).unflatten(2, (3, 3, 16))[:, :, 2].transpose(1, 2)
        again = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(again, out, atol=1e-5)
    rows = ours.attention_maps(x, rows=0)
    assert all(
        torch.allclose(r[:, :, 0], m[:, :, 0], atol=1e-6) for r, m in zip(rows, maps, strict=True)
    )
    assert not any(block.attn._forward_pre_hooks for block in ours.blocks)


def test_attention_rollout():
    _, ours = pair()
    maps = ours.attention_maps(images())
    rollout = attention_rollout(maps)
    assert torch.allclose(rollout.sum(-1), torch.ones(2, 17), atol=1e-5)
    expected = torch.eye(17).expand(2, -1, -1)
    for m in maps:
        expected = (m.mean(1) + torch.eye(17)) / 2 @ expected
    assert torch.allclose(rollout, expected, atol=1e-6)
    with pytest.raises(ValueError, match="attention_rollout: maps must be full"):
        attention_rollout(ours.attention_maps(images(), rows=0))


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"global_pool": "map"}, "attention pooling.*not supported"),
        ({"global_pool": "median"}, "global_pool must be one of"),
        ({"global_pool": "token", "class_token": False}, "needs class_token=True"),
        ({"pos_embed": "rope"}, "pos_embed must be"),
        ({"weight_init": "xavier"}, "weight_init must be"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads"),
        ({"patch_drop_rate": 1.0}, "prob must be in"),
        ({"norm_layer": "batchnorm"}, "norm_layer must be one of LayerNorm"),
        ({"norm_layer": nn.BatchNorm1d}, "norm_layer must be one of LayerNorm"),
        ({"act_layer": nn.ReLU}, "act_layer must be one of GELU"),
        ({"block_fn": nn.TransformerEncoderLayer}, "block_fn must be one of Block"),
        ({"mlp_layer": LayerScale}, "mlp_layer must be one of Mlp"),
        ({"attn_layer": "diff"}, "attn_layer must be one of Attention"),
        ({"embed_layer": nn.Conv2d}, "embed_layer must be one of PatchEmbed"),
    ],
)
def test_bad_constructor_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        FusedViT(**{"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, **arguments})
    assert "\n" not in str(error.value)


def test_bad_calls():
    _, ours = pair()
    with pytest.raises(AssertionError, match="image is 40x32, the model takes"):
        ours(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="block indices"):
        ours.forward_intermediates(images(), indices=4)
    with pytest.raises(ValueError, match="output_fmt"):
        ours.forward_intermediates(images(), output_fmt="NHWC")
    with pytest.raises(ValueError, match="needs class_token"):
        pair("average_pool")[1].reset_classifier(3, "token")
    with pytest.raises(ValueError, match="vit_SIZE_patchP_PIXELS"):
        FusedViT.named("resnet50")


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 0},
        {"img_size": 0},
        {"img_size": (32, -1)},
        {"embed_dim": 0},
        {"num_heads": 0},
        {"depth": 0},
        {"drop_path_rate": 2.0},
        {"drop_path_rate": -0.1},
    ],
    ids=str,
)
def test_impossible_sizes_get_one_sentence(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be"):
        FusedViT(**{"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, **settings})


@pytest.mark.parametrize("change", ["activation", "num_heads"])
def test_blocks_that_differ_are_refused(change):
    source, _ = pair("class_token")
    block = source.blocks[1]
    if change == "num_heads":
        block.attn.num_heads, block.attn.head_dim = 6, 32
    else:
        block.mlp.act = torch.nn.GELU("tanh")
    with pytest.raises(ValueError, match="blocks differ"):
        FusedViT.from_timm(source)


def test_the_scale_of_each_attention_is_copied():
    source, _ = pair("class_token")
    source.blocks[1].attn.scale = 0.5
    ours = FusedViT.from_timm(source)
    assert [b.attn.scale for b in ours.blocks] == [b.attn.scale for b in source.blocks]
