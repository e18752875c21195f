"""What people do with a FusedHybridViT besides calling it, and other CNNs in front of it."""

import copy

import pytest
import torch
from hybrid_pairs import TINY, images, pair, timm_hybrid
from model_checks import (
    COPIES,
    check_checkpointing,
    check_copy,
    check_intermediates,
    check_one_graph,
)
from torch import nn
from vit_pairs import ROUNDING, logits_and_grads, needs_timm, randomised, same

from vitkernels import FusedHybridViT, use_backend
from vitkernels.nn import HybridEmbed, ResNetV2
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)


# --- checkpointing, compiling, copying ------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing():
    _, ours = pair("r8", drop_path_rate=0.4, attn_drop_rate=0.2, proj_drop_rate=0.1)
    check_checkpointing(ours, images("r8", batch=4))


@pytest.mark.parametrize(
    "name, mode",
    [("r", "train"), ("r", "autocast"), ("one_stage", "eval"), ("one_stage", "checkpointing")],
)
def test_compiles_as_one_graph(name, mode):
    _, ours = pair(name, drop_path_rate=0.3, attn_drop_rate=0.1)
    check_one_graph(ours, images(name, batch=3), mode, 2 * ROUNDING)


def test_compiled_inference_and_export():
    _, ours = pair("one_stage")
    x = images("one_stage")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = ours(x)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        same({"y": compiled(x)}, {"y": expected})
    program = torch.export.export(ours, (x,))
    same({"y": program.module()(x)}, {"y": expected})


@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    check_copy(pair("r8")[1], images("r8"), how, lambda: pair("r8")[1])


def test_a_bf16_copy_keeps_the_statistics_of_images():
    half = pair("r8")[1].to(torch.bfloat16)
    assert half(images("r8")).dtype == torch.bfloat16  # float images are cast
    assert half.patch_embed.mean.dtype == torch.float32


def test_frozen_and_embedded_parameters_get_what_they_should():
    _, ours = pair("r8")
    ours.patch_embed.backbone.requires_grad_(False)
    ours(images("r8")).sum().backward()
    assert all(p.grad is None for p in ours.patch_embed.backbone.parameters())
    assert ours.patch_embed.proj.weight.grad is not None and ours.pos_embed.grad is not None


# --- sizes and inner features ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r", "r8", "gray_registers", "dynamic_size"])
@pytest.mark.parametrize("size", [{"img_size": (96, 64)}, {"patch_size": 2}])
def test_another_input_size(name, size):
    theirs, ours = pair(name)
    for model in (theirs, ours):
        model.set_input_size(**size)
    embed, expected = ours.patch_embed, theirs.patch_embed
    for attribute in ("img_size", "patch_size", "grid_size", "num_patches", "feature_size"):
        assert getattr(embed, attribute) == getattr(expected, attribute), attribute
    x = torch.randn(2, embed.in_chans, *embed.img_size)
    same(logits_and_grads(ours, x), logits_and_grads(theirs, x), 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 1, "norm": True, "return_prefix_tokens": True},
        {"indices": [0], "stop_early": True, "output_fmt": "NLC", "intermediates_only": True},
        {"output_dict": True},
    ],
)
@pytest.mark.parametrize("name", ["r", "dynamic_size", "dynamic_pad"])
def test_forward_intermediates(name, options):
    check_intermediates(*pair(name), images(name), options, 5e-6)


def test_a_size_that_halving_rounds_up():
    """timm's forward takes it, its forward_intermediates does not."""
    theirs, ours = pair("dynamic_size")
    x = torch.randn(1, 3, 41, 27)
    same({"y": ours(x)}, {"y": theirs(x)})
    (inner, *_) = ours.forward_intermediates(x, indices=1, intermediates_only=True)
    assert inner.shape[-2:] == (6, 4) == ours.patch_embed.dynamic_feat_size((41, 27))


def test_methods_of_timm():
    theirs, ours = pair("r8")
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.feature_info == theirs.feature_info
    assert ours.patch_embed.feat_ratio() == theirs.patch_embed.feat_ratio() == 16
    for model in (theirs, ours):
        model.reset_classifier(0, "avg")
    x = images("r8")
    same({"y": ours(x)}, {"y": theirs(x)})
    ours.reset_classifier(7)
    assert ours(x).shape == (2, 7)
    assert [m.shape for m in ours.attention_maps(x, rows=0)] == [(2, 3, 1, 17)] * 2


