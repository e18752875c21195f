"""timm's, transformers' and the original repository's DeiT checkpoints -> FusedDeiT."""

import copy
import json
from pathlib import Path

import pytest
import torch
from checkpoint_pairs import Plain, needs_transformers, quietly, refused
from deit_pairs import CONFIGS, HUGGINGFACE, huggingface_deit, images, timm_deit
from safetensors.torch import save_file
from test_checkpoints_huggingface import on_disk, their_results
from vit_pairs import logits_and_grads, needs_timm, relative_errors, same

from vitkernels import FusedDeiT, FusedViT, use_backend
from vitkernels.testing import cases

pytestmark = [pytest.mark.skipif(**needs_timm), pytest.mark.skipif(**needs_transformers)]
IMAGENET_MEAN = pytest.approx([0.485, 0.456, 0.406])
HEADS = {"num_heads": 3}  # the usual 64 channels a head do not fit the tiny ones


# ---- timm, and the original repository


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("gray_not_square", "clip_norms")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_timm(name, suffix, tmp_path):
    theirs, x, path = timm_deit(name), images(name), tmp_path / f"m{suffix}"
    save = torch.save if suffix == ".pth" else save_file
    save(theirs.state_dict(), path)
    dynamic = {"dynamic_img_size": True} if name == "dynamic_size" else {}
    ours = FusedDeiT.from_pretrained(path, **HEADS, **dynamic)
    assert not ours.training and ours.distilled == ("dist_token" in theirs.state_dict())
    assert ours.patch_embed.mean.tolist() == IMAGENET_MEAN
    same({"y": ours(x)}, {"y": theirs(x)})
    assert list(ours.to_timm_state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.to_timm_state_dict(), strict=True)


@pytest.mark.parametrize("name", ["distilled", "deit", "deit3"])
def test_files_of_the_original_repository(name, tmp_path):
    """{"model": ...}, and LayerScale as gamma_1 and gamma_2."""
    theirs, x = timm_deit(name), images(name)
    state = {
        key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): tensor
        for key, tensor in theirs.state_dict().items()
    }
    assert ("blocks.0.gamma_1" in state) == (name == "deit3")
    torch.save({"model": state}, tmp_path / "deit.pth")
    ours = FusedDeiT.from_pretrained(tmp_path / "deit.pth", **HEADS)
    assert ours.no_embed_class == (name == "deit3")
    same({"y": ours(x)}, {"y": theirs(x)})


def test_a_folder_of_timm_s_hub(tmp_path):
    theirs, x = timm_deit(), images()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "deit_tiny_distilled_patch16_224",
        "global_pool": "token",
        "model_args": HEADS,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FusedDeiT.from_pretrained(tmp_path)
    assert ours.patch_embed.std.tolist() == pytest.approx([0.4, 0.5, 0.6])
    same({"y": ours(x)}, {"y": theirs(x)})


def test_another_size_and_other_classes(tmp_path):
    """Positions are resampled without the two tokens'; both heads are fresh, of small weights."""
    theirs = timm_deit()
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    ours = FusedDeiT.from_pretrained(tmp_path / "m.pth", **HEADS, img_size=48)
    theirs.set_input_size(img_size=48)
    x = torch.randn(1, 3, 48, 48)
    same({"y": ours(x)}, {"y": theirs(x)})
    ours = FusedDeiT.from_pretrained(tmp_path / "m.pth", **HEADS, num_classes=4)
    for head in ours.get_classifier():
        assert head.weight.shape == (4, 48) and 0.01 < head.weight.std() < 0.03
        assert not head.bias.any()
    gray = FusedDeiT.from_pretrained(tmp_path / "m.pth", **HEADS, in_chans=1)
    assert gray(torch.randn(1, 1, 32, 32)).shape == (1, 10)


def test_bf16_files_and_a_named_dtype(tmp_path):
    torch.save(timm_deit().bfloat16().state_dict(), tmp_path / "m.pth")
    assert FusedDeiT.from_pretrained(tmp_path / "m.pth", **HEADS).dist_token.dtype == torch.bfloat16
    ours = FusedDeiT.from_pretrained(tmp_path / "m.pth", **HEADS, dtype=torch.float64)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}


