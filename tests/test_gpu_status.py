"""README and dispatch tables from the records; `vitkernels tune`; a library built elsewhere."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from gpu_records import REGIME, checked, contest, record
from native_build import ROOT

from benchmarks.gpu import RESULTS, status
from vitkernels import _dispatch
from vitkernels.cli import main
from vitkernels.evidence import tune
from vitkernels.evidence.record import BadRecord, read_folder
from vitkernels.evidence.shapes import MODULES, contests
from vitkernels.evidence.verdicts import dispatch_records


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "vitkernels" / "records.json"
    path.parent.mkdir()
    return path


# ---- The README


def test_the_readme_says_what_the_records_say():
    text = (ROOT / "README.md").read_text()
    assert text == status.in_readme(text, status.status_table(read_folder(RESULTS)))


def test_the_shipped_dispatch_tables_are_those_of_the_records():
    folder = ROOT / "vitkernels" / "records"
    shipped = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    tables = dispatch_records(read_folder(RESULTS))
    assert {arch: t for file in shipped for arch, t in file.items()} == tables


def test_what_never_ran_says_so():
    table = status.status_table([])
    assert table.count(status.NEVER) == 2
    for op in MODULES:
        assert f"`{op}`" in table
    # One operator ran; the others still say that they have not.
    ran = record("numerics", {"x": checked(), "y": checked("not run"), "z": checked("refused")})
    rows = {row.split("|")[2].strip(): row for row in status.status_table([ran]).splitlines()[2:]}
    assert (
        "numerics 1 of 2, determinism not run, sanitize not run, not timed" in rows["`attention`"]
    )
    others = [row for ops_, row in rows.items() if ops_ != "`attention`"]
    assert all(status.NEVER in row for row in others) and len(others) == 2


def test_the_status_of_a_kernel_that_ran():
    failed = record("numerics", {"x": checked(), "y": checked("failed", regimes=[REGIME])})
    times = record("kernels", {"a": contest(cuda=1.0, triton=1.0, torch=2.0)})
    clean = record("sanitize", {"x": checked()})
    rows = status.status_table([failed, times, clean]).splitlines()
    cuda = next(row for row in rows if row.startswith("| CUDA C++ | `attention` |"))
    assert "NVIDIA H200 (sm_90), 2026-12-01: numerics 1 of 2 (1 FAILED)" in cuda
    assert "sanitize 1 of 1, wins in 0 of 1 regimes" in cuda
    triton = next(row for row in rows if row.startswith("| Triton | `attention` |"))
    assert "numerics not run" in triton and "wins in 1 of 1 regimes" in triton


def test_status_writes_readme_and_tables(tmp_path, capsys):
    (tmp_path / "vitkernels").mkdir()
    (tmp_path / "README.md").write_text(f"head\n{status.BEGIN}\nold\n{status.END}\ntail\n")
    found = [record("kernels", {"a": contest(cuda=1.0, torch=2.0)})]
    status.write(tmp_path, status.status_table(found), dispatch_records(found))
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text and "wins in 1 of 1 regimes" in text
    assert text.startswith("head\n") and text.endswith("tail\n")
    table = json.loads((tmp_path / "vitkernels" / "records" / "sm_90.json").read_text())
    assert _dispatch.merged([table]) == {"sm_90": {"attention": {REGIME: "cuda"}}}
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(BadRecord, match=r"README\.md has no"):
        status.write(tmp_path, "", {})
    assert status.main(["--out", str(tmp_path / "absent")]) == 2
    (tmp_path / "gpu-x.json").write_text("{")
    assert status.main(["--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "is not a record that can be read" in err[1]


# ---- vitkernels tune


def test_tune_checks_and_times_and_keeps_nothing_of_a_cpu(user_file, capsys):
    assert main(["tune", "--device", "cpu", "--only", "add_layer_norm vit_tiny bf16"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        "passed   add_layer_norm vit_tiny bf16 forward",
        "passed   add_layer_norm vit_tiny bf16 forward+backward",
    ]
    assert out[-1] == "no GPU: nothing is kept"
    assert not user_file.exists()


def test_what_tune_keeps_auto_uses(user_file):
    ours = dispatch_records([record("tune", {"a": contest(cuda=1.0, torch=2.0)})])
    older = dispatch_records([record("tune", {"a": contest(triton=1.0, torch=2.0)}, arch="sm_80")])
    tune.keep(older)
    assert tune.keep(ours) == user_file
    loaded = _dispatch._load_records()
    assert loaded["sm_90"]["attention"][REGIME] == "cuda"
    assert loaded["sm_80"]["attention"][REGIME] == "triton"
    user_file.write_text("{torn")
    with pytest.warns(UserWarning, match="was unreadable and is replaced"):
        tune.keep(ours)
    assert json.loads(user_file.read_text()) == ours
    assert [path.name for path in user_file.parent.iterdir()] == ["records.json"]


def test_an_interrupted_tune_leaves_nothing_half_written(user_file):
    """Ctrl-C while the first call is checked: what was kept before is still all there is."""
    user_file.write_text("{}\n")
    command = [sys.executable, "-m", "vitkernels", "tune", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ.copy(), **pipes)
    assert "passed" in run.stdout.readline()
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.strip() == "vitkernels: interrupted"
    assert user_file.read_text() == "{}\n" and list(user_file.parent.iterdir()) == [user_file]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--minutes 0", "--minutes: must be a positive whole number"),
        ("--device cpu --only zzz", "no call has 'zzz' in its name"),
        ("--fast", "unrecognized arguments: --fast"),
        ("", "no NVIDIA GPU is visible to torch"),
    ],
)
def test_tune_refuses_in_one_line(arguments, said, capsys):
    if not arguments and torch.cuda.is_available():
        pytest.skip("a GPU is visible here")
    assert main(["tune", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_tune_takes_16_bit_first_and_every_operator():
    chosen = list(contests(tune_only=True))
    dtypes = [c.dtype for c in chosen]
    assert dtypes == sorted(dtypes, key=lambda d: d == torch.float32)
    assert {c.row.op for c in chosen} >= set(MODULES) - {"linear"}


# ---- A library built elsewhere


@pytest.mark.parametrize(("emulate", "name"), [("0", "cuda"), ("1", "emu")])
def test_library_built_elsewhere(emulate, name, tmp_path):
    """The CUDA library, or the emulator where that stands in for it; no other."""
    path = tmp_path / "elsewhere.so"
    code = f"from vitkernels import _native as n; print(n.library_path('vitkernels_{name}')); "
    code += f"print(n._load('vitkernels_{name}', '')); "
    code += "print(n.library_path('vitkernels_cpu').parent)"
    env = os.environ | {"VITKERNELS_CUDA_LIBRARY": str(path), "VITKERNELS_EMULATE": emulate}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    where, reason, cpu = done.stdout.splitlines()
    assert where == str(path)
    assert reason == f"VITKERNELS_CUDA_LIBRARY: {path} does not exist"
    assert cpu.endswith("lib")
