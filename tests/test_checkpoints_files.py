"""Files of timm, torchvision and JAX -> FusedViT: the source's logits, and timm's resampling."""

import argparse
import copy
import json

import numpy as np
import pytest
import torch
from checkpoint_pairs import jax_arrays, torchvision_vit
from safetensors.torch import save_file
from timm_stub import timm
from vit_pairs import (
    CONFIGS,
    TINY,
    images,
    logits_and_grads,
    needs_timm,
    relative_errors,
    same,
    timm_vit,
)

from vitkernels import FusedViT, use_backend
from vitkernels.checkpoints.torchvision import timm_state
from vitkernels.nn import GELUTanh, QuickGELU
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)

# What the shapes of a configuration do not tell.
UNTOLD = {
    "average_pool": {},
    "average_max_pool": {"global_pool": "avgmax"},
    "clip": {"act_layer": QuickGELU},
    "siglip": {"act_layer": GELUTanh},
    "qk_norm": {"pool_include_prefix": True},
    "dynamic_size": {"dynamic_img_size": True},
    "dynamic_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "gray_not_square": {"img_size": (24, 56)},
    "no_final_norm": {"img_size": 32, "global_pool": "", "num_heads": 3},
    "wide_heads": {"num_heads": 2, "embed_norm_layer": torch.nn.LayerNorm},
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "res_post_norm"])
def test_architecture_from_shapes(name, tmp_path):
    theirs, x = timm_vit(name), images(name)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = FusedViT.from_pretrained(
        tmp_path / "model.safetensors", **{"num_heads": 3, **UNTOLD.get(name, {})}
    )
    same({"y": ours(x)}, {"y": theirs(x)})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    cases.record("from_pretrained", "auto", torch.float32, name)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_huge_patch14_224", "vit_giant_patch14_224"]
)
def test_heads_of_the_known_widths(name, tmp_path):
    with torch.device("meta"):
        theirs = timm.create_model(name, depth=1, num_classes=2, mlp_ratio=0.01)
    state = {
        key: torch.zeros(t.shape, dtype=torch.float16) for key, t in theirs.state_dict().items()
    }
    save_file(state, tmp_path / "m.safetensors")
    ours = FusedViT.from_pretrained(tmp_path / "m.safetensors")
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.head.weight.dtype == torch.float16


WRAPPED = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": "vit"},
    "ema": lambda state: {"state_dict": _other(state), "state_dict_ema": state},
    "model_ema": lambda state: {"model": _other(state), "model_ema": state},
    "module": lambda state: {"module." + key: t for key, t in state.items()},
    "compiled": lambda state: {"model": {"module._orig_mod." + k: t for k, t in state.items()}},
    "lightning": lambda state: {"state_dict": {"model." + key: t for key, t in state.items()}},
}


def _other(state):
    return {key: tensor + 1 for key, tensor in state.items()}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_wrappers_and_prefixes(how, suffix, tmp_path):
    theirs, x = timm_vit("registers_layer_scale"), images()
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(WRAPPED[how](theirs.state_dict()), path)
    same({"y": FusedViT.from_pretrained(path, num_heads=3)(x)}, {"y": theirs(x)})


