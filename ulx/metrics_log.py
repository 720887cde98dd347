"""Training metrics as JSON lines, and as TensorBoard scalars where `tensorboardX` is installed."""

import contextlib
import importlib.util
import json
import time
from pathlib import Path
from types import TracebackType

from ulx.aside import write_aside
from ulx.processes import is_first

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends `{"step": …, "time": …, name: value, …}` lines to `path`.

    A resumed run passes the step it starts from: later lines, of steps that are about to be taken again, are dropped.
    Of several processes the first alone writes.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        self.board = self.file = None
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step] if self.path.exists() else []
        with write_aside(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a")
        self.elapsed = kept[-1]["time"] if kept else 0.0
        self.began = time.monotonic()
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            folder = self.path.parent / "tensorboard" / self.path.stem
            self.board = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def back_to(self, step: int) -> None:
        """Drop the lines of later steps, which are about to be taken again."""
        if self.file is not None:
            self._close()
            self._open(step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Raises OSError, naming the file, if the line cannot be written."""
        if self.file is None:
            return
        seconds = round(self.elapsed + time.monotonic() - self.began, 3)
        try:
            self.file.write(json.dumps({"step": step, "time": seconds, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}. Make room, then go on with --resume") from error
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for open_file in (self.file, self.board):
            if open_file is not None:
                with contextlib.suppress(OSError):  # what is in a buffer after a write that failed, fails again
                    open_file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file. A last line cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
