"""The command line: info, demo --quick, and bad usage."""

import csv
import importlib.util
import json
import subprocess
import sys

import pytest

from vitkernels import cli, ops
from vitkernels._dispatch import BACKEND_NAMES

needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("sklearn", "matplotlib", "PIL", "rich")),
    reason="the extra `demo` is not installed",
)


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitkernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def one_line(done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vitkernels: "), done.stderr
    return lines[0]


def test_info_names_every_operator_and_backend(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (*ops.__all__, *BACKEND_NAMES, "torch", "triton", "python", "isa level"):
        assert word in out, word


def test_info_names_what_auto_takes(monkeypatch):
    import torch

    from vitkernels import _native
    from vitkernels.cli.info import choices, sections

    taken = dict(choices(torch.device("cpu")))
    expected = "cpu" if _native.missing["cpu"] is None else "torch"
    assert taken["add_layer_norm"].startswith(expected)
    monkeypatch.setitem(_native.missing, "cpu", "libvitkernels_cpu.so is not built (install g++)")
    monkeypatch.setattr(_native, "build_facts", lambda: None)
    assert dict(choices(torch.device("cpu")))["attention"].startswith("torch")
    found = sections()
    assert ("cpu", "libvitkernels_cpu.so is not built (install g++)") in found["Backends"]
    assert "not built" in dict(found["Native code"])["build facts"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dem"],
        ["demo", "--epochs", "3"],
        ["demo", "--threads", "0"],
        ["demo", "--threads", "two"],
        ["demo", "--seed", "x"],
        ["demo", "--backend", "opencl"],
        ["demo", "--device", "tpu"],
        ["info", "more"],
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("vitkernels: ")


def test_bad_usage_of_the_process():
    done = run("demo", "--threads", "0")
    assert done.returncode == 2
    assert "--threads: must be a positive whole number" in one_line(done)


@needs_demo
def test_demo_refuses_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "thesis.tex")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_demo_with_a_backend_that_is_not_here(capsys, monkeypatch):
    from vitkernels import _native

    monkeypatch.setitem(_native.missing, "cuda", "no NVIDIA GPU is visible to torch")
    if importlib.util.find_spec("rich") is not None:
        assert cli.main(["demo", "--backend", "cuda"]) == 2
        assert "--backend cuda: no NVIDIA GPU is visible" in capsys.readouterr().err


def test_interrupt_is_clean(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("vitkernels.cli.info.print_info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err.strip() == "vitkernels: interrupted"


@needs_demo
def test_report_folder_is_whole_or_absent(tmp_path):
    from vitkernels.cli.demo.report import whole_folder

    out = tmp_path / "report"
    with pytest.raises(RuntimeError), whole_folder(out) as folder:
        (folder / "half.png").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with whole_folder(out) as folder:
            (folder / f"{text}.txt").write_text(text)
    assert [path.name for path in out.iterdir()] == ["second.txt"]
    assert list(tmp_path.iterdir()) == [out]


@needs_demo
def test_quick_demo_writes_the_whole_report(tmp_path):
    from vitkernels.cli.demo.report import FILES

    out = tmp_path / "a report"
    done = run("demo", "--quick", "--threads", 1, "--out", out, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for title in ("1. Handwritten digits", "2. The same", "3. Photographs", "4. Report", "passed"):
        assert title in done.stdout
    table = done.stdout.split("3. Photographs")[1].split("4. Report")[0]
    assert max(map(len, table.splitlines())) <= 80 and "\nswin_tiny_patch4_window7_224\n" in table
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]

    facts = json.loads((out / "report.json").read_text())
    assert facts["passed"] and facts["quick"] and facts["agreement"]["holds"]
    assert facts["agreement"]["difference"] <= facts["agreement"]["allowed"]
    assert len(facts["agreement"]["fused"]) == facts["agreement"]["steps"]
    rows = json.loads((out / "timings.json").read_text())
    assert {(row["model"], row["dtype"], row["contender"]) for row in rows} >= {
        (model, dtype, contender)
        for model in (
            "vit_tiny_patch16_224",
            "deit_tiny_distilled_patch16_224",
            "swin_tiny_patch4_window7_224",
        )
        for dtype in ("fp32", "bf16")
        for contender in ("fused", "stock PyTorch")
    }
    for row in rows:
        assert row["images_per_second"] > 0 and row["peak_mib"] > 0
        assert row["relative_difference"] < (1e-5 if row["dtype"] == "fp32" else 0.1)
    with (out / "timings.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [r["contender"] for r in rows]
    for name in FILES:
        if name.endswith(".png"):
            data = (out / name).read_bytes()
            assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    assert "![rollout](attention_rollout.png)" in (out / "report.md").read_text()


@needs_demo
def test_agreement_is_judged_by_its_rule():
    from vitkernels.cli.demo.agreement import Agreement

    assert Agreement([1.0], [1.00009], [1.0]).holds
    assert not Agreement([1.0], [1.0002], [1.0002]).holds
    assert Agreement([1.0], [1.0002], [1.0003]).holds
    assert not Agreement([float("nan")], [1.0], [1.0]).holds
