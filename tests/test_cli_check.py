"""vitkernels check: it holds for our model, and it tells when something is wrong."""

import math

import pytest
import torch
from cli_material import run
from vit_pairs import needs_timm

from vitkernels.cli import check
from vitkernels.testing import cases

pytestmark = pytest.mark.skipif(**needs_timm)

SMALL = ["--image-size", "32", "--batch", "2", "--threads", "1"]
NAMES = {
    "vit_tiny_patch16_224": [],
    "vit_small_patch14_reg4_dinov2": ["--image-size", "28"],  # LayerScale and registers
    "deit3_small_patch16_224": [],  # no position on the class token
    "deit_tiny_distilled_patch16_224": [],  # two heads
    "vit_xsmall_patch16_clip_224": ["--dtype", "float32"],  # pre-norm
}


@pytest.mark.parametrize("name", NAMES)
def test_it_holds(capsys, name):
    status, out, err = run(capsys, "check", "--model", name, *SMALL, *NAMES[name])
    assert status == 0, out + err
    assert "vitkernels:" not in err and out.rstrip().endswith("holds")
    rows = [line for line in out.splitlines() if line.rstrip().endswith("holds")][:-1]
    dtypes = 2 if "float32" in NAMES[name] else 3
    assert len(rows) == dtypes and rows[0].lstrip().startswith("fp64 ")
    cases.record("vitkernels check", "auto", "float64, fp32, bf16", name)


def test_weights_and_a_head_of_their_own(tmp_path, capsys):
    from vitkernels import FusedViT

    model = FusedViT.named("vit_tiny_patch16_32", num_classes=11)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    words = ["--model", "vit_tiny_patch16_224", "--weights", tmp_path / "w.pth", *SMALL]
    status, out, err = run(capsys, "check", *words, "--dtype", "float32")
    assert status == 0, out + err
    assert "w.pth" in out


def test_logits_only(capsys):
    words = ["--model", "vit_tiny_patch16_224", "--no-all-gradients", "--dtype", "bfloat16", *SMALL]
    status, out, _ = run(capsys, "check", *words)
    assert status == 0
    assert "logits" in out and "blocks" not in out


FAULTS = {
    "a weight of ours": lambda ours: ours.blocks[3].mlp.fc2.weight.data[5].mul_(1.01),
    "a wrong eps": lambda ours: setattr(ours.blocks[2].norm1, "eps", 1e-5),
    "tanh GELU": lambda ours: setattr(ours.blocks[1].mlp, "act", torch.nn.GELU("tanh")),
    "a lost scale": lambda ours: setattr(ours.blocks[4].attn, "scale", 0.2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(capsys, monkeypatch, fault):
    make_pair = check.make_pair

    def faulty(options):
        theirs, ours = make_pair(options)
        FAULTS[fault](ours)
        return theirs, ours

    monkeypatch.setattr(check, "make_pair", faulty)
    status, out, _ = run(capsys, "check", "--model", "vit_tiny_patch16_224", *SMALL)
    assert status == 1 and "DOES NOT HOLD" in out and "FAILS" in out


def test_errors_are_relative_and_never_hide_a_nan():
    truth = {"logits": torch.tensor([3.0, 4.0]), "small": torch.tensor([1e-9, 0.0])}
    got = {"logits": torch.tensor([3.0, 4.5]), "small": torch.tensor([2e-9, 0.0])}
    found = check.errors(got, {key: value.double() for key, value in truth.items()})
    assert found["logits"] == pytest.approx(0.1) and found["small"] < 1e-6
    assert math.isinf(check.errors({"logits": torch.tensor([math.nan, 1.0])}, truth)["logits"])
    assert math.isinf(check.errors({}, truth)["logits"]), "a missing gradient"
    assert math.isinf(check.errors({**got, "more": truth["small"]}, truth)["more"])


def test_small_by_luck():
    """One block's single number may be nearer to the truth than such numbers are."""
    base = {"logits": 1e-6, "0.scale": 1e-9, "1.scale": 2e-6, "2.scale": 3e-6}
    assert check.excess(torch.float32, {**base, "0.scale": 3.9e-6}, base) <= 1
    assert check.excess(torch.float32, {**base, "0.scale": 4.1e-6}, base) > 1
    assert check.excess(torch.float32, {**base, "2.scale": 5.9e-6}, base) <= 1


ONE = {"logits": 1e-2, "v": 1e-2, "w": 1e-2}


@pytest.mark.parametrize(
    "dtype, mine, base, holds",
    [
        (torch.float32, {"logits": 2e-7, "w": 1.9e-6}, {"logits": 1e-7, "w": 1e-6}, True),
        (torch.float32, {"logits": 2e-7, "w": 2.1e-6}, {"logits": 1e-7, "w": 1e-6}, False),
        (torch.float32, {"logits": 9e-7, "w": 1e-7}, {"logits": 1e-9, "w": 1e-9}, True),  # floor
        (torch.float32, {"logits": 1.1e-6, "w": 1e-7}, {"logits": 1e-9, "w": 1e-9}, False),
        (torch.bfloat16, {"logits": 1e-2, "w": 1e-2}, {"logits": 1e-2, "w": 1e-2}, True),
        (torch.bfloat16, {"logits": 2.1e-2, "w": 1e-2}, {"logits": 1e-2, "w": 1e-2}, False),
        (torch.bfloat16, {**ONE, "w": 1.9e-2}, ONE, True),
        (torch.bfloat16, {**ONE, "w": 2.1e-2}, ONE, False),
        (torch.bfloat16, dict.fromkeys(ONE, 1.15e-2), ONE, False),
        (torch.float32, {"logits": math.inf, "w": 0.0}, {"logits": 1e-7, "w": 1e-6}, False),
    ],
)  # fmt: skip
def test_the_rule(dtype, mine, base, holds):
    assert (check.excess(dtype, mine, base) <= 1) == holds
    assert check.fused_finding(dtype, mine, base).holds == holds
