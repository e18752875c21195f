"""Ctrl-C and SIGTERM end a run after the step under way, saved; a second one ends it at once."""

from __future__ import annotations

import signal
import threading


class Interrupt:
    """`asked` becomes true inside the block when somebody wants the run to end."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
