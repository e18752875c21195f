"""Hardware records as a GPU would have made them."""

REGIME = "forward 16-bit N<=272 D<=64"
COMMIT = "a" * 40


def record(part, cases, *, arch="sm_90", commit=COMMIT, gpu="NVIDIA H200", date="2026-12-01"):
    facts = {"gpu": gpu, "compute_capability": arch, "driver": "580.1", "cuda": "13.0"}
    facts |= {"torch": "2.13.0", "triton": "3.6.0", "commit": commit, "date": date}
    return {"format": 1, "kind": "hardware", "part": part, "facts": facts, "cases": cases}


def contest(regime=REGIME, op="attention", unfit=None, **seconds):
    """seconds: of each that was timed; our kernels among them have passed."""
    passed = [name for name in seconds if name in ("cuda", "triton")]
    found = {"status": "failed" if unfit else "passed", "op": op, "regime": regime}
    return found | {"passed": passed, "unfit": unfit or {}, "seconds": seconds}


def checked(status="passed", backend="cuda", op="attention", **others):
    return {"status": status, "op": op, "backend": backend, "path": "sm90", **others}
