"""From hardware records to what `auto` takes: verdicts, files, regimes."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from every_op import OPS, RAW, RawCalls, small_problem
from gpu_cases import regimes
from gpu_records import REGIME, checked, contest, record
from native_build import ROOT
from torch._subclasses import FakeTensorMode

from benchmarks.gpu import RESULTS
from vitkernels import _dispatch, _native, _regimes, ops, testing
from vitkernels._dispatch import choose
from vitkernels.evidence.record import read_folder
from vitkernels.evidence.shapes import MODULES, ROWS
from vitkernels.evidence.verdicts import dispatch_records
from vitkernels.ops.attention.op import BACKENDS

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture
def hopper(monkeypatch):
    """As on a machine with an H200 and every library."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_native, "missing", dict.fromkeys(_dispatch.BACKEND_NAMES))
    on_device = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
    monkeypatch.setattr(_native, "devices", {**_native.devices, **on_device})
    monkeypatch.setattr(_dispatch, "_hinted", True)


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "vitkernels" / "records.json"
    path.parent.mkdir()
    return path


def entry_of(*found):
    return dispatch_records(found)["sm_90"]["operators"]["attention"][REGIME]


# ---- Verdicts: passed, and won


def test_the_fastest_that_beats_stock_wins():
    entry = entry_of(record("kernels", {"a": contest(cuda=1.0, triton=2.0, torch=3.0, eager=0.5)}))
    assert entry["backend"] == "cuda"
    assert entry["times_faster_than_stock"] == {"cuda": 3.0, "triton": 1.5}


def test_one_that_is_slower_or_hardly_faster_does_not():
    assert entry_of(record("kernels", {"a": contest(cuda=1.0, torch=0.9)}))["backend"] is None
    assert entry_of(record("kernels", {"a": contest(cuda=1.0, torch=1.01)}))["backend"] is None


def test_every_contest_of_a_regime_counts():
    cases = {"a": contest(cuda=1.0, triton=1.0, torch=4.0), "b": contest(triton=1.0, torch=1.0)}
    entry = entry_of(record("kernels", cases))
    assert entry["backend"] == "triton" and entry["times_faster_than_stock"] == {"triton": 2.0}
    assert entry["why"]["cuda"] == "not timed"


def test_a_failed_check_bars_the_kernel_from_its_regime():
    unfit = {"cuda sm80": {"status": "failed", "why": "RMSE"}}
    cases = {"a": contest(cuda=1.0, triton=2.0, torch=3.0, unfit=unfit)}
    cases["other"] = contest(regime="forward fp32 N<=272 D<=64", cuda=1.0, torch=3.0)
    found = dispatch_records([record("kernels", cases)])["sm_90"]["operators"]["attention"]
    assert found[REGIME]["backend"] == "triton"
    assert found[REGIME]["why"] == {"cuda": "a check failed"}
    assert found["forward fp32 N<=272 D<=64"]["backend"] == "cuda"


@pytest.mark.parametrize("part", ["numerics", "determinism", "sanitize"])
def test_a_failed_case_of_another_part_bars_it_too(part):
    times = record("kernels", {"a": contest(cuda=1.0, triton=2.0, torch=3.0)})
    assert entry_of(times, record(part, {"x": checked()}))["backend"] == "cuda"
    everywhere = record(part, {"x": checked("failed")})
    assert entry_of(times, everywhere)["backend"] == "triton"
    here = record(part, {"x": checked("failed", regimes=[REGIME])})
    assert entry_of(times, here)["backend"] == "triton"
    elsewhere = record(part, {"x": checked("failed", regimes=["forward fp32 N<=64 D<=64"])})
    assert entry_of(times, elsewhere)["backend"] == "cuda"
    of_another_operator = record(part, {"x": checked("failed", op="window_attention")})
    assert entry_of(times, of_another_operator)["backend"] == "cuda"