def test_attention_maps_and_hooks_on_the_embedding():
    _, ours = pair("r8")
    x, seen = images("r8"), []
    expected = ours(x)
    ours.patch_embed.proj.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    same({"y": ours(x)}, {"y": expected})
    ours.patch_embed.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    same({"y": ours(x)}, {"y": expected})
    assert seen == [(2, 48, 4, 4), (2, 48, 4, 4), (2, 16, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_images_are_normalised_inside(dtype):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = randomised(FusedHybridViT((1,), 32, mean=mean, std=std, **TINY, dtype=dtype).eval())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    channels = torch.tensor([mean, std])[:, None, :, None, None]
    normalised = (pixels / 255 - channels[0]) / channels[1]
    same({"y": ours(pixels)}, {"y": ours(normalised)}, 1e-5)
    ours.patch_embed.set_normalization(0.0, 1.0)
    same({"y": ours(pixels)}, {"y": ours(pixels / 255)}, 1e-5)


# --- any CNN in front -----------------------------------------------------------------------------


class Last(nn.Module):
    """A CNN that returns its inner maps as this container."""

    def __init__(self, kind, **more):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Conv2d(8, 32, 3, 2, 1)
        self.kind, self.calls = kind, []
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        self.calls.append((self.training, self.first[1].training, torch.is_grad_enabled()))
        maps = [self.first(x)]
        maps.append(self.second(maps[0]))
        if self.kind == "dict":
            return {"low": maps[0], "high": maps[1]}
        return maps[1] if self.kind == "map" else {"list": list, "tuple": tuple}[self.kind](maps)


@pytest.mark.parametrize("kind", ["map", "list", "tuple", "dict"])
def test_any_module_that_returns_maps(kind):
    backbone = randomised(Last(kind)).train()
    backbone.first[1].eval()  # a frozen BatchNorm
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    ours = FusedHybridViT(backbone, 64, patch_size=2, **TINY)
    assert backbone.calls == [(False, False, False)], "measured once, evaluating"
    assert backbone.training and not backbone.first[1].training
    assert ours.patch_embed.backbone is backbone
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    assert ours.patch_embed.feature_size == (8, 8) and ours.patch_embed.grid_size == (4, 4)
    x = torch.randn(2, 3, 64, 64)
    grads = logits_and_grads(ours.eval(), x)
    assert grads["patch_embed.backbone.second.weight"].abs().sum() > 0
    mapped = backbone.second(backbone.first(x))
    tokens = ours.patch_embed.proj(mapped).flatten(2).transpose(1, 2)
    tokens = torch.cat([ours.cls_token.expand(2, -1, -1), tokens], 1) + ours.pos_embed
    same({"y": ours.forward_head(ours.norm(ours.blocks(tokens)))}, {"y": grads["logits"]}, 1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_cnns(name):
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    cnn = getattr(torchvision.models, name)()
    if name == "resnet18":
        cnn = create_feature_extractor(cnn, {"layer2": "c3", "layer3": "c4"})
    else:
        cnn = cnn.features
    ours = randomised(FusedHybridViT(cnn, 64, **TINY).eval())
    x = torch.randn(2, 3, 64, 64)
    results = logits_and_grads(ours, x)
    assert results["logits"].shape == (2, 10)
    assert all(g is not None and g.isfinite().all() for g in results.values())
    with torch.no_grad():
        same({"y": ours(x)}, {"y": results["logits"]})


@pytest.mark.parametrize(
    "name", ["vit_base_resnet26d_224", "vit_small_resnet50d_s16_224", "vit_base_mci_224"]
)
def test_timm_hybrids_over_other_cnns(name):
    import timm

    small = {"embed_dim": 48, "num_heads": 3} if "mci" not in name else {}
    theirs = timm.create_model(name, depth=1, img_size=64, num_classes=10, **small)
    theirs = randomised(theirs).eval()
    ours = FusedHybridViT.from_timm(theirs)
    x = torch.randn(2, 3, 64, 64)
    truth = logits_and_grads(copy.deepcopy(theirs).double(), x.double())
    with use_backend("reference"):
        same(logits_and_grads(copy.deepcopy(ours).double(), x.double()), truth, 1e-9)
    same({"y": ours(x)}, {"y": theirs(x)}, 2e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr()
    cases.record("FusedHybridViT", "reference", torch.float64, name)


def test_weights_of_a_given_backbone_survive_initialisation():
    backbone = randomised(ResNetV2((1,), (128,)))
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    for scheme in ("", "jax", "moco"):
        ours = FusedHybridViT(backbone, 32, **TINY, weight_init=scheme)
        ours.init_weights("reset")
        got = ours.patch_embed.backbone.state_dict()
        assert all(torch.equal(before[name], t) for name, t in got.items())
    torch.manual_seed(0)
    ours = FusedHybridViT((1,), 32, **TINY)
    assert ours.patch_embed.backbone.stages[0].blocks[0].norm3.weight.abs().sum() == 0


def test_a_told_map_is_not_measured():
    backbone = Last("map", num_features=32)
    embed = HybridEmbed(backbone, 64, 2, feature_size=8, feature_ratio=8, embed_dim=48)
    assert backbone.calls == [] and embed.grid_size == (4, 4) and embed.feat_ratio() == 16
    assert embed(torch.randn(1, 3, 64, 64)).shape == (1, 16, 48)
    info = type("Info", (), {"channels": lambda self: [8, 32]})()
    embed = HybridEmbed(Last("list", feature_info=info), 64, feature_size=8, feature_ratio=8)
    assert embed.feature_dim == 32


@pytest.mark.parametrize(
    "fmt, flatten, shape",
    [(None, True, (2, 16, 48)), (None, False, (2, 48, 4, 4)), ("NHWC", True, (2, 4, 4, 48)),
     ("NCHW", True, (2, 48, 4, 4))],
)  # fmt: skip
def test_formats_of_the_embedding(fmt, flatten, shape):
    embed = HybridEmbed(Last("map"), 64, 2, embed_dim=48, output_fmt=fmt, flatten=flatten).eval()
    x = torch.randn(2, 3, 64, 64)
    one_call = embed(x)
    embed.proj.register_forward_hook(lambda *_: None)
    by_module = embed(x)
    assert one_call.shape == by_module.shape == shape
    assert torch.allclose(one_call, by_module, atol=1e-5)


# --- bad arguments --------------------------------------------------------------------------------


class Vector(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"backbone": "resnet50"}, "backbone must be a module or the numbers of blocks"),
        ({"backbone": (3, 0)}, "ResNetV2: layers must be a positive integer"),
        ({"backbone": (1,) * 5}, "ResNetV2: layers must be 1 to 4 numbers of blocks"),
        ({"backbone": Vector()}, r"backbone must be a module that returns a map \(B, C, h, w\)"),
        ({"patch_size": 3}, r"patch_size must be a divisor of the map's size \(8, 8\)"),
        ({"patch_size": 16}, "img_size must be at least one patch"),
        ({"img_size": 0}, "HybridEmbed: img_size must be a positive integer"),
        ({"proj": False}, "embed_dim must be the map's channels = 256 without a projection"),
        ({"embed_norm_layer": "layernorm"}, "norm_layer must be None"),
        ({"global_pool": "median"}, "global_pool must be one of"),
        ({"mean": (0.1, 0.2)}, "HybridEmbed: mean must be a float or 3 floats"),
        ({"feature_size": 8, "backbone": Last("map")}, "feature_size must be None: the backbone"),
    ],
)
def test_bad_constructor_arguments(arguments, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        FusedHybridViT(**{"backbone": (1,), "img_size": 32, **TINY, **arguments})
    assert "\n" not in str(error.value)


def test_bad_calls():
    ours = FusedHybridViT((1,), 32, **TINY)
    with pytest.raises(AssertionError, match="HybridEmbed: image is 40x32, the model takes"):
        ours(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="name must be vit_SIZE_RESNET_PIXELS"):
        FusedHybridViT.named("vit_base_r50_s8_224")
    with pytest.raises(ValueError, match=r"FusedHybridViT\(backbone=module\)"):
        FusedHybridViT.from_torchvision(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"patch_size must be .* without a projection"):
        pair("no_projection")[1].set_input_size(patch_size=2)
    before = ours.patch_embed.grid_size
    with pytest.raises(ValueError, match="patch_size must be a divisor"):
        ours.set_input_size(patch_size=3)
    assert ours.patch_embed.grid_size == before and ours(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="need a model name"):
        FusedHybridViT.from_timm(timm_hybrid(), pretrained=True)
