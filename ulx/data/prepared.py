"""Prepared data (`python -m ulx.data.prepare`): shards that are opened by their folder alone."""

import hashlib
import os
from pathlib import Path

from ulx.data.cache import open_in
from ulx.data.encoded import Encoded
from ulx.data.source import Dataset, Split
from ulx.data.split import Item, subset
from ulx.data.video import Clip

__all__ = ["open_prepared"]


def open_prepared(
    path: str | os.PathLike[str],
    resolution: int,
    *,
    clip: Clip | None = None,
    frames: int | None = None,
    limit: int | None = None,
) -> Dataset:
    """The data set in a folder, of images or, with a `clip`, of clips; of so many `frames`, if these are given, whether
    all videos have them or not.

    Raises `FileNotFoundError` for a preparation that is not there or not finished, `ValueError` for a damaged one, and
    for one of another resolution, of another kind, or with videos too short for the clip.
    """
    folder = Path(path).expanduser().resolve()
    prepared, settings = open_in(folder)
    dataset = prepared.dataset
    if dataset.resolution != resolution:
        raise ValueError(
            f"{folder} was prepared at {dataset.resolution} pixels, and --data.resolution is {resolution}: "
            f"give it, or prepare at {resolution}"
        )
    at_least: int | None = settings.get("at_least")  # of videos alone
    if clip is None and at_least is not None:
        raise ValueError(f"{folder} holds clips, and images are wanted (no --data.clips)")
    if clip is not None and at_least is None:
        raise ValueError(f"{folder} holds images, and clips are wanted (--data.clips)")
    if clip is not None and at_least is not None and at_least < clip.span:
        raise ValueError(
            f"the videos in {folder} have at least {at_least} frames, and {clip.frames} with a stride of "
            f"{clip.stride} need {clip.span}: prepare them with --at-least {clip.span}, or ask for less"
        )
    dataset = dataset.mapped(lambda records: Encoded(records, clip and clip.of(frames)))
    return dataset if limit is None else _limited(dataset, limit)


def _limited(dataset: Dataset, limit: int) -> Dataset:
    parts = dataset.train, dataset.validation
    items = [[Item(*pair) for pair in zip(part.names, part.labels.tolist(), strict=True)] for part in parts]
    kept = subset(items[0], items[1], limit)
    train, validation = (_named(part, {item.name for item in of}) for part, of in zip(parts, kept, strict=True))
    fingerprint = hashlib.sha256(f"{limit} of {dataset.fingerprint}".encode()).hexdigest()
    return Dataset(
        dataset.name, dataset.resolution, dataset.class_names, train, validation, fingerprint, dataset.attribution
    )


def _named(split: Split, names: set[str]) -> Split:
    return split.chosen([index for index, name in enumerate(split.names) if name in names])
