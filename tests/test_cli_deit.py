"""The command line on DeiTs: names with and without timm, two heads, weights told apart."""

import pytest
import torch
from cli_material import TINY, predict_json, run, save_photograph
from vit_pairs import needs_timm, randomised

from vitkernels import FusedDeiT
from vitkernels.cli.bench.cost import cost_of
from vitkernels.cli.families import family_of, family_of_weights, plain_family

NAMES = ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224")


def save_deit(folder, **settings):
    torch.manual_seed(4)
    model = randomised(FusedDeiT(**{**TINY, "num_classes": 7, **settings}).eval())
    torch.save({"model": model.state_dict()}, folder / "deit.pth")
    return folder / "deit.pth", model


@pytest.mark.parametrize("name", NAMES)
def test_names_are_known_without_timm(name):
    family = plain_family(name)
    model = family.model.named(name, device="meta")
    assert family.title == "DeiT" and type(model) is FusedDeiT
    assert family_of(model) is family
    assert plain_family(name.replace("16_224", "16_225")) is None


@pytest.mark.skipif(**needs_timm)
def test_models_of_timm_have_the_family_of_their_class():
    import timm

    for name, title in (
        ("deit_tiny_patch16_224", "ViT"),
        ("deit_tiny_distilled_patch16_224", "DeiT"),
    ):
        assert family_of(timm.create_model(name, depth=1)).title == title


def test_weights_with_a_distillation_token_are_a_deit(tmp_path):
    assert family_of_weights(save_deit(tmp_path)[0]).title == "DeiT"
    assert family_of_weights(save_deit(tmp_path, distilled=False)[0]).title == "ViT"


def test_predict_takes_the_mean_of_both_heads(tmp_path, capsys):
    weights, model = save_deit(tmp_path)
    arguments = (save_photograph(tmp_path), "--weights", weights, "--threads", "1")
    (found,) = predict_json(capsys, *arguments)
    with torch.no_grad():  # one head alone says something else
        model.head_dist.weight.copy_(model.head.weight)
        model.head_dist.bias.copy_(model.head.bias)
    torch.save({"model": model.state_dict()}, weights)
    (other,) = predict_json(capsys, *arguments)
    probabilities = [
        sorted((p["class"], p["probability"]) for p in one["predictions"]) for one in (found, other)
    ]
    assert probabilities[0] != probabilities[1]


@pytest.mark.skipif(**needs_timm)
def test_weights_of_another_kind_are_told_apart(tmp_path, capsys):
    weights, _ = save_deit(tmp_path, embed_dim=192, depth=12, patch_size=16, num_heads=3)
    name = "deit_tiny_distilled_patch16_224"
    words = ["predict", save_photograph(tmp_path), "--weights", weights, "--threads", "1"]
    assert run(capsys, *words, "--model", name)[0] == 0
    status, _, err = run(capsys, *words, "--model", "deit_tiny_patch16_224")
    assert status == 2 and "number of distillation tokens is 1 where 0 is expected" in err


@pytest.mark.parametrize("more", [[], ["--rollout"], ["--block", "0"]], ids=str)
def test_attention_map(tmp_path, capsys, more):
    weights, _ = save_deit(tmp_path)
    out = tmp_path / "map.png"
    words = ["attention-map", save_photograph(tmp_path), "--out", out, "--weights", weights]
    status, _, err = run(capsys, *words, "--threads", "1", *more)
    assert status == 0, err
    assert out.stat().st_size > 1000


@pytest.mark.skipif(**needs_timm)
def test_bench_races_timm(tmp_path, capsys):
    words = ["bench", "--model", "deit_tiny_distilled_patch16_224", "--image-size", "32"]
    words += ["--batch", "1", "--seconds", "1", "--forward", "--dtype", "float32", "--no-compile"]
    status, out, err = run(capsys, *words, "--threads", "1")
    assert status == 0, err
    assert "timm" in out and "vitkernels" in out


def test_the_cost_counts_both_heads():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    costs = [cost_of(FusedDeiT(**options, num_classes=9, dist_head=two)) for two in (True, False)]
    assert costs[0].macs - costs[1].macs == 9 * 64
    assert costs[0].activations - costs[1].activations == 9
