"""`python -m benchmarks.gpu` without a GPU: parts, resuming, failures, the record, the table.

The real parts run on CPU tensors and make no hardware record; the planted one ends in every way.
"""

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time

import planted_part
import pytest
import torch
from gpu_cases import DTYPES, NUMERICS, SMALL
from native_build import ROOT

from benchmarks.gpu import RESULTS, determinism, kernels, sanitize
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.table import table
from vitkernels.evidence import record as records
from vitkernels.evidence import runner as runners
from vitkernels.evidence.outcome import STATUSES
from vitkernels.evidence.record import FACTS, BadRecord, Record, validate
from vitkernels.evidence.shapes import HAS_PATHS, MODULES, PATHS, ROWS, contests
from vitkernels.ops import __all__ as OPERATORS
from vitkernels.testing import available_for

CPU = ["--device", "cpu"]


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """planted(cases, *arguments) -> exit status; planted.log() -> the cases that were started."""
    monkeypatch.setitem(gpu.PARTS, "planted", planted_part)
    monkeypatch.setitem(gpu.PATIENCE, "planted", 20.0)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("PLANTED_LOG", str(tmp_path / "log"))
    (tmp_path / "log").touch()

    class Planted:
        out = tmp_path

        def __call__(self, cases, *arguments):
            monkeypatch.setenv("PLANTED_CASES", cases)
            return gpu.main(["planted", *CPU, "--out", str(tmp_path), *arguments])

        def log(self):
            return (tmp_path / "log").read_text().split()

        def cases(self):
            return read(tmp_path / "emulation-planted.json")["cases"]

    return Planted()


def read(path):
    return validate(json.loads(path.read_text()))


# ---- What becomes of a case


