"""Part kernels: every contest of vitkernels.evidence.shapes, with all peers and CUDA paths."""

from __future__ import annotations

import functools

import torch

from vitkernels.evidence.clock import Limits
from vitkernels.evidence.contest import run_contest
from vitkernels.evidence.outcome import Outcome
from vitkernels.evidence.shapes import contest_named, contests

from .peers import peers

SECONDS = {"cuda": 1.5, "cpu": 0.0}  # of timing for each contest


def names(device: str) -> list[str]:
    return [contest.name for contest in contests()]


def facts_of(name: str) -> dict:
    return contest_named(name).facts()


@functools.cache
def limits(device: str) -> Limits:
    return Limits.measured(torch.device(device), 0.5 if device == "cuda" else 0.01)


def run(name: str, device: str) -> Outcome:
    measured = limits(device)
    contest, on = contest_named(name), torch.device(device)
    # The truth of a whole batch takes up to 40 GB in float64.
    large = device == "cuda" and torch.cuda.get_device_properties(on).total_memory > 70e9
    options = {"peers": peers, "check_batch": None if large else 4}
    outcome = run_contest(contest, on, measured, seconds=SECONDS[device], **options)
    outcome.facts["copy_bytes_per_second"] = measured.bytes_per_second
    outcome.facts["product_flops_per_second"] = measured.flops_per_second
    return outcome
