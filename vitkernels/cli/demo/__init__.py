"""`vitkernels demo`: train, check and time a Vision Transformer on real images; write a report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util

import torch

from ... import _native
from .. import UsageError

NEEDS = {  # module: package
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "rich": "rich",
    "numpy": "numpy",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much work; `--quick` is for trying it out and for tests."""

    epochs: int = 48
    peak_lr: float = 3e-3
    agreement_steps: int = 50
    model: str = "vit_small_patch16_224"
    batch: int = 8
    rounds: int = 20
    budget_s: float = 9.0  # for each dtype


FULL = Plan()
QUICK = Plan(epochs=3, agreement_steps=10, model="vit_tiny_patch16_224", batch=2, rounds=2)


def run(options: argparse.Namespace) -> int:
    missing = [package for module, package in NEEDS.items() if not _installed(module)]
    if missing:
        raise UsageError(
            f"demo needs {', '.join(missing)}: pip install 'vitkernels[demo]' or pip install "
            + " ".join(missing)
        )
    from .report import check_folder

    device = _device(options.device)
    if options.backend != "auto" and _native.missing[options.backend] is not None:
        raise UsageError(f"--backend {options.backend}: {_native.missing[options.backend]}")
    out = options.out.resolve()
    check_folder(out)
    from .stages import Demo

    threads = torch.get_num_threads()
    try:
        return 0 if Demo(options, QUICK if options.quick else FULL, device).run(out) else 1
    finally:
        torch.set_num_threads(threads)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no NVIDIA GPU is visible to torch: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
