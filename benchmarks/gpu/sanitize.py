"""Part sanitize: small cases of every kernel under compute-sanitizer's four tools.

Cases share a process, because starting one takes longer than running it; a process that is not
clean is split in halves until the cases are found that are to blame.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu_cases import SMALL

from vitkernels.evidence.outcome import FAILED, NOT_RUN, PASSED, Outcome
from vitkernels.evidence.record import Record
from vitkernels.evidence.runner import worker_command

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BATCH = 18  # cases of one process
SECONDS_A_CASE = 60.0  # and as much again to start
DIRTY = 99  # the exit status that the tool is asked for when it has something to report


def names(device: str) -> list[str]:
    return [f"{tool} {case}" for tool in TOOLS for case in SMALL]


def facts_of(name: str) -> dict:
    return SMALL[name.partition(" ")[2]].facts()


def run(name: str, device: str) -> Outcome:
    """In the worker, under the tool: ours alone, forward and every gradient, nothing compared."""
    return SMALL[name].outcome(device, values=False)


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in CUDA_HOME."""
    found = shutil.which("compute-sanitizer")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if found is None and home:
            found = shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))
    return found


def run_part(
    record: Record,
    left: list[str],
    device: str,
    seconds: float | None,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> bool:
    tool_path = sanitizer()
    if tool_path is None:
        why = "compute-sanitizer is neither on PATH nor in CUDA_HOME: install the CUDA toolkit"
        for name in left:
            record.cases[name] = Outcome(NOT_RUN, why).as_json() | facts_of(name)
        record.save()
        say(f"sanitize has not run: {why}")
        return True
    end = None if seconds is None else time.monotonic() + seconds
    for tool in TOOLS:
        of_tool = [name.partition(" ")[2] for name in left if name.startswith(f"{tool} ")]
        for start in range(0, len(of_tool), BATCH):
            if end is not None and time.monotonic() > end:
                return False
            batch = of_tool[start : start + BATCH]
            _Batch(tool_path, tool, device, environment, record, say).run(batch)
    return True


class _Batch:
    def __init__(self, tool_path, tool, device, environment, record, say):
        self.tool, self.record, self.say = tool, record, say
        self.environment = {**os.environ, **environment}
        self.prefix = [tool_path, "--tool", tool, "--error-exitcode", str(DIRTY)]
        self.device = device

    def run(self, cases: list[str]) -> None:
        answers, report = self._process(cases)
        clean = report is None and len(answers) == len(cases)
        if clean:
            for case, answer in zip(cases, answers, strict=True):
                self._enter(case, answer)
        elif len(cases) == 1:
            why = report or "the process ended without an answer"
            if answers and answers[0]["status"] == FAILED:
                why = answers[0]["why"]
            self._enter(cases[0], Outcome(FAILED, why).as_json())
        else:
            middle = len(cases) // 2
            self.run(cases[:middle])
            self.run(cases[middle:])

    def _process(self, cases: list[str]) -> tuple[list[dict], str | None]:
        """The worker's answers, and what the tool reports (None when it is clean)."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            worker = worker_command("benchmarks.gpu.sanitize:run", {"device": self.device})
            try:
                done = subprocess.run(
                    [*self.prefix, "--log-file", str(log), *worker],
                    input="".join(f"{case}\n" for case in cases),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=self.environment,
                    timeout=SECONDS_A_CASE * (1 + len(cases)),
                )
            except subprocess.TimeoutExpired:
                return [], f"no end within {SECONDS_A_CASE * (1 + len(cases)):g} s"
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            answers = [answer for answer in lines if "status" in answer]
            if done.returncode == 0:
                return answers, None
            text = log.read_text() if log.exists() else ""
            return answers, _first_error(text) or f"exit status {done.returncode}"

    def _enter(self, case: str, answer: dict) -> None:
        name = f"{self.tool} {case}"
        self.record.add(name, answer)
        why = f": {answer['why']}" if answer["status"] != PASSED and "why" in answer else ""
        self.say(f"{answer['status']:8} {name}{why}")


def _first_error(log: str) -> str:
    """The tool's first report: what, and in which kernel."""
    lines = [line.lstrip("= ").strip() for line in log.splitlines() if line.startswith("=====")]
    told = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
    return "; ".join(told[:3])[:400]
