"""vitkernels bench: fair turns, equal outputs before ratios, timm's columns, true memory."""

import csv
import functools
import json

import pytest
import torch
from cli_material import run, tiny_model
from vit_pairs import needs_timm

from vitkernels.cli.bench import contenders, memory, race, report
from vitkernels.cli.bench.cost import cost_of

SMALL = ["--image-size", "32", "--quick", "--threads", "1"]
TIMM_COLUMNS = [
    "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size",
    "param_count", "infer_gmacs", "infer_macts",
]  # fmt: skip


@pytest.mark.skipif(**needs_timm)
def test_the_whole_race(tmp_path, capsys, monkeypatch):
    """Forward and training step, fp32 and bf16; torch.compile with its quickest backend."""
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    words = ["--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json"]
    status, out, _ = run(capsys, "bench", "--model", "vit_tiny_patch16_224", *SMALL, *words)
    assert status == 0, out
    for word in ("forward, fp32", "forward, bf16", "training step, fp32", "bf16 autocast"):
        assert word in out
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:8] == TIMM_COLUMNS
    names = {"timm", "torch.compile(timm)", "vitkernels"}
    assert {(row["contender"], row["dtype"]) for row in rows} == {
        (name, dtype) for name in names for dtype in ("float32", "bfloat16")
    }
    for row in rows:
        assert row["model"] == "vit_tiny_patch16_224" and row["infer_img_size"] == "32"
        for prefix in ("infer", "train"):
            per_second, step = (
                float(row[f"{prefix}_{c}"]) for c in ("samples_per_sec", "step_time")
            )
            assert per_second == pytest.approx(2 / (step / 1000), rel=0.02)
            assert float(row[f"{prefix}_best_step_time"]) <= step
            assert float(row[f"{prefix}_peak_mib"]) >= 0
        assert (float(row["infer_speedup"]) == 1) == (row["contender"] == "vitkernels")
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["results"]) == 4 and record["yardstick"] == "timm"
    for result in record["results"]:
        assert result["equal"]
        best = {entry["name"]: entry["best"] for entry in result["contenders"]}
        for entry in result["contenders"]:
            assert entry["ratio"] == pytest.approx(entry["best"] / best["vitkernels"])


def test_without_timm_it_races_plain_pytorch_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(contenders, "import_timm", lambda: None)
    words = ["--model", "vit_tiny_patch16_32", "--forward", "--no-compile", "--dtype", "float32"]
    status, out, _ = run(capsys, "bench", *words, "--quick", "--threads", "1")
    assert status == 0, out
    assert "plain PyTorch" in out and "timm is not installed" in out and "compile" not in out


@pytest.mark.skipif(**needs_timm)
@pytest.mark.parametrize("direction", ["--forward", "--train"])
def test_no_ratio_for_another_function(capsys, monkeypatch, direction):
    make = contenders.Sources.make

    def faulty(*arguments):
        sources = make(*arguments)
        sources.ours.blocks[3].mlp.fc1.bias.data += 0.01
        return sources

    monkeypatch.setattr(contenders.Sources, "make", staticmethod(faulty))
    words = ["--model", "vit_tiny_patch16_224", direction, "--no-compile", "--dtype", "float32"]
    status, out, _ = run(capsys, "bench", *words, *SMALL)
    assert status == 1 and "DIFFERS" in out and "x\n" not in out


def test_a_ratio_is_the_peers_best_time_over_ours():
    def entry(name, best, excess=0.5):
        return race.Entry(name, best, 2 * best, best, 9, None, None, 0.0, excess)

    case = race.Case(torch.float32, "forward")
    result = race.Result(case, 8, [entry("timm", 0.3), entry("vitkernels", 0.2)])
    assert result.ratio(result.entry("timm")) == pytest.approx(1.5) and result.equal
    result = race.Result(case, 8, [entry("timm", 0.3), entry("vitkernels", 0.2, excess=1.01)])
    assert result.ratio(result.entry("timm")) is None and not result.equal


