"""Training metrics as JSON lines, and as TensorBoard scalars where `tensorboardX` is installed."""

import importlib.util
import json
import time
from pathlib import Path
from types import TracebackType

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends `{"step": …, "time": …, name: value, …}` lines to `path`.

    A resumed run passes the step it starts from: later lines, of steps that are about to be taken again, are dropped.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)
        self.file = path.open("a")
        self.elapsed = kept[-1]["time"] if kept else 0.0
        self.began = time.monotonic()
        self.board = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard" / path.stem), purge_step=resume_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        seconds = round(self.elapsed + time.monotonic() - self.began, 3)
        self.file.write(json.dumps({"step": step, "time": seconds, **metrics}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file. A last line cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