def test_every_way_that_a_case_can_end(planted, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PATIENCE, "planted", 8.0)
    assert planted("good wrong refused lost crash hang memory bug last") == 1
    ends = {name: (case["status"], case.get("why", "")) for name, case in planted.cases().items()}
    assert ends["good"] == ends["last"] == ("passed", "")
    assert ends["wrong"] == ("failed", "not within the error model: max error 2 > 1")
    assert ends["refused"] == ("refused", "it takes bf16")
    assert ends["lost"] == ("failed", "CUDA error: an illegal memory access was encountered")
    assert ends["crash"] == ("failed", "the process died: signal SIGSEGV")
    assert ends["hang"] == ("failed", "no answer within 8 s")
    assert ends["memory"] == ("not run", "out of memory")
    assert ends["bug"] == ("failed", "KeyError: 'name'")
    assert planted.log() == list(planted_part.NAMES)  # each once, whatever became of the worker
    assert planted.cases()["good"]["values"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 5 failed, 1 refused, 1 not run of 9 cases"
    assert "FAILED hang: no answer within 8 s" in lines
    assert "not run (1): out of memory" in lines


def test_finished_cases_are_not_repeated(planted):
    assert planted("good refused wrong") == 1
    assert planted("good refused wrong memory last") == 1
    assert planted.log() == ["good", "refused", "wrong", "memory", "last"]
    assert planted("memory last") == 3  # what did not run is tried again
    assert planted.log()[5:] == ["memory"]


def test_a_killed_run_goes_on_where_it_stopped(planted):
    code = "import sys, planted_part; from benchmarks.gpu import __main__ as gpu; "
    code += "gpu.PARTS['planted'] = planted_part; sys.exit(gpu.main(sys.argv[1:]))"
    arguments = ["planted", *CPU, "--out", str(planted.out)]
    env = os.environ | {"PLANTED_CASES": "good last slow"}
    run = subprocess.Popen([sys.executable, "-c", code, *arguments], env=env, cwd=ROOT)
    deadline = time.monotonic() + 120
    while "slow" not in planted.log() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    statuses = {name: case["status"] for name, case in planted.cases().items()}
    assert statuses == {"good": "passed", "last": "passed", "slow": "not run"}
    assert planted.cases()["slow"]["why"] == records.NEVER
    assert planted("good last") == 0
    assert planted.log() == ["good", "last", "slow"]


def test_an_interrupt_leaves_a_whole_record(planted, monkeypatch, capsys):
    def interrupt(self, name, answer):
        Record.add(self.record, name, answer)
        raise KeyboardInterrupt

    monkeypatch.setattr(runners.Runner, "_enter", interrupt)
    assert planted("good last") == 130
    assert [case["status"] for case in planted.cases().values()] == ["passed", "not run"]
    assert sorted(p.name for p in planted.out.iterdir()) == ["emulation-planted.json", "log"]
    assert "start it again to go on" in capsys.readouterr().err


def test_a_part_that_is_out_of_time_says_what_is_left(planted, capsys):
    assert planted("good last", "--minutes", "1e-9") == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("stopped after 0.0 minutes: the same command goes on")
    assert "not run (2): never started" in lines
    assert planted.log() == []


def test_a_case_under_way_when_the_time_is_up_has_not_failed(planted, monkeypatch):
    monkeypatch.setattr(runners, "GRACE", 0.0)
    monkeypatch.setattr(runners.Runner, "seconds_left", lambda self: 2.0)
    assert planted("good slow last") == 3
    statuses = [case["status"] for case in planted.cases().values()]
    assert statuses == ["passed", "not run", "not run"]
    assert planted.log() == ["good", "slow"]


def test_a_worker_that_cannot_start_ends_the_run(planted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as caught:
        planted("good")
    assert caught.value.code == 2
    assert "the worker process does not start: exit status 1" in capsys.readouterr().err


# ---- The real parts, on CPU tensors


def test_numerics_on_the_emulator_and_the_interpreter(tmp_path, capsys):
    arguments = ["numerics", *CPU, "--out", str(tmp_path), "--only", "add_layer_norm"]
    assert gpu.main(arguments) == 0
    found = read(tmp_path / "emulation-numerics.json")
    assert found["kind"] == "emulation" and found["part"] == "numerics"
    assert set(FACTS) <= set(found["facts"]) and found["facts"]["gpu"] is None
    assert found["facts"]["torch"] == torch.__version__ and found["facts"]["date"].startswith("20")
    assert set(found["cases"]) == set(SMALL)  # all that is planned, run or not
    ran = {n: c for n, c in found["cases"].items() if c["status"] == "passed"}
    assert ran and all(n.startswith("add_layer_norm ") for n in ran)
    assert {c["backend"] for c in ran.values()} <= {"cuda", "triton"}
    out = capsys.readouterr().out
    assert "numerics: NO GPU" in out and out.splitlines()[-1].endswith(f"of {len(SMALL)} cases")


def test_determinism_and_kernels_in_one_command(tmp_path, capsys):
    only = "add_layer_norm vit_base bf16 forward+backward"
    assert gpu.main(["kernels", *CPU, "--out", str(tmp_path), "--only", only]) == 0
    case = read(tmp_path / "emulation-kernels.json")["cases"][only]
    assert case["regime"] == "forward+backward 16-bit C<=256"
    assert {"torch", "eager"} <= set(case["seconds"]) and case["passed"]
    assert set(case["passed"]) <= set(case["seconds"])
    assert case["floor_seconds"] > 0 and case["copy_bytes_per_second"] > 0
    line = next(x for x in capsys.readouterr().out.splitlines()[2:] if x.startswith(only))
    assert line.count("x") >= 2 and "%" in line
    only = "add_layer_norm triton"
    arguments = ["determinism", "kernels", *CPU, "--out", str(tmp_path), "--only", only]
    with pytest.raises(SystemExit) as caught:
        gpu.main(arguments)
    assert caught.value.code == 2
    assert "--only: no case of kernels has" in capsys.readouterr().err
    assert gpu.main(["determinism", *arguments[2:]]) == 3
    cases = read(tmp_path / "emulation-determinism.json")["cases"]
    mine = {n: c for n, c in cases.items() if n.startswith(only)}
    assert len(mine) == len(determinism.KINDS)
    assert {c["why"] for c in mine.values() if "why" in c} == {"it needs an NVIDIA GPU"}


def test_a_scalar_loss_of_more_rows_is_that_of_its_last_ones(monkeypatch):
    """The form of the check beyond 2^31 elements, on few rows; and a kernel whose index wraps."""
    monkeypatch.setitem(determinism.LARGE, "distillation_loss", (64, 40))
    row = next(row for row in ROWS if row.op == "distillation_loss")
    of = "distillation_loss", row
    for backend in available_for("distillation_loss"):
        assert determinism.large_loss(*of, backend, "cpu") == {"elements": 64 * 40}

    resized = determinism._resized

    def wrapping(row, shape, device):
        subject = resized(row, shape, device)
        right = subject.ours("reference")

        def wrong(*tensors):
            return right(*(t[torch.arange(len(t)) % 32] for t in tensors))

        return dataclasses.replace(subject, ours=lambda backend: wrong)

    monkeypatch.setattr(determinism, "_resized", wrapping)
    with pytest.raises(AssertionError, match=r"beyond 2\^31 elements"):
        determinism.large_loss(*of, "reference", "cpu")


def test_a_wrong_kernel_fails_its_contest_and_is_not_timed(monkeypatch):
    from vitkernels.evidence import contest as contest_module
    from vitkernels.evidence.clock import Limits
    from vitkernels.evidence.shapes import contest_named

    ours = contest_module.ours

    def planted(subject, paths):
        found = ours(subject, paths)
        right = found["triton"].function
        wrong = contest_module.Way(lambda *x: tuple(1.01 * t for t in right(*x)), ours=True)
        return found | {"triton": wrong}

    monkeypatch.setattr(contest_module, "ours", planted)
    contest = contest_named("add_layer_norm vit_base fp32 forward")
    limits = Limits(1e9, {"16-bit": 1e9, "fp32": 1e9})
    outcome = contest_module.run_contest(contest, torch.device("cpu"), limits, seconds=0.0)
    assert outcome.status == "failed" and outcome.why.startswith("triton: not within the error")
    assert "triton" not in outcome.facts["seconds"] and "triton" not in outcome.facts["passed"]
    assert outcome.facts["unfit"]["triton"]["status"] == "failed"
    assert "torch" in outcome.facts["seconds"]


def test_models(tmp_path, capsys):
    assert gpu.main(["models", *CPU, "--out", str(tmp_path)]) == 0
    (case,) = read(tmp_path / "emulation-models.json")["cases"].values()
    assert case["seconds_of"]["vitkernels"] > 0 and len(case["seconds_of"]) > 1
    assert "images/s" in capsys.readouterr().out


# ---- The sanitizer


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """On PATH; it answers for the worker, and reports a batch with "sm80" in it under memcheck."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "compute-sanitizer"
    script.write_text(
        f"""#!{sys.executable}
import json, sys
log, cases = sys.argv[sys.argv.index("--log-file") + 1], sys.stdin.read().splitlines()
print(json.dumps({{"ready": True}}))
for case in cases:
    status = "failed" if "linear_gelu" in case else "passed"
    print(json.dumps({{"status": status, "why": "wrong"}}))
if any("sm80" in case for case in cases) and "memcheck" in sys.argv:
    open(log, "w").write("========= COMPUTE-SANITIZER\\n========= Invalid __global__ write\\n")
    sys.exit({sanitize.DIRTY})
"""
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return script


def test_the_sanitizer_finds_who_is_to_blame(fake_sanitizer, tmp_path):
    assert sanitize.sanitizer() == str(fake_sanitizer)
    assert gpu.main(["sanitize", *CPU, "--out", str(tmp_path)]) == 1
    cases = read(tmp_path / "emulation-sanitize.json")["cases"]
    assert set(cases) == {f"{tool} {case}" for tool in sanitize.TOOLS for case in SMALL}
    for name, case in cases.items():
        dirty = name.startswith("memcheck") and "sm80" in name
        assert case["status"] == ("failed" if dirty or "linear_gelu" in name else "passed"), name
        if dirty and "linear_gelu" not in name:
            assert case["why"] == "Invalid __global__ write"
        assert case["op"] in MODULES and case["backend"] in ("cuda", "triton")


def test_a_batch_runs_in_the_worker(fake_sanitizer, tmp_path, monkeypatch):
    """The command after the tool's options is the worker; nothing stands between here."""
    fake_sanitizer.write_text('#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\nshift 2\n')
    with fake_sanitizer.open("a") as script:
        script.write('exec "$@"\n')
    arguments = ["sanitize", *CPU, "--out", str(tmp_path), "--only", "synccheck layer_norm_add"]
    assert gpu.main(arguments) == 0


def test_without_a_sanitizer_the_part_has_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert gpu.main(["sanitize", *CPU, "--out", str(tmp_path)]) == 3
    cases = read(tmp_path / "emulation-sanitize.json")["cases"]
    assert {case["status"] for case in cases.values()} == {"not run"}
    lines = capsys.readouterr().out.splitlines()
    missing = [line for line in lines if "neither on PATH nor in CUDA_HOME" in line]
    assert len(missing) == 2  # said, and summed
    assert lines[-1].startswith("0 passed")


# ---- Bad usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the following arguments are required: PART"),
        (
            "numeric",
            "PART must be of numerics, determinism, sanitize, kernels, models, got numeric",
        ),
        ("numerics --minutes 0", "--minutes: must be above 0, got 0"),
        ("numerics --minutes long", "--minutes: invalid float value"),
        ("numerics --device cpu", "--device cpu: name a folder by --out"),
        ("numerics --device cpu --out absent", "the folder absent does not exist: mkdir -p absent"),
        (f"numerics --device cpu --out {RESULTS}", "takes nothing of --device cpu"),
        ("numerics --device cpu --out . --only zzz", "no case of numerics has 'zzz' in its name"),
        ("numerics --device cpu --out torn", "torn/emulation-numerics.json is not a record"),
    ],
)
def test_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "emulation-numerics.json").write_text('{"format": 1, "cases"')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        gpu.main(arguments.split())
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["numerics"])
    assert caught.value.code == 2
    assert "no NVIDIA GPU is visible to torch" in capsys.readouterr().err


