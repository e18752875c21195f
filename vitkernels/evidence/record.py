"""A record: one file of cases with what came of them, whole after every case, so that a run that
was killed goes on where it stopped.

{"format": 1, "kind": "hardware", "part": "numerics", "facts": {...}, "cases": {"name": {"status":
"passed" | "failed" | "refused" | "not run", "why": ..., ...}}}. A planned case that has not run is
in it too, and says so.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .facts import EMULATION, HARDWARE
from .outcome import FINISHED, NOT_RUN, STATUSES, Outcome

FORMAT = 1
FACTS = ("gpu", "compute_capability", "driver", "cuda", "torch", "triton", "commit", "date")
NEVER = "never started"


class BadRecord(ValueError):
    """A file that is no record, in one line."""


def validate(found: Any) -> dict[str, Any]:
    """The record itself; BadRecord where it is none."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadRecord(f"no record of format {FORMAT}")
    if found.get("kind") not in (HARDWARE, EMULATION):
        raise BadRecord(f"kind must be {HARDWARE} or {EMULATION}, got {found.get('kind')!r}")
    facts: Any = found.get("facts")
    cases: Any = found.get("cases")
    if not isinstance(found.get("part"), str) or not isinstance(cases, dict):
        raise BadRecord("part must be a name and cases an object")
    missing = [name for name in FACTS if not isinstance(facts, dict) or name not in facts]
    if missing:
        raise BadRecord(f"facts must have {', '.join(missing)}")
    if found["kind"] == HARDWARE and not re.fullmatch(r"sm_\d+", str(facts["compute_capability"])):
        raise BadRecord(f"compute_capability is {facts['compute_capability']!r}")
    for name, case in cases.items():
        if not isinstance(case, dict) or case.get("status") not in STATUSES:
            raise BadRecord(f"case {name!r} has no status of {', '.join(STATUSES)}")
    return found


def read(path: Path) -> dict[str, Any]:
    try:
        return validate(json.loads(path.read_text()))
    except ValueError as error:
        raise BadRecord(f"{path} is not a record that can be read: {error}") from error


class Record:
    """A record on its way to `path`; without a path it is only kept in memory."""

    def __init__(self, path: Path | None, kind: str, part: str, facts: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "kind": kind, "part": part}
        self.content |= {"facts": facts, "cases": {}}
        if path is not None and path.exists():
            before = read(path)
            if (before["kind"], before["part"]) != (kind, part):
                raise BadRecord(f"{path} is of {before['kind']} {before['part']}")
            self.content["cases"] = before["cases"]
            self.content |= {k: v for k, v in before.items() if k not in self.content}

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.content["cases"]

    def plan(self, names: list[str], facts_of: Callable[[str], dict[str, Any]]) -> None:
        """Enter what is planned, and what each case is."""
        for name in names:
            if name not in self.cases:
                self.cases[name] = Outcome(NOT_RUN, NEVER).as_json() | facts_of(name)
        self.save()

    def left(self, names: list[str]) -> list[str]:
        """Those that have no result yet, in order."""
        return [name for name in names if self.cases[name]["status"] not in FINISHED]

    def add(self, name: str, result: dict[str, Any]) -> None:
        """The result of a case; what the plan said of it stays."""
        planned = {k: v for k, v in self.cases[name].items() if k not in ("status", "why")}
        self.cases[name] = planned | result
        self.save()

    def save(self) -> None:
        """The file is replaced whole, never half-written."""
        if self.path is not None:
            write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write beside `path`, then rename; an interrupt leaves what was there before."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def file_name(kind: str, part: str, facts: dict[str, Any]) -> str:
    """One file for each GPU, commit and part, so that results of two commits never mix."""
    if kind == EMULATION:
        return f"emulation-{part}.json"
    gpu = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")
    dirty = "-changes" if str(facts["commit"]).endswith("+changes") else ""
    return f"gpu-{gpu}-{facts['commit'][:10]}{dirty}-{part}.json"


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The hardware records of a folder, oldest first; what is no record is left out."""
    found = []
    for path in sorted(folder.glob("gpu-*.json")):
        record = read(path)
        if record["kind"] == HARDWARE:
            found.append(record)
    return sorted(found, key=lambda record: record["facts"]["date"])
