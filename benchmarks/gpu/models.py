"""Part models: whole models beside timm and torch.compile, with the kernels that the records of the
same folder give to `auto`: run part kernels first."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vitkernels import _dispatch
from vitkernels.cli.bench import FORWARD, TRAIN
from vitkernels.cli.bench.contenders import OURS
from vitkernels.cli.bench.race import Case as RaceCase
from vitkernels.cli.bench.race import Plan, Race
from vitkernels.evidence.outcome import FAILED, PASSED, Outcome
from vitkernels.evidence.record import read_folder
from vitkernels.evidence.verdicts import dispatch_records

BATCH = 64  # in float64 its training step fits into 80 GB
SECONDS = 6.0
MODELS = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch16_384")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def names(device: str) -> list[str]:
    """On a CPU one small model: only the machinery is tested there."""
    if device != "cuda":
        return ["vit_tiny_patch16_224 fp32 forward"]
    return [
        f"{model} {dtype} {direction}"
        for dtype in DTYPES
        for model in MODELS
        for direction in (FORWARD, TRAIN)
    ]


def facts_of(name: str) -> dict:
    return {"model": name.split()[0]}


@functools.lru_cache(maxsize=1)
def race(model: str, device: str) -> Race:
    on_gpu = device == "cuda"
    plan = Plan(
        model,
        BATCH if on_gpu else 1,
        tuple(DTYPES.values()),
        (FORWARD, TRAIN),
        torch.device(device),
        {} if on_gpu else {"img_size": 32},
        compiled=on_gpu,
        seconds=SECONDS if on_gpu else 0.0,
        least_rounds=5 if on_gpu else 1,
    )
    return Race(plan)


def run(name: str, device: str, folder: str) -> Outcome:
    model, dtype, direction = name.split()
    if device == "cuda":
        _dispatch._RECORDS = _dispatch.merged([dispatch_records(read_folder(Path(folder)))])
    made = race(model, device)
    result = made.run(RaceCase(DTYPES[dtype], direction))
    ours = result.entry(OURS)
    facts = {
        "model": model,
        "batch": made.plan.batch,
        "seconds_of": {entry.name: entry.median for entry in result.entries},
        "peak_bytes": {entry.name: entry.peak for entry in result.entries},
        "excess": {entry.name: entry.excess for entry in result.entries},
    }
    if ours.excess > 1:
        return Outcome(FAILED, f"{ours.excess:.2f} times what the error model allows", facts)
    return Outcome(PASSED, "", facts)
