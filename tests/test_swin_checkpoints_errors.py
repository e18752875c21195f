"""Wrong Swin checkpoints: one sentence that names the loader, what was expected and what came."""

import json

import numpy as np
import pytest
import torch
from checkpoint_pairs import damaged, huggingface, refused, torchvision_vit
from safetensors.torch import save_file
from swin_sources import (
    huggingface_swin,
    microsoft_state,
    needs_timm,
    needs_transformers,
    openmmlab_state,
    timm_swin,
    torchvision_swin,
)
from timm_stub import timm
from torch import nn
from vit_pairs import timm_vit

from vitkernels import FusedSwin, FusedViT

pytestmark = pytest.mark.skipif(**needs_timm)


def refused_file(sentence: str, path, error=ValueError, load=FusedSwin, **kwargs) -> None:
    message = refused(sentence, load.from_pretrained, path, error=error, **kwargs)
    assert message.startswith("from_pretrained: ") and path.name in message


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm_swin().state_dict()


# --- names and shapes -----------------------------------------------------------------------------

FIRST, TABLE = "layers.0.blocks.0.", "attn.relative_position_bias_table"


def without(start):
    return lambda s: [s.pop(key) for key in list(s) if key.startswith(start)]


WRONG = {
    "missing": (lambda s: s.pop(FIRST + "norm2.bias"), f"missing {FIRST}norm2.bias$"),
    "missing block": (
        without("layers.1.blocks.0."),
        r"FusedSwin: missing layers\.1\.blocks\.0\.mlp\.fc1\.weight$",
    ),
    "missing stage": (without("layers.1."), r"missing layers\.1\.blocks\.0\.mlp\.fc1\.weight$"),
    "missing merging": (
        without("layers.2.downsample."), r"missing layers\.2\.downsample\.norm\.weight, .*$",
    ),
    "missing table": (lambda s: s.pop(FIRST + TABLE), f"missing {FIRST}{TABLE}$"),
    "other table": (
        lambda s: s.update({"layers.1.blocks.1." + TABLE: torch.zeros(81, 2)}),
        r"bias_table is \(81, 2\) where \(49, 2\) is expected$",
    ),
    "table of no window": (
        lambda s: s.update({"layers.1.blocks.0." + TABLE: torch.zeros(48, 2)}),
        "48 biases are no square window's: name window_size and img_size$",
    ),
    "flat table": (
        lambda s: s.update({FIRST + TABLE: torch.zeros(49)}), "has 1 dimensions, 2 are expected$",
    ),
    "surplus": (
        lambda s: s.update({"decoder.weight": torch.zeros(1)}), "not expected: decoder.weight$",
    ),
    "shape": (
        lambda s: s.update({"layers.2.blocks.1.mlp.fc2.weight": torch.zeros(48, 7)}),
        r"fc2\.weight is \(48, 7\) where \(48, 192\) is expected$",
    ),
    "positions": (
        lambda s: s.update({"absolute_pos_embed": torch.zeros(1, 256, 12)}),
        "has absolute position embeddings, which FusedSwin does not support$",
    ),
    "whole numbers": (
        lambda s: s.update({"norm.weight": torch.ones(48, dtype=torch.int64)}),
        r"norm.weight is torch\.int64 where a floating dtype is expected$",
    ),
    "flat patches": (
        lambda s: s.update({"patch_embed.proj.weight": torch.zeros(12, 48)}),
        "patch_embed.proj.weight has 2 dimensions, 4 are expected$",
    ),
    "heads that do not divide": (
        lambda s: [s.update({f"layers.2.blocks.{b}.{TABLE}": torch.zeros(49, 5)}) for b in (0, 1)],
        "num_heads",
    ),
    "both versions": (
        lambda s: s.update({FIRST + "attn.logit_scale": torch.zeros(1, 1, 1)}),
        "missing layers.1.blocks.0.attn.logit_scale$",
    ),
    "SimMIM": (
        lambda s: s.update({"encoder.mask_token": torch.zeros(1, 1, 12)}),
        "a SimMIM pre-training checkpoint",
    ),
    "mixture of experts": (
        lambda s: s.update({FIRST + "mlp._moe_layer.experts.0": torch.zeros(1)}),
        "a mixture-of-experts Swin Transformer",
    ),
    "no names": (
        lambda s: (s.clear(), s.update({"a": torch.zeros(1)})),
        "must have the names of a Swin Transformer of timm, Microsoft, .*, got a$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_names_and_shapes(what, state, tmp_path):
    change, sentence = WRONG[what]
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "m.pth")
    refused_file(sentence, tmp_path / "m.pth")


ARGUMENTS = {
    "depth": ({"depths": (2, 2, 3)}, r"missing layers\.2\.blocks\.2\.norm1\.weight"),
    "stages": ({"depths": (2, 2)}, "embed_dim|num_heads|window_size"),
    "width": ({"embed_dim": 24}, r"proj.weight is \(12, 3, 4, 4\) where \(24, 3, 4, 4\)"),
    "version": ({"version": 2}, "missing layers.0.blocks.0.attn.logit_scale"),
    "pooling": ({"global_pool": "map"}, "global_pool"),
    "window": ({"window_size": 0}, "window_size must be"),
    "clamp": ({"window_clamp": "both"}, "window_clamp"),
    "padding": ({"pad_mode": "reflect"}, "pad_mode"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_do_not_fit_the_file(what, state, tmp_path):
    arguments, sentence = ARGUMENTS[what]
    torch.save(state, tmp_path / "m.pth")
    refused(sentence, FusedSwin.from_pretrained, tmp_path / "m.pth", **arguments)


def test_version_2_does_not_show_its_windows(tmp_path):
    save_file(timm_swin(2).state_dict(), tmp_path / "m.safetensors")
    sentence = "windows and image size do not show in its shapes: name window_size and img_size$"
    for known in ({}, {"window_size": 4}, {"img_size": 64}):
        refused_file(sentence, tmp_path / "m.safetensors", **known)
    assert FusedSwin.from_pretrained(tmp_path / "m.safetensors", window_size=4, img_size=64)


SMALL = {"depths": (1, 2), "num_heads": (1, 2)}
SOURCES = {
    "timm": lambda: timm_swin(img_size=32, **SMALL).state_dict(),
    "timm v2": lambda: timm_swin(2, img_size=32, **SMALL).state_dict(),
    "microsoft": lambda: microsoft_state(timm_swin(img_size=32, **SMALL)),
    "microsoft v2": lambda: microsoft_state(timm_swin(2, img_size=32, **SMALL)),
    "torchvision": lambda: torchvision_swin(**SMALL).state_dict(),
    "torchvision v2": lambda: torchvision_swin(2, **SMALL).state_dict(),
    "openmmlab": lambda: openmmlab_state(timm_swin(img_size=32, **SMALL)),
    "huggingface": lambda: huggingface_swin(image_size=32, **SMALL).state_dict(),
    "huggingface v2": lambda: huggingface_swin(2, image_size=32, **SMALL).state_dict(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_damaged_tensors_are_an_error_in_one_sentence(source, seed, tmp_path):
    if "huggingface" in source:
        pytest.importorskip("transformers")
    random, path = np.random.default_rng(seed), tmp_path / "m.pth"
    tensors = SOURCES[source]()
    known = {"window_size": 4, "img_size": 32} if source.endswith(("timm v2", "face v2")) else {}
    refusals = 0
    for _ in range(20):
        torch.save(damaged(tensors, random), path)
        try:
            FusedSwin.from_pretrained(path, **known)
        except ValueError as error:
            refusals += 1
            assert str(error).startswith("from_pretrained: ") and "\n" not in str(error)
    assert refusals >= 10  # what is left loads as another model, or lost a buffer


# --- other architectures --------------------------------------------------------------------------


def test_files_of_vision_transformers_name_fused_vit(tmp_path):
    sentence = (
        "is a Vision Transformer, which FusedSwin does not load: use FusedViT.from_pretrained$"
    )
    states = [timm_vit(depth=1).state_dict(), torchvision_vit(num_layers=1).state_dict(),
              timm_vit("average_pool", depth=1).state_dict()]  # fmt: skip
    if needs_transformers["condition"] is False:
        states += [huggingface(num_hidden_layers=1).state_dict(),
                   huggingface("dinov2", num_hidden_layers=1).state_dict()]  # fmt: skip
    for state in states:
        save_file(state, tmp_path / "m.safetensors")
        refused_file(sentence, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **{"embedding/kernel": np.zeros(1)})
    refused_file("must have the names of a Swin Transformer", tmp_path / "m.npz")


@pytest.mark.parametrize("source", SOURCES)
def test_fused_vit_names_fused_swin(source, tmp_path):
    if "huggingface" in source:
        pytest.importorskip("transformers")
    torch.save(SOURCES[source](), tmp_path / "m.pth")
    sentence = "is a Swin Transformer, which FusedViT does not load: use FusedSwin.from_pretrained$"
    refused_file(sentence, tmp_path / "m.pth", load=FusedViT)


OTHERS = {
    "resnet18": "is a ResNet, which FusedSwin does not load$",
    "swinv2_cr_tiny_224": "is timm's Swin V2 Cr, which FusedSwin does not load$",
    "mixer_s32_224": "must have the names of a Swin Transformer|is a Vision Transformer",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, tmp_path):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=2)
    names = {key: torch.zeros(t.shape).half() for key, t in theirs.state_dict().items()}
    save_file(names, tmp_path / "m.safetensors")
    refused_file(OTHERS[name], tmp_path / "m.safetensors")


# --- files and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files(suffix, damage, state, tmp_path):
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404: not found</html>"}
    path.write_bytes(broken[damage])
    refused_file("is not readable as", path)


def test_folders(state, tmp_path):
    refused_file("has no config.json", tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["SwinModel"]}')
    save_file(state, tmp_path / "model.safetensors")
    refused_file("neither model_type .* nor architecture", tmp_path)
    config.write_text('{"model_type": "vit"}')
    refused_file("model_type must be one of swin, swinv2, got 'vit': use FusedViT$", tmp_path)
    config.write_text('{"model_type": "swin"}')
    refused_file("does not have depths and num_heads and window_size$", tmp_path)
    refused(
        "there is no folder", FusedSwin.from_huggingface, tmp_path / "a", error=FileNotFoundError
    )


# --- models of other libraries --------------------------------------------------------------------


def test_timm_refusals():
    load = FusedSwin.from_timm
    refused("the model VisionTransformer is not supported by FusedSwin", load, timm_vit())
    refused("the model SwinTransformerV2Cr is not supported", load, "swinv2_cr_tiny_ns_224")
    refused("need a model name, got a model", load, timm_swin(), img_size=32)
    refused(
        "the model SwinTransformer is not supported by FusedViT", FusedViT.from_timm, timm_swin()
    )
    theirs = timm_swin()
    theirs.layers[0].blocks[1].shift_size = (1, 1)
    refused(r"a block with shift_size \(1, 1\) .* is not supported by FusedSwin", load, theirs)
    theirs = timm_swin()
    theirs.layers[0].blocks[0].mlp.act = nn.GELU("tanh")
    refused("whose blocks differ in activation", load, theirs)
    refused("the norm RmsNorm is not", load, timm_swin(norm_layer=timm.layers.RmsNorm))


def test_torchvision_refusals():
    load = FusedSwin.from_torchvision
    refused("must be torchvision's SwinTransformer, got Linear", load, nn.Linear(2, 2))
    refused("must be torchvision's SwinTransformer, got VisionTransformer", load, torchvision_vit())
    refused("must be torchvision's SwinTransformer", load, timm_swin())
    theirs = torchvision_swin()
    for name, value, error in (
        ("num_classes", -1, ValueError), ("img_size", "x", TypeError), ("none_such", 1, TypeError)
    ):  # fmt: skip
        arguments = {name: value}
        refused(f"^from_torchvision: the model: .*{name}", load, theirs, error=error, **arguments)
    theirs.features[1][0].attn.window_size = [2, 2]
    refused("whose blocks differ in window_size", load, theirs)


def test_microsoft_refusals():
    load = FusedSwin.from_microsoft
    refused(
        "state_dict must be a dict of tensors, got str .files: from_pretrained.", load, "swin.pth"
    )
    refused("must have Microsoft's names .*, got patch_embed", load, timm_swin().state_dict())
    refused("must have Microsoft's names", load, {"model": {"a": 1}})
    tensors = microsoft_state(timm_swin())
    tensors["absolute_pos_embed"] = torch.zeros(1, 256, 12)
    refused("from_microsoft: the state dict has absolute position embeddings", load, tensors)


@pytest.mark.skipif(**needs_transformers)
def test_huggingface_refusals(tmp_path):
    load = FusedSwin.from_huggingface
    refused("must be transformers' Swin or Swin V2, got Linear", load, nn.Linear(2, 2))
    name = "microsoft/swin-tiny-patch4-window7-224"
    refused("nothing is downloaded", load, name, error=FileNotFoundError)
    refused("model_type must be one of swin, swinv2, got 'vit': use FusedViT", load, huggingface())
    refused(
        "hidden_act must be one of gelu, .* got 'relu'", load, huggingface_swin(hidden_act="relu")
    )
    refused("absolute position embeddings", load, huggingface_swin(use_absolute_embeddings=True))
    dropped = huggingface_swin(hidden_dropout_prob=0.1)
    refused("hidden_dropout_prob 0.1 drops patch embeddings too", load, dropped)
    assert load(dropped, proj_drop_rate=0.1).layers[0].blocks[0].attn.proj_drop.p == 0.1
    refused("not expected: decoder", load, huggingface_swin(1, "ForMaskedImageModeling"))
    uneven = huggingface_swin(2, image_size=[64, 32])
    refused(
        r"window 4 and shift 2 in stage 2, where FusedSwin has \(4, 4\) and \(2, 0\)", load, uneven
    )
    refused("gives window", load, huggingface_swin(2, image_size=72, window_size=5))
    refused("missing norm.weight, norm.bias", load, huggingface_swin(2, "Backbone"))
    theirs = huggingface_swin()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": [2, 2, 3]}))
    refused(r"missing layers\.2\.blocks\.2", load, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "window_size": 5}))
    refused(r"bias_table is \(49, 1\) where \(81, 1\) is expected", load, tmp_path)
