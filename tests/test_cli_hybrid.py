"""The command line on hybrid ViTs: check, bench, predict, attention-map."""

import csv

import numpy as np
import pytest
import torch
from cli_material import CLASSES, drawing, photograph, predict_json, run, save_photograph, save_tiny
from hybrid_sources import huggingface_hybrid, jax_hybrid
from vit_pairs import needs_timm, randomised

from vitkernels import FusedHybridViT, FusedViT
from vitkernels.cli import naming
from vitkernels.cli.bench.cost import cost_of
from vitkernels.cli.families import FAMILIES, family_of, family_of_weights
from vitkernels.cli.heat import panels_of
from vitkernels.models.hybrid_names import COMMON
from vitkernels.testing import cases

NAME = "vit_tiny_r_s16_p8_224"
SMALL = ["--image-size", "64", "--threads", "1"]


@pytest.fixture
def tiny(tmp_path):
    """(path, model): the ResNet's stem and two blocks of one head."""
    torch.manual_seed(4)
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": CLASSES}
    model = randomised(FusedHybridViT((), 64, 8, **settings).eval())
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth", model


@pytest.fixture
def two_blocks(monkeypatch):
    """Of timm's models by name, for time."""
    make = naming.make_timm_model
    monkeypatch.setattr(naming, "make_timm_model", lambda n, **more: make(n, depth=2, **more))


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("name", [NAME, "vit_small_r26_s32_224", "vit_base_resnet26d_224"])
def test_check_holds(capsys, two_blocks, name):
    words = ["--model", name, "--batch", 1, "--dtype", "float32", *SMALL]
    status, out, err = run(capsys, "check", *words)
    assert status == 0, out + err
    assert "vitkernels:" not in err and out.rstrip().endswith("holds")
    cases.record("vitkernels check", "auto", "float64, fp32", name)


@pytest.mark.skipif(**needs_timm)
def test_bench_races_timm(tmp_path, capsys, two_blocks):
    words = ["--quick", "--no-compile", "--forward", "--csv", tmp_path / "a.csv"]
    status, out, _ = run(capsys, "bench", "--model", NAME, *SMALL, *words)
    assert status == 0, out
    with (tmp_path / "a.csv").open() as file:
        assert {row["contender"] for row in csv.DictReader(file)} == {"timm", "vitkernels"}


@pytest.mark.parametrize(
    "name, parameters, activations",  # as timm's tables have them
    [(NAME, 6.34, 2.06), ("vit_small_r26_s32_224", 36.43, 9.85),
     ("vit_base_r50_s16_384", 98.95, 135.03)],
)  # fmt: skip
def test_cost_is_that_of_timm_s_tables(name, parameters, activations):
    cost = cost_of(FusedHybridViT.named(name, device="meta", weight_init="skip"))
    assert round(cost.parameters / 1e6, 2) == parameters
    assert round(cost.activations / 1e6, 2) == activations


def test_macs_of_the_backbone():
    model = FusedHybridViT((1,), 32, embed_dim=48, depth=1, num_heads=3, device="meta")
    without = FusedViT(img_size=8, patch_size=1, in_chans=256, embed_dim=48, depth=1, num_heads=3)
    stem = 16 * 16 * 64 * (147 + 5)
    units = 64 * (64 * 64 + 9 * 64 * 64 + 2 * 64 * 256) + 5 * 64 * (64 + 64 + 256 + 256)
    assert cost_of(model).macs - cost_of(without).macs == stem + units


def test_families_and_names():
    hybrid = next(family for family in FAMILIES if family.model is FusedHybridViT)
    assert all(hybrid.plain(name) for name in COMMON) and not hybrid.plain("vit_base_r50_s8_224")
    assert family_of(FusedHybridViT.named(NAME, device="meta", weight_init="skip")) is hybrid
    vit = FusedViT.named("vit_tiny_patch16_224", device="meta", weight_init="skip")
    assert family_of(vit).model is FusedViT


def test_the_family_is_read_off_the_names(tmp_path, tiny):
    path, _ = tiny
    state = FusedHybridViT((1, 1), 32, embed_dim=48, depth=1, num_heads=3).state_dict()
    torch.save(huggingface_hybrid(state), tmp_path / "hf.pth")
    np.savez(tmp_path / "jax.npz", **jax_hybrid(state, 3, "original"))
    for hybrid in (path, tmp_path / "hf.pth", tmp_path / "jax.npz"):
        assert family_of_weights(hybrid).model is FusedHybridViT
    (tmp_path / "vit").mkdir()
    assert family_of_weights(save_tiny(tmp_path / "vit")[0]).model is FusedViT


def test_predict(tmp_path, capsys, tiny):
    path, model = tiny
    image = photograph().resize((64, 64))
    image.save(tmp_path / "small.png")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(64, 64, 3)
    with torch.no_grad():
        expected = model(pixels.permute(2, 0, 1)[None]).softmax(-1)[0]
    words = [tmp_path / "small.png", "--weights", path, "--topk", CLASSES, "--crop-pct", 1]
    (found,) = predict_json(capsys, *words)
    for p in found["predictions"]:
        assert p["probability"] == pytest.approx(expected[p["class"]].item(), abs=1e-5)


def test_attention_map(tmp_path, capsys, tiny):
    path, model = tiny
    photo, out = save_photograph(tmp_path), tmp_path / "map.png"
    words = ["--weights", path, "--block", "1", "--query", "0.4,0.6"]
    status, printed, err = run(capsys, "attention-map", photo, "--out", out, *words)
    assert status == 0 and out.stat().st_size > 1000, err
    assert "1 map of 64x64 pixels" in printed
    x = torch.randn(1, 3, 64, 64)
    (panel,) = panels_of(model, x, drawing(block=0))
    expected = model.attention_maps(x)[0][0].mean(0)[0, 1:].reshape(2, 2)
    assert panel.heat.shape == (2, 2) and torch.allclose(panel.heat, expected)
    assert len(panels_of(model, x, drawing(rollout=True))) == 1


@pytest.mark.skipif(**needs_timm)
def test_weights_over_another_cnn_need_their_name(tmp_path, capsys):
    import timm

    theirs = timm.create_model("vit_base_resnet26d_224", img_size=64, num_classes=CLASSES, depth=12)
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    photo = save_photograph(tmp_path)
    words = [photo, "--weights", tmp_path / "m.pth", *SMALL]
    status, _, err = run(capsys, "predict", *words)
    assert status == 2 and "its backbone is no ResNet of FusedHybridViT" in err
    (found,) = predict_json(capsys, *words, "--model", "vit_base_resnet26d_224")
    assert len(found["predictions"]) == 5


WRONG = {
    "another size": ("vit_small_r26_s32_224", "the CNN is a stem where 2-2-2-2 is expected"),
    "a plain ViT": ("vit_tiny_patch16_224", "is a hybrid .*: name its own --model"),
    "a stride that is none": ("vit_base_r50_s8_224", "unknown model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_are_wrong(tmp_path, capsys, tiny, case):
    import re

    name, sentence = WRONG[case]
    words = [save_photograph(tmp_path), "--weights", tiny[0], "--model", name]
    status, _, err = run(capsys, "predict", *words)
    assert status == 2 and err.count("\n") == 1
    assert re.search(sentence, err), err