def test_everyone_gets_the_same_number_of_turns():
    seen = []
    calls = {name: functools.partial(seen.append, name) for name in "abc"}
    samples = race.take_turns(calls, 0.0, 7, torch.device("cpu"))
    assert [len(s) for s in samples.values()] == [7, 7, 7]
    rounds = [seen[i : i + 3] for i in range(3, len(seen), 3)]  # after the warm-up
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(map(tuple, rounds))) > 1


@pytest.mark.parametrize("mebibytes", [8, 100])
def test_peak_memory_is_what_was_held(mebibytes):
    def call():
        big = torch.ones(mebibytes << 18)  # fp32
        half = big[: len(big) // 2] + 1
        del big
        return half.sum()

    call()  # what malloc keeps from it must not hide the next
    found = memory.peak_bytes(call, torch.device("cpu")) / 2**20
    assert found == pytest.approx(1.5 * mebibytes, abs=4)
    assert memory.peak_bytes(lambda: None, torch.device("cpu")) < 2**20


class Attn(torch.nn.Module):
    """Keeps x, once, and the sigmoid of the product; not the weight, and no view of x again."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 7))

    def forward(self, x):
        return (x @ self.weight.mT).sigmoid() * x.sum()


def test_attention_memory_is_what_its_modules_keep():
    model = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.ModuleDict({"attn": Attn()}))
    x = torch.randn(11, 7)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model[1]["attn"](model[0](x).exp()).exp().sum().backward()

    autocast = False
    floats = 11 * 7 + 11 * 5 + 1  # x, the sigmoid, the sum
    assert memory.saved_by_attention(model, call) == 4 * floats
    autocast = True  # everything in 16 bits but exp, which gives x in fp32, too
    kept = memory.saved_by_attention(model, call)
    assert 2 * floats <= kept <= 6 * floats
    assert not any(module._forward_hooks for module in model.modules())


def test_no_high_water_mark_is_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear_refs")
    assert memory.peak_bytes(lambda: None, torch.device("cpu")) is None
    assert "not measured" in memory.method(torch.device("cpu"))


# timm's published tables: GMACs, M activations, M parameters
PUBLISHED = {
    "vit_tiny_patch16_224": (1.26, 5.97, 5.72),
    "vit_small_patch16_224": (4.61, 11.95, 22.05),
    "vit_base_patch16_224": (17.58, 23.9, 86.57),
    "vit_small_patch32_224": (1.15, 2.5, 22.88),
    "deit_tiny_distilled_patch16_224": (1.27, 6.01, 5.91),
    "deit3_small_patch16_224": (4.61, 11.95, 22.06),
    "swin_tiny_patch4_window7_224": (4.51, 17.06, 28.29),
    "swin_base_patch4_window12_384": (47.19, 134.78, 87.9),
    "swin_s3_tiny_224": (4.64, 19.13, 28.33),
    "swinv2_tiny_window16_256": (6.68, 39.02, 28.35),
    "swinv2_base_window12to24_192to384": (55.25, 280.36, 87.92),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_cost_is_timms(name):
    from vitkernels.cli.families import plain_family

    cost = cost_of(plain_family(name).model.named(name, device="meta", weight_init="skip"))
    got = (round(cost.macs / 1e9, 2), round(cost.activations / 1e6, 2), cost.parameters / 1e6)
    macs, activations, parameters = PUBLISHED[name]
    assert got[:2] == pytest.approx((macs, activations), abs=0.011)
    assert got[2] == pytest.approx(parameters, abs=0.01)


def test_training_moves_every_contender_alike():
    """The step is AdamW's, with gradients of this batch only."""
    model = tiny_model().train()
    sources = contenders.Sources(model, model, "plain PyTorch", "torch")
    x, target = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    curves = []
    for c in sources.contenders(torch.float32, True, False, "auto", torch.device("cpu")):
        c.results(x, target, True)  # leaves no gradient behind
        curves.append([c.step(x, target).item() for _ in range(4)])
        assert curves[-1] == sorted(curves[-1], reverse=True) and len(set(curves[-1])) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_columns_have_no_doubles():
    assert len(set(report.COLUMNS)) == len(report.COLUMNS)