def test_original_deit3_and_dinov2_names(tmp_path):
    x, path = images(), tmp_path / "m.pth"
    theirs = timm_vit("no_embed_class")  # DeiT-3
    state = {k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): t
             for k, t in theirs.state_dict().items()}  # fmt: skip
    torch.save({"model": state}, path)
    ours = FusedViT.from_pretrained(path, num_heads=3)
    same({"y": ours(x)}, {"y": theirs(x)})
    assert ours.patch_embed.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    theirs = timm_vit("swiglu")  # DINOv2 giant
    state = {"mask_token": torch.zeros(1, 48)}
    for key, tensor in theirs.state_dict().items():
        state[key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = tensor
    torch.save(state, path)
    same({"y": FusedViT.from_pretrained(path, num_heads=3)(x)}, {"y": theirs(x)})
    theirs = timm_vit(reg_tokens=4, init_values=0.1, no_embed_class=True)
    state = theirs.state_dict()
    shift = torch.randn(1, 1, 48)  # DINOv2 has a position of the class token
    state["pos_embed"] = torch.cat([shift, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - shift
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 48)
    torch.save(state, path)
    same({"y": FusedViT.from_pretrained(path, num_heads=3)(x)}, {"y": theirs(x)})


def test_a_folder_of_timm_s_hub(tmp_path):
    theirs, x = timm_vit("clip"), images()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_clip_quickgelu_224",
        "global_pool": "token",
        "model_args": {"num_heads": 3},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FusedViT.from_pretrained(tmp_path)
    same({"y": ours(x)}, {"y": theirs(x)})
    assert ours.patch_embed.std.tolist() == pytest.approx([0.4, 0.5, 0.6])


TOLD_BY_NAME = [
    "vit_base_patch32_siglip_gap_256", "vit_giantopt_patch16_siglip_gap_256",
    "vit_large_patch16_siglip_gap_512", "vit_so400m_patch16_siglip_gap_256",
    "vit_base_patch16_siglip_gap_224", "vit_so400m_patch14_siglip_gap_224",
    "vit_base_patch16_rpn_224", "beit3_base_patch16_224", "vit_base_patch16_gap_224",
    "vit_giant_patch16_radio_v3", "test_vit", "vit_base_patch32_clip_quickgelu_224",
]  # fmt: skip


@pytest.mark.parametrize("name", TOLD_BY_NAME)
def test_what_the_name_of_timm_s_hub_says_beside_the_shapes(name, tmp_path):
    with torch.device("meta"):
        theirs = FusedViT.from_timm(timm.create_model(name, depth=1))
    state = {key: torch.zeros(tensor.shape) for key, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    ours = FusedViT.from_pretrained(tmp_path)

    def told(model):
        block = model.blocks[0]
        approximate = getattr(block.mlp.act, "approximate", "none")
        act = "tanh" if approximate == "tanh" else type(block.mlp.act).__name__
        return type(block), act.replace("GELUTanh", "tanh"), block.norm1.eps, block.attn.num_heads

    assert told(ours) == told(theirs)


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_a_layer_before_the_head_is_reported(suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    state = timm_vit().state_dict()
    if suffix == ".npz":
        arrays = jax_arrays(state, 3, "augreg")
        np.savez(path, **arrays, **{"pre_logits/kernel": np.zeros((48, 48), np.float32)})
    else:
        torch.save({**state, "pre_logits.fc.weight": torch.zeros(48, 48)}, path)
    with pytest.warns(UserWarning, match=r"pre_logits.* ignored: FusedViT has no layer before"):
        FusedViT.from_pretrained(path, num_heads=3)


def test_jax_arrays_that_nobody_reads_are_refused(tmp_path):
    arrays = jax_arrays(timm_vit().state_dict(), 3, "augreg")
    extra = {"Transformer/encoderblock_0/LayerScale_0/gamma": np.zeros(48, np.float32)}
    np.savez(tmp_path / "m.npz", **arrays, **extra)
    with pytest.raises(ValueError, match=r"not expected: Transformer/encoderblock_0/LayerScale_0"):
        FusedViT.from_pretrained(tmp_path / "m.npz")


def test_every_eps_and_dropout_of_a_timm_model_is_copied():
    theirs, x = timm_vit(), images()
    theirs.norm.eps, theirs.blocks[1].norm2.eps, theirs.blocks[2].mlp.drop1.p = 0.1, 0.2, 0.3
    ours = FusedViT.from_timm(theirs)
    same({"y": ours(x)}, {"y": theirs(x)})
    assert ours.blocks[2].mlp.drop1.p == 0.3 and ours.blocks[1].mlp.drop1.p == 0.0


def test_device_and_dtype_and_a_fresh_head(tmp_path):
    theirs = timm_vit()
    path = tmp_path / "m.pth"
    torch.save(theirs.state_dict(), path)
    ours = FusedViT.from_pretrained(path, num_heads=3, dtype=torch.bfloat16, num_classes=4)
    assert ours.head.weight.shape == (4, 48) and not ours.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in ours.parameters())
    assert torch.equal(ours.cls_token, theirs.cls_token.bfloat16())
    headless = FusedViT.from_pretrained(path, num_heads=3, num_classes=0)
    assert isinstance(headless.head, torch.nn.Identity)


# --- other sizes, as timm resamples ---------------------------------------------------------------

SIZES = {
    "image": {"img_size": 48},
    "not_square": {"img_size": (24, 40)},
    "patch": {"img_size": 64, "patch_size": 16},
    "one_channel": {"in_chans": 1},
    "five_channels": {"in_chans": 5},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name, suffix",
    [
        ("class_token", ".pth"), ("no_embed_class", ".pth"), ("average_pool", ".pth"),
        ("class_token", ".npz"), ("average_pool", ".npz"),
    ],
)  # fmt: skip
def test_other_sizes_are_timm_s(size, name, suffix, tmp_path):
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    source, path = timm_vit(name), tmp_path / f"m{suffix}"
    settings = {"num_classes": 10, **TINY, **CONFIGS[name][0], **SIZES[size]}
    if suffix == ".npz":
        settings |= {"fc_norm": False}
        source = timm_vit(name, fc_norm=False)
        np.savez(path, **jax_arrays(source.state_dict(), 3, "augreg"))
    else:
        torch.save(source.state_dict(), path)
    theirs = VisionTransformer(**settings).eval()
    if suffix == ".npz":
        theirs.load_pretrained(str(path))
    else:
        state = checkpoint_filter_fn(source.state_dict(), theirs)
        if "in_chans" in SIZES[size]:
            weight = state["patch_embed.proj.weight"]
            adapted = timm.models.adapt_input_conv(SIZES[size]["in_chans"], weight)
            state["patch_embed.proj.weight"] = adapted
        theirs.load_state_dict(state)
    more = {"no_embed_class": True} if name == "no_embed_class" else {}  # 3 x 5 + 1 is 4 x 4
    ours = FusedViT.from_pretrained(path, num_heads=3, **SIZES[size], **more)
    expected = theirs.state_dict()
    for key, got in ours.state_dict().items():
        assert got.shape == expected[key].shape
        assert (got - expected[key]).norm() <= 2e-6 * expected[key].norm(), key


# --- JAX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "augreg", "big_vision", "scanned"])
@pytest.mark.parametrize("name", ["class_token", "average_pool"])
def test_jax_files_load_as_timm_loads_them(layout, name, tmp_path):
    theirs, path = timm_vit(name, fc_norm=False), tmp_path / "m.npz"
    arrays = jax_arrays(theirs.state_dict(), 3, layout)
    np.savez(path, **arrays)
    fresh = timm_vit(name, fc_norm=False)
    fresh.load_pretrained(str(path))
    ours = FusedViT.from_pretrained(path)  # the heads are in a kernel's shape
    expected = fresh.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in ours.state_dict().items())
    x = images(name)
    same({"y": ours(x)}, {"y": theirs(x)})


def test_jax_files_in_bfloat16(tmp_path):
    theirs = timm_vit()
    arrays = jax_arrays(theirs.bfloat16().float().state_dict(), 3, "augreg")
    halves = {k: (a.view(np.uint32) >> 16).astype(np.uint16).view("V2") for k, a in arrays.items()}
    np.savez(tmp_path / "m.npz", **halves)
    ours = FusedViT.from_pretrained(tmp_path / "m.npz")
    x = images()
    same({"y": ours(x)}, {"y": theirs(x)})


# --- torchvision ----------------------------------------------------------------------------------

TORCHVISION = {
    "plain": {},
    "eps": {"norm_layer": lambda width: torch.nn.LayerNorm(width, eps=1e-3)},
    "wide": {"hidden_dim": 64, "num_heads": 2, "num_layers": 2, "image_size": 48, "patch_size": 16},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_logits_and_gradients(name):
    theirs = torchvision_vit(**TORCHVISION[name])
    ours = FusedViT.from_torchvision(theirs)
    size = theirs.image_size
    x = torch.randn(2, 3, size, size)
    base, got = _results(theirs, x), logits_and_grads(ours, x)
    truth = _results(copy.deepcopy(theirs).double(), x.double())
    with use_backend("reference"):
        exact = logits_and_grads(ours.double(), x.double())
    assert exact.keys() == truth.keys()
    errors = relative_errors(exact, truth)
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:3]
    base, errors = relative_errors(base, truth), relative_errors(got, truth)
    for key, error in errors.items():
        assert error <= max(2 * base[key], 1e-6), f"{key}: {error:.3g}, theirs {base[key]:.3g}"
    assert ours.patch_embed.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    cases.record("from_torchvision", "auto", torch.float32, name)


def _results(model, x):
    return timm_state(logits_and_grads(model, x))


def test_torchvision_files_and_settings(tmp_path):
    theirs = torchvision_vit(dropout=0.1, attention_dropout=0.2).train()
    theirs.conv_proj.bias.requires_grad_(False)
    ours = FusedViT.from_torchvision(theirs)
    block = ours.blocks[1]
    drops = (ours.pos_drop.p, block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p)
    assert drops == (0.1, 0.2, 0.1, 0.1) and ours.training
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == ["patch_embed.proj.bias"]
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    other, x = FusedViT.from_pretrained(tmp_path / "vit_b_16.pth", num_heads=3), images()
    same({"y": other(x)}, {"y": theirs.eval()(x)})
