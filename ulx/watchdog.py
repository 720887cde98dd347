"""Ends a run in which nothing happens any more, so that a scheduler can start it again."""

import faulthandler
import os
import sys
import threading
import time

from ulx.processes import PREEMPTED
from ulx.progress import duration

__all__ = ["Watchdog"]


class Watchdog:
    """Between `expect` and the next call so many seconds may go by; then it says what was waited for, prints where
    every thread stands, and ends the process with the status that asks to be tried again.

    Nothing else can be done: a thread that hangs in the devices' driver or in a network drive cannot be interrupted.
    0 seconds: it does nothing.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._waiting: tuple[str, float] | None = None
        self._ended = threading.Event()

    def expect(self, what: str) -> None:
        """From now on this is waited for."""
        self._waiting = what, time.monotonic()

    def rest(self) -> None:
        """Nothing is waited for that has a time."""
        self._waiting = None

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="ulx-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            waiting = self._waiting  # once: the other thread changes it
            if waiting is not None and time.monotonic() - waiting[1] > self.seconds:
                self._give_up(waiting[0])

    def _give_up(self, what: str) -> None:
        message = f"\nerror: {what} has taken more than {duration(self.seconds)}. Every thread stands here:"
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        print("Nothing was lost but the steps since the last checkpoint: --resume goes on from it", file=sys.stderr)
        sys.stderr.flush()
        os._exit(PREEMPTED)