# ---- The record, and the lists of cases


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 1"),
        ({"kind": "dream"}, "kind must be"),
        ({"part": None}, "part must be"),
        ({"facts": {"gpu": "H200"}}, "facts must have compute_capability"),
        ({"cases": {"a": {"status": "fine"}}}, "case 'a' has no status"),
        ({"kind": "hardware"}, "compute_capability is None"),
    ],
)
def test_what_is_no_record(change, said):
    good = {"format": 1, "kind": "emulation", "part": "numerics", "facts": dict.fromkeys(FACTS)}
    good["cases"] = {}
    assert validate(good) is good
    with pytest.raises(BadRecord, match=said):
        validate(good | change)


def test_a_record_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    records.write_whole(path, "old")

    def torn(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", torn)
    with pytest.raises(KeyboardInterrupt):
        records.write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_lists_cover_every_operator_and_path():
    operators = {op for op in OPERATORS if op != "attention_weights"}
    assert set(MODULES) == set(determinism.LARGE) == operators
    for cases in (NUMERICS, SMALL):
        of_op = {op: {(c.backend, c.path) for c in cases.values() if c.op == op} for op in MODULES}
        for op, found in of_op.items():
            paths = PATHS if op in HAS_PATHS else ("",)
            assert found == {*(("cuda", path) for path in paths), ("triton", "")}, op
    assert len(NUMERICS) > 1500 and len(SMALL) >= 40
    assert {c.row.op for c in contests()} == operators
    assert len(kernels.names("cuda")) == len(set(kernels.names("cuda"))) > 60
    assert {c.dtype for c in NUMERICS.values()} == set(DTYPES)


def test_the_table_of_a_record_has_every_status():
    record = Record(None, "emulation", "numerics", dict.fromkeys(FACTS))
    for status in STATUSES:
        record.cases[status] = planted_part.facts_of("") | {"status": status, "why": status}
    lines = table(record).splitlines()
    assert lines[2].split() == ["add_layer_norm", "cuda", "1", "1", "1", "1"]
    assert lines[-1] == "1 passed, 1 failed, 1 refused, 1 not run of 4 cases"