# ---- transformers


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_logits_and_gradients_of_transformers(name):
    theirs, x = huggingface_deit(name), images()
    options = {"num_classes": 0} if name == "model" else {}
    ours = quietly(FusedDeiT.from_huggingface, theirs, **options)
    assert ours.dist_head == (name != "one_head")
    if name == "model":  # no head: what comes out is the two tokens' mean
        tokens = theirs(x).last_hidden_state
        same({"y": ours(x)}, {"y": (tokens[:, 0] + tokens[:, 1]) / 2})
        return
    base, got = their_results(theirs, x), logits_and_grads(ours, x)
    theirs = copy.deepcopy(theirs).double()
    truth = their_results(theirs, x.double())
    with use_backend("reference"):
        exact = logits_and_grads(quietly(FusedDeiT.from_huggingface, theirs), x.double())
    assert exact.keys() == truth.keys()
    errors = relative_errors(exact, truth)
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:3]
    base, errors = relative_errors(base, truth), relative_errors(got, truth)
    for key, error in errors.items():
        assert error <= max(2 * base[key], 1e-6), f"{key}: {error:.3g}, theirs {base[key]:.3g}"
    cases.record("from_huggingface", "auto", torch.float32, f"deit {name}")


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_folders_as_save_pretrained_writes_them(name, tmp_path):
    theirs, x = huggingface_deit(name), images()
    theirs.save_pretrained(tmp_path)
    expected = quietly(FusedDeiT.from_huggingface, theirs)(x)
    for load in (FusedDeiT.from_huggingface, FusedDeiT.from_pretrained):
        assert torch.equal(quietly(load, tmp_path)(x), expected)


@pytest.mark.parametrize("version", [4, 5])
def test_names_of_both_versions(version, tmp_path):
    theirs, x = huggingface_deit(), images()
    state = {on_disk(k) if version == 4 else k: v for k, v in theirs.state_dict().items()}
    assert any(".encoder.layer.0.attention.attention.query." in k for k in state) == (version == 4)
    theirs.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    same({"y": FusedDeiT.from_huggingface(tmp_path)(x)}, {"y": Plain(theirs)(x)})


def test_a_bare_file_takes_the_default_eps(tmp_path):
    theirs, x = huggingface_deit(), images()
    theirs.save_pretrained(tmp_path)
    ours = FusedDeiT.from_pretrained(tmp_path / "model.safetensors", **HEADS)
    assert ours.blocks[0].norm1.eps == ours.norm.eps == 1e-12
    assert ours.patch_embed.mean.tolist() == IMAGENET_MEAN
    assert torch.equal(ours(x), FusedDeiT.from_huggingface(theirs)(x))


# ---- What does not fit


def saved(state, folder) -> Path:
    torch.save(state, folder / "m.pth")
    return folder / "m.pth"


def test_the_class_that_loads_a_checkpoint_is_named(tmp_path):
    path = saved(timm_deit().state_dict(), tmp_path)
    refused(
        "is a distilled DeiT, .*: use FusedDeiT.from_pretrained$", FusedViT.from_pretrained, path
    )
    huggingface_deit().save_pretrained(tmp_path / "folder")
    for load in (FusedViT.from_huggingface, FusedViT.from_pretrained):
        refused("got 'deit': use FusedDeiT$", load, tmp_path / "folder")
    path = saved({"layers.0.blocks.0.norm1.weight": torch.zeros(3)}, tmp_path)
    refused("a Swin .*: use FusedSwin.from_pretrained$", FusedDeiT.from_pretrained, path)
    path = saved({"features.0.weight": torch.zeros(3)}, tmp_path)
    refused("must have the names of a DeiT of timm", FusedDeiT.from_pretrained, path)


DAMAGE = {
    "lost token": (lambda s: s.pop("cls_token"), "does not fit FusedDeiT: missing cls_token"),
    "lost head": (lambda s: s.pop("head.weight"), "not expected: head.bias|missing head"),
    "short positions": (
        lambda s: s.update(pos_embed=s["pos_embed"][:, :-1]),
        "positions are no square grid|pos_embed is",
    ),
    "narrow distillation head": (
        lambda s: s.update({"head_dist.weight": s["head_dist.weight"][:, :-1]}),
        r"head_dist.weight is \(10, 47\) where \(10, 48\) is expected",
    ),
    "token of another width": (
        lambda s: s.update(dist_token=s["dist_token"][..., :-1]),
        r"dist_token is \(1, 1, 47\) where \(1, 1, 48\) is expected",
    ),
    "whole numbers": (
        lambda s: s.update(dist_token=s["dist_token"].long()),
        "dist_token is torch.int64 where a floating dtype is expected",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoints_are_one_sentence(what, tmp_path):
    state = dict(timm_deit().state_dict())
    damage, sentence = DAMAGE[what]
    damage(state)
    refused(sentence, FusedDeiT.from_pretrained, saved(state, tmp_path), **HEADS)
