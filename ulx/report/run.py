"""What a run's folder holds, for its report, and the pictures and plots that go there and onto the page."""

import dataclasses
import functools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulx.config import Config, from_json
from ulx.evaluation import Evaluation
from ulx.image_files import STRIPS, contact_sheet, film_strips, framed, moving_sheet, write_png
from ulx.metrics_log import read_metrics
from ulx.report import page
from ulx.report.text import FRECHET
from ulx.stages import collapsed

__all__ = ["Reported", "again"]

BUDGET = 2**20
"""Pixels of each kind of picture, though at least 8 images: with large ones the page would have hundreds of MB."""

Log = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Reported:
    """What a run's folder holds."""

    path: Path
    config: Config
    dataset: dict[str, Any]
    logs: dict[str, Log]
    """Of the stages that have begun."""
    evaluation: Evaluation | None

    @classmethod
    def read(cls, path: Path) -> "Reported":
        def parsed(name: str, parse: Callable[[str], Any]) -> Any:
            try:
                return parse((path / name).read_text())
            except FileNotFoundError:
                raise FileNotFoundError(f"{path} is not a run: it has no {name}") from None
            except NotADirectoryError:
                raise NotADirectoryError(f"{path} is a file: give the folder of a run") from None
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path / name} cannot be read: {error}") from error

        config, dataset = parsed("config.json", from_json), parsed("dataset.json", _dataset)
        names = [name for name in config.stages if (path / f"{name}.jsonl").exists()]
        logs = {name: read_metrics(path / f"{name}.jsonl") for name in names}
        evaluation = None
        if (path / "evaluation" / "metrics.json").exists():
            try:
                evaluation = Evaluation.load(path / "evaluation")
            except Exception as error:  # a damaged archive raises anything: BadZipFile, zlib.error, EOFError, ...
                raise ValueError(again(path, f"cannot be read ({error})")) from error
        return cls(path, config, dataset, {name: log for name, log in logs.items() if log}, evaluation)

    @functools.cached_property
    def collapsed(self) -> bool | None:
        """Whether the latent collapsed at any time, from the whole log: a resumed process saw only its own part."""
        lines = [line for line in self.logs.get("stage1", []) if {"latent_std", "rate"} <= line.keys()]
        if not lines:
            return None
        return collapsed(self.config, lines)

    @property
    def distance(self) -> str:
        """Its main Fréchet distance."""
        assert self.evaluation is not None
        return next(name for name in FRECHET if name in self.evaluation.metrics)

    @property
    def given(self) -> int:
        """Frames of a clip that its continuation was given."""
        return self.config.model.given_frames

    @property
    def loss_factor(self) -> float:
        """As set, or under rate control as it is to be set for the same rate."""
        log = self.logs.get("stage1")
        return log[-1].get("felt_loss_factor", self.config.loss_factor) if log else self.config.loss_factor

    def captions(self, name: str) -> list[str]:
        """What the model was told of pictures: captions, or the names of classes."""
        assert self.evaluation is not None
        pictures = self.evaluation.pictures
        if f"{name}_captions" in pictures:
            return pictures[f"{name}_captions"].tolist()
        return [self.dataset["class_names"][label] for label in pictures[f"{name}_labels"]]

    def shown(self, name: str, stacked: Sequence[np.ndarray], captions: Sequence[str] = ()) -> str:
        """The HTML of pictures that stand one above the other, and the same as a sheet under `figures/`: of clips two,
        one of film strips and one that moves."""
        pixels = math.prod(stacked[0].shape[1:-1])
        count = min(len(stacked[0]), max(8, BUDGET // pixels))
        stacked, captions = [images[:count] for images in stacked], captions[:count]
        sheet = stacked
        if stacked[0].ndim == 5:
            given = self.given if name == "base_samples" else 0
            stacked = [framed(clips, given) for clips in stacked]
            write_png(self.path / "figures" / f"{name}_moving.png", moving_sheet(*stacked))
            sheet = [film_strips(clips[:STRIPS]) for clips in stacked]
        write_png(self.path / "figures" / f"{name}.png", contact_sheet(*sheet, captions=captions[: len(sheet[0])]))
        words = name.replace("_", " ")
        alt = [words, f"beside {words}", *[f"with {words}"] * len(stacked)][: len(stacked)]
        return page.tiles(*stacked, captions=captions, alt=alt)

    def plotted(self, name: str, draw: Callable[[bool], bytes], text: str) -> str:
        """The HTML of a plot, which `draw` makes for a dark page or a light one; the light one under `figures/` too."""
        light = draw(False)
        (self.path / "figures" / f"{name}.png").write_bytes(light)
        return page.plot(light, draw(True), text)


def again(path: Path, what: str) -> str:
    """What to do about an evaluation of which that is true."""
    return f"{path / 'evaluation'} {what}: evaluate again with `python -m ulx.evaluate {shlex.quote(str(path))}`"


def _dataset(text: str) -> dict[str, Any]:
    facts = json.loads(text)
    missing = {"name", "resolution", "class_names", "train", "validation", "attribution"} - facts.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return facts
