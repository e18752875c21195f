"""A part of benchmarks.gpu whose cases end in every way that one can; each run is written down."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from vitkernels.evidence.outcome import outcome_of

NAMES = ("good", "wrong", "refused", "lost", "crash", "hang", "memory", "bug", "last")


def _lose_the_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def names(device: str) -> list[str]:
    return os.environ["PLANTED_CASES"].split()


def facts_of(name: str) -> dict:
    return {"op": "add_layer_norm", "backend": "cuda", "path": ""}


def run(name: str, device: str):
    with Path(os.environ["PLANTED_LOG"]).open("a") as log:
        log.write(f"{name}\n")
    print("kernels may print")
    if name == "wrong":
        raise AssertionError("not within the error model:\nmax error 2 > 1")
    if name == "refused":
        raise RuntimeError("attention path sm90 cannot serve this call: it takes bf16")
    if name == "lost":
        return outcome_of(_lose_the_device)  # as a part does that judges its cases itself
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name in ("hang", "slow"):
        time.sleep(600)
    if name == "memory":
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")
    if name == "bug":
        raise KeyError("name")
    return {"values": 1}