def test_a_contest_that_took_the_process_down_bars_every_kernel():
    cases = {"a": contest(cuda=1.0, triton=2.0, torch=3.0)}
    cases["b"] = {
        "status": "failed",
        "op": "attention",
        "regime": REGIME,
        "why": "the process died",
    }
    assert entry_of(record("kernels", cases))["backend"] is None


def test_an_older_commit_does_not_count():
    old = record("kernels", {"a": contest(cuda=1.0, torch=3.0)}, commit="b" * 40, date="2026-11-01")
    cases = {"a": contest(regime="forward fp32 N<=64 D<=64", cuda=1.0, torch=3.0)}
    found = dispatch_records([old, record("kernels", cases)])
    assert list(found["sm_90"]["operators"]["attention"]) == ["forward fp32 N<=64 D<=64"]


def test_an_emulated_record_is_none():
    emulated = record("kernels", {"a": contest(cuda=1.0, torch=3.0)}) | {"kind": "emulation"}
    assert dispatch_records([emulated]) == {}


# ---- Dispatch


def taken(N=197, D=64, dtype=BF16, training=False, variant=""):
    options = {"training": training, "sizes": (N, D), "variant": variant, "D": D}
    return choose("attention", BACKENDS, None, CUDA, (dtype,), **options)


def test_from_a_record_to_what_auto_takes(hopper, user_file, monkeypatch):
    cases = {"a": contest(cuda=1.0, torch=2.0)}
    both = "forward+backward 16-bit N<=272 D<=64"
    cases["b"] = contest(regime=both, triton=1.0, torch=2.0)
    cases["c"] = contest(regime="forward 16-bit N<=64 D<=64", cuda=1.0, torch=0.5)
    user_file.write_text(json.dumps(dispatch_records([record("kernels", cases)])))
    monkeypatch.setattr(_dispatch, "_RECORDS", _dispatch._load_records())
    assert taken() == "cuda" and taken(dtype=torch.float16) == "cuda"
    assert taken(training=True) == "triton"
    assert taken(N=65, D=33) == "cuda" and taken(N=272) == "cuda"
    # lost there; never measured: longer, wider, narrower, fp32, with a bias
    assert taken(N=64) == "torch"
    assert [taken(N=273), taken(D=65), taken(D=32)] == ["torch"] * 3
    assert [taken(dtype=torch.float32), taken(variant="bias")] == ["torch"] * 2
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert taken() == "auto"  # an exported graph may run elsewhere


def test_a_record_of_another_compute_capability_is_not_used(hopper, user_file, monkeypatch):
    ampere = record("kernels", {"a": contest(cuda=1.0, torch=2.0)}, arch="sm_80")
    user_file.write_text(json.dumps(dispatch_records([ampere])))
    monkeypatch.setattr(_dispatch, "_RECORDS", _dispatch._load_records())
    assert taken() == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert taken() == "cuda"


def test_the_hint_names_tune_once(hopper, monkeypatch):
    monkeypatch.setattr(_dispatch, "_RECORDS", {})
    monkeypatch.setattr(_dispatch, "_hinted", False)
    with pytest.warns(UserWarning, match=r"no kernel has a hardware record for sm_90.*`vitkernels"):
        assert taken() == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken() == "torch"


def test_a_users_record_replaces_a_shipped_regime():
    shipped = dispatch_records([record("kernels", {"a": contest(cuda=1.0, torch=2.0)})])
    slower = dispatch_records([record("tune", {"a": contest(cuda=1.0, torch=0.5)})])
    assert _dispatch.merged([shipped]) == {"sm_90": {"attention": {REGIME: "cuda"}}}
    assert _dispatch.merged([shipped, slower]) == {"sm_90": {"attention": {}}}


