"""Images into tokens: one operator call, uint8 images, and what a model does about its mean."""

import copy
import pickle

import pytest
import torch
from torch import nn
from vit_pairs import CONFIGS, images, logits_and_grads, needs_timm, pair, relative_errors, same

import vitkernels.nn.patch_embed
from vitkernels import FusedViT, use_backend
from vitkernels.nn import PatchEmbed

pytestmark = pytest.mark.skipif(**needs_timm)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}


def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of each call of the operator."""
    seen, patch_embed = [], vitkernels.nn.patch_embed.patch_embed

    def watched(*args, **kwargs):
        seen.append(kwargs)
        return patch_embed(*args, **kwargs)

    monkeypatch.setattr(vitkernels.nn.patch_embed, "patch_embed", watched)
    return seen


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "wide_heads"])
def test_one_call_from_images_to_tokens(name, monkeypatch):
    theirs, ours = pair(name)
    x, seen = images(name), calls(monkeypatch)
    got = ours._embed(x)
    expected = theirs.norm_pre(theirs._pos_embed(theirs.patch_embed(x)))
    same({"y": got}, {"y": expected})
    (call,) = seen
    P = ours.num_prefix_tokens
    assert (call["prefix_tokens"] is not None) == (P > 0)
    assert (call["pos_embed"] is not None) == (ours.pos_embed is not None)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.patch_embed.register_forward_hook(lambda *_: None),
        lambda m: m.patch_embed.proj.register_forward_hook(lambda *_: None),
        lambda m: m.patch_embed.norm.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(48)),
        lambda m: setattr(m, "__class__", type("Other", (FusedViT,), {"_pos_embed": _pos_embed})),
    ],
)
def test_other_calls_where_somebody_looks(change, monkeypatch):
    theirs, ours = pair("registers_layer_scale")
    change(ours), change(theirs) if change.__code__.co_consts[-1] != "_pos_embed" else None
    seen = calls(monkeypatch)
    x = images()
    same({"y": ours(x)}, {"y": theirs(x)})
    assert all(call["pos_embed"] is None for call in seen)


def _pos_embed(self, x):
    return FusedViT._pos_embed(self, x)


def test_what_is_left_of_whole_patches_is_left_out():
    theirs, ours = pair(img_size=(37, 44), patch_size=8)  # SO400M: 384 pixels, patches of 14
    x = torch.randint(0, 256, (2, 3, 37, 44), dtype=torch.uint8)
    normalised = (x.float() / 255 - 0.5) / 0.5
    a, b = normalised.clone().requires_grad_(), normalised.clone().requires_grad_()
    got, expected = ours(a), theirs(b)
    same({"y": got}, {"y": expected}, 2e-5)
    got.square().sum().backward(), expected.square().sum().backward()
    same({"dx": a.grad}, {"dx": b.grad}, 2e-5)
    same({"y": ours(x)}, {"y": got}, 2e-5)


def test_overlapping_patches_are_respected():
    theirs, ours = pair("dynamic_size")
    for model in (theirs, ours):
        model.patch_embed.proj.stride = (4, 4)
    x = images("dynamic_size")
    got, expected = ours.patch_embed(x), theirs.patch_embed(x)
    assert got.shape == expected.shape
    same({"y": got}, {"y": expected})


# --- uint8 ----------------------------------------------------------------------------------------


def normalised(x: torch.Tensor, mean, std) -> torch.Tensor:
    mean, std = (torch.tensor(v).float().double().view(-1, 1, 1) for v in (mean, std))
    return (x.double() / 255 - mean) / std


UINT8 = [
    "class_token", "average_pool", "registers_layer_scale", "no_embed_class", "clip",
    "dynamic_size", "dynamic_pad", "gray_not_square", "wide_heads",
]  # fmt: skip


@pytest.mark.parametrize("name", UINT8)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uint8_images_are_normalised_inside(name, layout):
    theirs, _ = pair(name)
    C = CONFIGS[name][0].get("in_chans", 3)
    theirs.pretrained_cfg = {"mean": MEAN[:C], "std": STD[:C]}
    ours = FusedViT.from_timm(theirs)
    x = torch.randint(0, 256, (2, C, *CONFIGS[name][1]), dtype=torch.uint8)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    truth = copy.deepcopy(theirs).double()(normalised(x, MEAN[:C], STD[:C]))
    with use_backend("reference"):
        exact = copy.deepcopy(ours).double()(x)
    assert relative_errors({"y": exact}, {"y": truth})["y"] < 1e-9
    base = theirs(normalised(x, MEAN[:C], STD[:C]).float())
    error, allowed = (relative_errors({"y": y}, {"y": truth})["y"] for y in (ours(x), base))
    assert error <= max(2 * allowed, 1e-6)


def test_uint8_images_with_a_watched_projection():
    _, ours = pair("registers_layer_scale")
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = ours(x)
    ours.patch_embed.proj.register_forward_hook(lambda *_: None)
    same({"y": ours(x)}, {"y": expected})


@pytest.mark.parametrize("name", ["registers_layer_scale", "dynamic_pad"])
def test_uint8_images_compile_as_one_graph(name):
    _, ours = pair(name, depth=1)
    x = torch.randint(0, 256, (2, 3, *CONFIGS[name][1]), dtype=torch.uint8)
    torch._dynamo.reset()
    same({"y": torch.compile(ours, backend="aot_eager", fullgraph=True)(x)}, {"y": ours(x)})


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_uint8_images_in_16_bits(mode):
    theirs, ours = pair("registers_layer_scale")
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    truth = theirs.double()(normalised(x, [0.5] * 3, [0.5] * 3))
    ours = ours.bfloat16() if mode == "bfloat16" else ours
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        got = ours(x)
    assert got.dtype == torch.bfloat16
    assert relative_errors({"y": got}, {"y": truth})["y"] < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("watched", [False, True])
def test_float_images_take_the_parameters_dtype(dtype, watched):
    """timm raises; an fp64 image would otherwise make everything after it fp64."""
    _, ours = pair("registers_layer_scale")
    x = images().requires_grad_()
    if dtype == torch.float64:
        x, expected = x.detach().double().requires_grad_(), ours(x)
    else:
        ours.bfloat16()
        expected = ours(x.bfloat16())
    if watched:
        ours.patch_embed.proj.register_forward_hook(lambda *_: None)
    got = ours(x)
    same({"y": got}, {"y": expected}, 2e-2 if dtype == torch.bfloat16 else 5e-6)
    assert got.dtype == expected.dtype
    got.float().sum().backward()
    assert x.grad.dtype == x.dtype and x.grad.abs().sum() > 0


def test_a_replaced_projection():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.patch_embed.proj = nn.Sequential(model.patch_embed.proj, nn.ReLU())
    x = images()
    same({"y": ours.float()(x)}, {"y": theirs(x)})


def test_gradients_of_a_step_on_uint8_images():
    _, ours = pair("registers_layer_scale")
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = logits_and_grads(ours, normalised(x, [0.5] * 3, [0.5] * 3).float())
    ours.zero_grad()
    out = ours(x)
    direction = torch.sin(torch.arange(out.numel(), dtype=torch.float64) + 1).reshape(out.shape)
    out.backward(direction.float())
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    same(got, {name: expected[name] for name in got})


# --- the buffers mean and std ---------------------------------------------------------------------

COPIES = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "assign": lambda m: _assigned(m),
    "in_chans": lambda m: m.requires_grad_(False).train(),
}


def _assigned(model):
    other = FusedViT(**SMALL, mean=MEAN, std=STD, device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("how", COPIES)
def test_mean_and_std_stay_fp32_beside_the_parameters(how):
    model = COPIES[how](FusedViT(**SMALL, mean=MEAN, std=STD))
    assert torch.equal(model.patch_embed.mean, torch.tensor(MEAN))
    assert torch.equal(model.patch_embed.std, torch.tensor(STD))
    assert not any("mean" in key or "std" in key for key in model.state_dict())


@pytest.mark.parametrize("mean", [(0.5, 0.5), 0.25, (0.1, 0.2, 0.3)])
def test_one_mean_or_one_for_each_channel(mean):
    if mean == (0.5, 0.5):
        with pytest.raises(ValueError, match="mean must be a float or 3 floats"):
            FusedViT(**SMALL, mean=mean)
        return
    with pytest.raises(ValueError, match="std must be above 0, got"):
        FusedViT(**SMALL, mean=mean, std=(0.5, 0.0, 0.5))
    expected = [mean] * 3 if isinstance(mean, float) else list(mean)
    assert PatchEmbed(32, 8, mean=mean).mean.tolist() == pytest.approx(expected)
