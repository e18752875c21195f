"""Part numerics: forward and every gradient of each kernel against float64, by the error model."""

from __future__ import annotations

from gpu_cases import NUMERICS, SMALL

from vitkernels.evidence.outcome import Outcome


def names(device: str) -> list[str]:
    """The real shapes on a GPU; on a CPU those that the emulator gets through."""
    return list(NUMERICS if device == "cuda" else SMALL)


def facts_of(name: str) -> dict:
    return (NUMERICS | SMALL)[name].facts()


def run(name: str, device: str) -> Outcome:
    return (NUMERICS | SMALL)[name].outcome(device)