@pytest.mark.parametrize(
    "text",
    [
        "{not json",
        "[]",
        '{"sm_90": {}}',
        '{"sm_90": {"operators": {"attention": "cuda"}}}',
        '{"sm_90": {"operators": {"attention": {"forward": {"backend": "reference"}}}}}',
        '{"sm_90": {"operators": {"attention": {"forward": {"backend": 3}}}}}',
    ],
)
def test_a_corrupt_users_record_is_reported_once_and_ignored(text, user_file):
    user_file.write_text(text)
    code = "import vitkernels, torch; from vitkernels import ops, _dispatch; "
    code += "[ops.add_layer_norm(torch.ones(2, 4), None, None, None) for _ in range(3)]; "
    code += "print(_dispatch._RECORDS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hardware record records.json is unreadable, ignored") == 1
    shipped = read_folder(RESULTS)
    assert done.stdout.strip() == str(_dispatch.merged([dispatch_records(shipped)]))


@pytest.fixture
def regimes_asked_for(monkeypatch):
    """The regime of every call that chooses a backend."""
    seen = []

    def spy(name, table, requested, device, dtypes, *, training=True, sizes, variant="", **facts):
        seen.append(_regimes.regime(name, dtypes, training, sizes, variant))
        return choose(name, table, requested, device, dtypes, training=training, **facts)

    for op in OPS:
        monkeypatch.setattr(sys.modules[getattr(ops, op).__module__], "choose", spy)
    return seen


@pytest.mark.parametrize("op", OPS)
def test_call_case_and_raw_operator_name_one_regime(op, regimes_asked_for):
    """Otherwise a kernel would be taken for another regime than it was measured in."""
    problem = small_problem(op, BF16)
    tensors = list(problem.inputs.values())
    with RawCalls() as forward, torch.no_grad():
        problem.ours("reference")(*tensors)
    with RawCalls() as both:
        testing.grads_of(problem.ours("reference"), tensors)
    assert regimes_asked_for == regimes(problem)
    names = [overload.name() for overload, _, _ in both.calls]
    # The loss hands on the gradients that its forward made.
    ends = ("fwd",) if op == "distillation_loss" else ("fwd", "bwd")
    assert names == [f"vitkernels::{RAW[op]}_{end}.reference" for end in ends]
    for training, calls in enumerate((forward.calls, both.calls)):
        for overload, args, _ in calls:
            name = overload.name().partition("::")[2].partition(".")[0]
            raw_op, sizes, variant = _dispatch.regime_of_raw[name](*args)
            dtypes = tuple(a.dtype for a in args if isinstance(a, torch.Tensor))
            named = _regimes.regime(raw_op, dtypes, bool(training), sizes, variant)
            assert named == regimes_asked_for[training]


@pytest.mark.parametrize("op", MODULES)
def test_a_measured_row_is_in_the_regime_of_its_call(op, regimes_asked_for):
    for row in (row for row in ROWS if row.op == op):
        subject = row.subject("cpu", small=True)
        for dtype in (BF16, torch.float32):
            with torch.no_grad():
                subject.ours("reference")(*subject.make(0, dtype))
            assert regimes_asked_for.pop() == subject.regime(dtype, "forward"), row.name


def test_the_public_function_runs_the_winner(hopper, monkeypatch):
    """On fake CUDA tensors; an exported graph's default overload asks the records when it runs."""
    won = {"sm_90": {"attention_qkvpacked": {REGIME: "triton"}}}
    monkeypatch.setattr(_dispatch, "_RECORDS", won)
    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty(2, 197, 3 * 3 * 64, device="cuda", dtype=BF16)
        with RawCalls() as raw:
            assert ops.attention_qkvpacked(qkv, 3).shape == (2, 197, 3 * 64)
        assert [call[0]._overloadname for call in raw.calls] == ["triton"]
        short = torch.empty(2, 50, 3 * 3 * 64, device="cuda", dtype=BF16)
    asked = []
    monkeypatch.setattr(_dispatch, "overload", lambda *which: lambda *args: asked.append(which))
    default = _dispatch._preferred_kernel("attention_qkvpacked_fwd")
    for one in (qkv, short):
        default(one, 3, None, None, None, 0.125, 0.0)
    assert asked == [("attention_qkvpacked_fwd", name) for name in ("triton", "reference")]
