"""Runs cases in a worker process and writes down each result as it comes.

A kernel may hang, crash its process or leave the GPU unusable: the case that was under way has then
failed, with the reason, and a new worker goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .outcome import FAILED, NOT_RUN, Outcome
from .record import Record

PATIENCE = 150.0  # seconds for one case: Triton compiles some kernels for tens of seconds
START_PATIENCE = 300.0  # until the worker has imported torch and answers
LOST = 77  # exit status of a worker whose GPU is lost: its last case has been reported
GRACE = 60.0  # seconds that a case under way has when the time is up
NO_WORKER = 3  # starts without an answer before the run gives up


class WorkerDied(RuntimeError):
    """The worker cannot be started here."""


class Runner:
    """run(names) -> whether all have been tried before the time was up."""

    def __init__(
        self,
        record: Record,
        target: str,
        arguments: dict[str, Any],
        *,
        seconds: float | None = None,
        patience: float = PATIENCE,
        environment: dict[str, str] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        """target: "module:function", called in the worker as function(name, **arguments)."""
        self.record, self.target, self.arguments = record, target, arguments
        self.seconds, self.patience, self.say = seconds, patience, say
        self.environment = {**os.environ, **(environment or {})}
        self.started = time.monotonic()

    def run(self, names: list[str]) -> bool:
        left = list(names)
        self.cut_short = False
        silent = 0
        while left and not self.time_is_up():
            before = len(left)
            self._one_worker(left)
            silent = silent + 1 if len(left) == before else 0
            if silent == NO_WORKER:
                raise WorkerDied(f"the worker process does not start: {self.last_words}")
        return not left

    def seconds_left(self) -> float:
        spent = time.monotonic() - self.started
        return math.inf if self.seconds is None else self.seconds - spent

    def time_is_up(self) -> bool:
        return self.cut_short or self.seconds_left() < 0

    def _one_worker(self, left: list[str]) -> None:
        """Take names off `left` until they are done, the time is up, or the worker is gone."""
        self.last_words = ""
        with self._worker() as (process, answers):
            if answers.get(START_PATIENCE) is None:
                self.last_words = f"exit status {_stopped(process)}"
                return
            while left and not self.time_is_up():
                name = left[0]
                with contextlib.suppress(BrokenPipeError):
                    print(name, file=process.stdin, flush=True)
                allowed = min(self.patience, self.seconds_left() + GRACE)
                answer = answers.get(allowed)
                late = answer is None and process.poll() is None and not answers.ended
                if late and allowed < self.patience:
                    self.cut_short = True  # no failure: it comes first the next time
                    return
                left.pop(0)
                if answer is None:
                    why = (
                        f"no answer within {self.patience:g} s"
                        if late
                        else f"the process died: {_how(_stopped(process))}"
                    )
                    answer = Outcome(FAILED, why).as_json()
                    self._enter(name, answer)
                    return
                self._enter(name, answer)
                if answers.lost:
                    return

    def _enter(self, name: str, answer: dict[str, Any]) -> None:
        self.record.add(name, answer)
        why = f": {answer['why']}" if answer["status"] in (FAILED, NOT_RUN) else ""
        self.say(f"{answer['status']:8} {name}{why}")

    @contextlib.contextmanager
    def _worker(self) -> Iterator[tuple[subprocess.Popen, _Answers]]:
        process = subprocess.Popen(
            worker_command(self.target, self.arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )
        try:
            yield process, _Answers(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: the worker and its own
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]


def worker_command(target: str, arguments: dict[str, Any]) -> list[str]:
    module = "vitkernels.evidence.worker"
    return [sys.executable, "-m", module, target, json.dumps(arguments)]


class _Answers:
    """The worker's lines of JSON, waited for with a limit."""

    def __init__(self, process: subprocess.Popen):
        self.ended = self.lost = False
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(ValueError):  # the pipe was closed under us
            for line in process.stdout:  # type: ignore[union-attr]
                self._lines.put(line)
        self._lines.put(None)

    def get(self, seconds: float) -> dict[str, Any] | None:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            self.ended = True
            return None
        answer = json.loads(line)
        self.lost = answer.pop("lost", False)
        return answer


def _stopped(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        return None


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"
