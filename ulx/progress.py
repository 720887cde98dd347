"""Progress of long work: a live bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from types import TracebackType

from ulx.processes import is_first

__all__ = ["Progress", "duration"]


def duration(seconds: float) -> str:
    """`3725` -> `'1h02m'`, `75` -> `'1m15s'`, `7.2` -> `'7s'`."""
    seconds = max(0, round(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds}s"


class Progress:
    """Counts units of work; shows the rate, the time left and whatever fields the caller adds.

    ```python
    with Progress("render", total=len(files), unit="images") as progress:
        for file in files:
            ...
            progress.advance(1, skipped=skipped)
    ```

    On a terminal one line is redrawn a few times a second; otherwise (a log file, CI) a line is printed
    every `every` seconds and one at the end, so that a log stays readable.
    `start` is the number of units that an earlier, interrupted run has done already. Of several processes the first
    alone shows anything.
    """

    def __init__(self, description: str, total: int, unit: str = "it", start: int = 0, every: float = 15.0):
        self.description, self.total, self.unit, self.start, self.every = (
            description,
            total,
            unit,
            start,
            every,
        )
        self.count = start
        self.live = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self.began = self.shown = time.monotonic()
        self.fields: dict[str, object] = {}
        return self

    def restart(self) -> None:
        """Count the rate from now on: what went before was preparation."""
        self.began = time.monotonic()

    def skip(self, units: int) -> None:
        """So many were done by an earlier run, and do not count for the rate."""
        self.start += units
        self.count += units

    def advance(self, units: int = 1, **fields: object) -> None:
        self.count += units
        self.fields.update(fields)
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.live else self.every):
            self.shown = now
            self._show(now)

    def _show(self, now: float, end: str | None = None) -> None:
        if not is_first():
            return
        elapsed = max(now - self.began, 1e-9)
        rate = (self.count - self.start) / elapsed
        left = duration((self.total - self.count) / rate) if rate > 0 else "?"
        extra = "".join(f"  {name} {_short(value)}" for name, value in self.fields.items())
        line = (
            f"{self.description}  {self.count}/{self.total} {self.unit}  {rate:.3g} {self.unit}/s  "
            f"{duration(elapsed)} elapsed, {left} left{extra}"
        )
        if self.live:
            sys.stderr.write("\r\x1b[K" + line + (end or ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(time.monotonic(), end="\n")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
