"""What came of one case: passed, failed, refused (with the kernel's reason), or not run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch

PASSED, FAILED, REFUSED, NOT_RUN = "passed", "failed", "refused", "not run"
STATUSES = (PASSED, FAILED, REFUSED, NOT_RUN)
FINISHED = (PASSED, FAILED, REFUSED)  # what a resumed run does not repeat

# What a path or a backend says of a call that it does not serve; anything else is a failure.
_REFUSAL = re.compile(r"path \w+ cannot serve this call: (.*)|cannot serve this call: (.*)")
_LOST_DEVICE = re.compile(
    r"CUDA error|CUDA driver error|Triton Error \[CUDA\]|cudaError|device-side assert", re.I
)


class DeviceLost(Exception):
    """The process can use the GPU no more: the case failed and the rest needs a new process."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: str
    why: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"status": self.status, **({"why": self.why} if self.why else {}), **self.facts}


def outcome_of(run: Callable[[], Any]) -> Outcome:
    """Run a case; what it returns may be facts of a passed one, or an Outcome of its own."""
    try:
        found = run()
    except DeviceLost:  # of a case inside this one
        raise
    except torch.OutOfMemoryError:
        return Outcome(NOT_RUN, "out of memory")
    except AssertionError as error:
        return Outcome(FAILED, _line(error))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        text = _line(error)
        if _LOST_DEVICE.search(text):
            raise DeviceLost(text) from error
        refusal = _REFUSAL.search(text)
        if refusal:
            return Outcome(REFUSED, (refusal[1] or refusal[2]).partition(". Others - ")[0])
        return Outcome(FAILED, f"{type(error).__name__}: {text}")
    except Exception as error:
        return Outcome(FAILED, f"{type(error).__name__}: {_line(error)}")
    if isinstance(found, Outcome):
        return found
    return Outcome(PASSED, "", found if isinstance(found, dict) else {})


def _line(error: BaseException) -> str:
    """One line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}..."
