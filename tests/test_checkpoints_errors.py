"""Wrong checkpoints: one sentence that names the loader, what was expected and what came."""

import json
import pickle

import numpy as np
import pytest
import torch
from checkpoint_pairs import (
    damaged,
    huggingface,
    jax_arrays,
    needs_transformers,
    refused,
    torchvision_vit,
    transformers,
)
from safetensors.torch import save_file
from timm_stub import timm
from torch import nn
from vit_pairs import needs_timm, timm_vit

from vitkernels import FusedViT

pytestmark = pytest.mark.skipif(**needs_timm)


def refused_file(sentence: str, path, error=ValueError, **kwargs) -> str:
    message = refused(sentence, FusedViT.from_pretrained, path, error=error, **kwargs)
    assert message.startswith("from_pretrained: ") and path.name in message
    return message


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm_vit().state_dict()


# --- names and shapes -----------------------------------------------------------------------------

WRONG = {
    "missing": (lambda s: s.pop("blocks.1.norm2.bias"), "missing blocks.1.norm2.bias$"),
    "missing block": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")],
        r"missing blocks\.1\.norm1\.weight, .* and 9 more$",
    ),
    "no blocks": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.")],
        "missing blocks.0.mlp.fc1.weight$",
    ),
    "surplus": (
        lambda s: s.update({"decoder.weight": torch.zeros(1)}),
        "not expected: decoder.weight$",
    ),
    "shape": (
        lambda s: s.update({"blocks.2.mlp.fc2.weight": torch.zeros(48, 100)}),
        r"blocks\.2\.mlp\.fc2\.weight is \(48, 100\) where \(48, 192\) is expected$",
    ),
    "all three": (
        lambda s: s.update({"norms.bias": s.pop("norm.bias"), "norm.weight": torch.zeros(7)}),
        r"missing norm\.bias; not expected: norms\.bias; norm\.weight is \(7,\) where \(48,\)",
    ),
    "positions": (
        lambda s: s.update({"pos_embed": torch.zeros(1, 23, 48)}),
        "23 positions are no square grid: name img_size$",
    ),
    "whole numbers": (
        lambda s: s.update({"norm.weight": torch.ones(48, dtype=torch.int64)}),
        r"norm.weight is torch\.int64 where a floating dtype is expected$",
    ),
    "flat patches": (
        lambda s: s.update({"patch_embed.proj.weight": torch.zeros(48, 192)}),
        "patch_embed.proj.weight has 2 dimensions, 4 are expected$",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_names_and_shapes(what, state, tmp_path):
    change, sentence = WRONG[what]
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "m.pth")
    refused_file(sentence, tmp_path / "m.pth", num_heads=3)


@pytest.mark.parametrize("source", ["timm", "registers", "torchvision", "huggingface", "jax"])
def test_damaged_tensors_are_an_error_in_one_sentence(source, seed, tmp_path):
    random, path = np.random.default_rng(seed), tmp_path / "m.pth"
    theirs = timm_vit(depth=2) if source in ("timm", "jax") else timm_vit("registers_layer_scale")
    tensors = theirs.state_dict()
    if source == "torchvision":
        tensors = torchvision_vit(num_layers=2).state_dict()
    elif source == "huggingface":
        pytest.importorskip("transformers")
        tensors = huggingface(num_hidden_layers=2).state_dict()
    elif source == "jax":
        path = tmp_path / "m.npz"
        tensors = {k: torch.from_numpy(a) for k, a in jax_arrays(tensors, 3, "augreg").items()}
    refusals = 0
    for _ in range(40):
        broken = damaged(tensors, random)
        if source == "jax":
            np.savez(path, **{key: tensor.numpy() for key, tensor in broken.items()})
        else:
            torch.save(broken, path)
        try:
            FusedViT.from_pretrained(path, num_heads=3)
        except ValueError as error:
            refusals += 1
            assert str(error).startswith("from_pretrained: ") and "\n" not in str(error)
    assert refusals >= 30  # what is left loads as another model: without a head, say


ARGUMENTS = {
    "no heads": ({}, "the width 48 is no multiple of 64: name num_heads"),
    "depth": ({"num_heads": 3, "depth": 4}, r"missing blocks\.3\.norm1\.weight"),
    "width": ({"num_heads": 3, "embed_dim": 96}, r"cls_token is \(1, 1, 48\) where \(1, 1, 96\)"),
    "pooling": ({"num_heads": 3, "fc_norm": True}, r"missing fc_norm.weight.*not expected: norm"),
    "map": ({"num_heads": 3, "global_pool": "map"}, "attention pooling"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_do_not_fit_the_file(what, state, tmp_path):
    arguments, sentence = ARGUMENTS[what]
    torch.save(state, tmp_path / "m.pth")
    refused(sentence, FusedViT.from_pretrained, tmp_path / "m.pth", **arguments)


OTHERS = {
    "resnet18": "a ResNet",
    "swin_tiny_patch4_window7_224": "a Swin Transformer, .*: use FusedSwin.from_pretrained$",
    "deit_tiny_distilled_patch16_224": "a distilled DeiT",
    "vit_tiny_r_s16_p8_224": "a hybrid",
    "vit_base_patch16_siglip_224": "attention pooling",
    "vit_small_patch16_18x2_224": "parallel blocks",
    "mixer_s32_224": "must have the names of a Vision Transformer of timm, .* got blocks",
    "aimv2_large_patch14_224": "SwiGLU in two matrices",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, tmp_path):
    small = {"depth": 2} if name.startswith(("vit_", "deit_")) and "_r_" not in name else {}
    small |= {"embed_dim": 128, "num_heads": 2, "depth": 2} if "aim" in name else {}
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=2, **small)
    state = {
        key: torch.zeros(t.shape, dtype=torch.bfloat16) for key, t in theirs.state_dict().items()
    }
    save_file(state, tmp_path / "m.safetensors")
    refused_file(OTHERS[name], tmp_path / "m.safetensors")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped header"])
def test_damaged_files(suffix, damage, state, tmp_path):
    path = tmp_path / f"m{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".npz":
        np.savez(path, **jax_arrays(state, 3, "augreg"))
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"<html>404: not found</html>",
            "flipped header": bytes(255 - b for b in whole[:64]) + whole[64:],
        }[damage]
    )
    refused_file("is not readable as", path)


class Evil:
    ran = False

    def __reduce__(self):
        return (exec, ("import test_checkpoints_errors as t; t.Evil.ran = True",))


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_pickled_code_is_refused(suffix, state, tmp_path):
    path = tmp_path / f"m{suffix}"
    if suffix == ".npz":
        np.savez(path, **{"embedding/kernel": np.array([Evil()], dtype=object)})
    else:
        torch.save({"model": state, "hook": Evil()}, path)
    refused_file("run code|not readable as a NumPy", path)
    assert not Evil.ran


def test_a_pickled_model_is_refused(tmp_path):
    path = tmp_path / "m.pth"
    torch.save(timm_vit(depth=1), path)
    refused_file("save the tensors alone", path)
    path.write_bytes(pickle.dumps([1, 2]))
    refused_file("must hold a dict of tensors|not readable", path)
    torch.save({"epoch": 3}, path)
    refused_file("holds no tensors by name", path)
    torch.save([torch.zeros(3)], path)
    refused_file("must hold a dict of tensors, got list", path)


def test_paths(tmp_path):
    missing = tmp_path / "missing.pth"
    message = refused_file("there is no file or folder", missing, error=FileNotFoundError)
    assert str(missing) in message
    other = tmp_path / "m.onnx"
    other.write_bytes(b"1")
    refused_file(r"must end in \.safetensors, \.pth, .* got '\.onnx'", other)
    refused_file("has no config.json", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("config.json is not readable JSON", FusedViT.from_pretrained, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    refused_file("has no model.safetensors or pytorch_model.bin", tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": 1}')
    refused_file("neither model_type .* nor architecture", tmp_path)


@pytest.mark.parametrize("part", ["MAPHead_0/probe", "conv_root/kernel"])
def test_jax_files_of_other_models(part, state, tmp_path):
    arrays = {**jax_arrays(state, 3, "augreg"), part: np.zeros(3, np.float32)}
    np.savez(tmp_path / "m.npz", **arrays)
    refused_file("attention pooling|hybrid", tmp_path / "m.npz")
    del arrays[part], arrays["Transformer/encoderblock_1/LayerNorm_2/scale"]
    np.savez(tmp_path / "m.npz", **arrays)
    refused_file("missing Transformer/encoderblock_1/LayerNorm_2/scale", tmp_path / "m.npz")


def test_missing_packages_are_named(state, tmp_path, monkeypatch):
    save_file(state, tmp_path / "m.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    refused_file("pip install safetensors", tmp_path / "m.safetensors", error=ImportError)
    np.savez(tmp_path / "m.npz", a=np.zeros(1))
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    refused_file("pip install numpy", tmp_path / "m.npz", error=ImportError)


# --- models of other libraries --------------------------------------------------------------------


def test_torchvision_refusals():
    load = FusedViT.from_torchvision
    refused("must be torchvision's VisionTransformer, got Linear", load, nn.Linear(2, 2))
    refused("must be torchvision's VisionTransformer", load, timm_vit())
    refused("representation_size", load, torchvision_vit(representation_size=12))
    theirs = torchvision_vit()
    theirs.conv_proj = nn.Sequential(theirs.conv_proj)
    refused("convolutional stem", load, theirs)


@pytest.mark.skipif(**needs_transformers)
def test_huggingface_refusals(tmp_path):
    load = FusedViT.from_huggingface
    refused("must be transformers' ViT or DINOv2, got Linear", load, nn.Linear(2, 2))
    refused("nothing is downloaded", load, "google/vit-base-patch16-224", error=FileNotFoundError)
    swin = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)
    refused(
        "model_type must be one of vit, .* got 'swin': use FusedSwin",
        load,
        transformers.SwinModel(swin),
    )
    refused("hidden_act must be one of gelu, .* got 'relu'", load, huggingface(hidden_act="relu"))
    settings = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.Dinov2Config(**settings, image_size=28, num_labels=5)
    refused(r"head.weight is \(5, 96\) where \(5, 48\)", load,
            transformers.Dinov2ForImageClassification(config))  # fmt: skip
    config = transformers.ViTConfig(**settings, intermediate_size=48, image_size=32)
    masked = transformers.ViTForMaskedImageModeling(config)
    refused("not expected: decoder", load, masked)
    theirs = huggingface()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    refused(r"missing blocks\.3", load, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused("config.json", load, tmp_path)
