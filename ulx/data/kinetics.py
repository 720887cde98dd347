"""Kinetics-600 as people have it: a folder of video files, and the annotations as CSV.

The annotations have the columns `label`, `youtube_id`, `time_start`, `time_end` and `split`, a row for each clip. The
files lie anywhere under the folder, named by what the usual downloaders name them: `ID_000012_000022.mp4`,
`ID_12_22.mp4` or `ID.mp4`. The last may be the whole video: if it is longer than the clip, the clip is cut out of it by
its times, and one that ends before these is refused, unless it is hardly longer than the clip. That many of the clips
are gone, and some of the files are damaged, is usual: they are listed and left out.

Rows of the splits "val", "validate" and "validation" are held out, those of "test" not used. Without such rows about
10 % of the YouTube ids are held out, by a hash.
"""

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ulx.data.cache import Recipe, UnreadableError, each
from ulx.data.encoded import VIDEO_BYTES, read_video, video_encoder
from ulx.data.image import PREPARATION, find_files, require_folder
from ulx.data.split import Item, digest_of, held_out
from ulx.data.video import ANIMATIONS, PNG, SUFFIXES

__all__ = ["recipe"]

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
HELD_OUT_SPLITS = ("val", "validate", "validation")
SPLITS = ("train", "test", *HELD_OUT_SPLITS)


class Row(NamedTuple):
    label: str
    youtube_id: str
    start: int
    end: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"

    @property
    def stems(self) -> tuple[str, ...]:
        """What its file may be called, the likeliest first."""
        return self.name, f"{self.youtube_id}_{self.start}_{self.end}", self.youtube_id

    def seconds_in(self, file: str) -> tuple[int, int] | None:
        """Where it is in that file, unless the file's name says that it was cut out already."""
        return (self.start, self.end) if Path(file).stem == self.youtube_id else None


def recipe(
    root: Path,
    annotations: Sequence[Path],
    resolution: int,
    *,
    at_least: int,
    crf: int,
    workers: int | None = None,
) -> Recipe:
    """How to prepare the clips under `root` that the annotations name.

    Raises `FileNotFoundError`, `NotADirectoryError`, and `ValueError` for annotations that are none, naming the line,
    or that have one clip twice, with another class or in another split.
    """
    require_folder(root, "videos")
    if resolution % 2:
        raise ValueError(f"videos are kept at an even resolution, got {resolution}")
    rows: dict[str, Row] = {}
    for file in annotations:
        for row in read_annotations(file):
            known = rows.setdefault(row.name, row)
            if known != row:
                raise ValueError(
                    f"{file} has {row.name} as {row.label!r} in the split {row.split!r}, and another row as "
                    f"{known.label!r} in {known.split!r}: keep one of them"
                )
    of_stem: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name in find_files(root, SUFFIXES + ANIMATIONS):
        if name.lower().endswith(PNG):  # a picture of the video, not the video
            continue
        with suppress(OSError):  # a link to nothing, or to itself
            sizes[name] = (root / name).stat().st_size
            of_stem.setdefault(Path(name).stem, name)
    class_names = tuple(sorted({row.label for row in rows.values()}))
    label = {name: index for index, name in enumerate(class_names)}
    files = {name: next((of_stem[s] for s in row.stems if s in of_stem), None) for name, row in rows.items()}
    train, validation = (
        [Item(row.name, label[row.label]) for row in part] for part in _splits([rows[name] for name in sorted(rows)])
    )
    for split, items in {"train": train, "validation": validation}.items():
        if not any(files[item.name] for item in items):
            raise ValueError(
                f"not one of the {len(items)} {split} clips in the annotations has its file under {root} (looked for "
                f"{rows[items[0].name].stems[0]}{SUFFIXES[0]}, say)"
                if items
                else f"the annotations have no {split} clips"
            )

    def load(name: str) -> tuple[dict[str, np.ndarray], str | None]:
        file = files[name]
        if file is None:
            raise UnreadableError("is not there")
        return read_video(root / file, resolution, at_least, crf, rows[name].seconds_in(file))

    def facts(item: Item) -> list[Any]:
        file = files[item.name]
        if file is None:
            return [*item, None, None]
        seconds = rows[item.name].seconds_in(file)
        return [*item, file, sizes[file], *(seconds or ())]

    return Recipe(
        name="kinetics600",
        resolution=resolution,
        class_names=class_names,
        settings={
            "preparation": PREPARATION,
            "crf": crf,
            "at_least": at_least,
            "files": digest_of(facts(item) for item in (*train, *validation)),
        },
        compressed_by=video_encoder(),
        items=lambda: (train, validation),
        make=each(load, workers),
        example_bytes=VIDEO_BYTES * resolution**2,
        unit="clips",
    )


def read_annotations(file: Path) -> list[Row]:
    """The rows of a CSV. Raises `FileNotFoundError`, and `ValueError` naming the line and what is wrong with it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: --annotations wants the CSV of Kinetics-600")
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{file} has no column {', '.join(missing)}: its first line must name {', '.join(COLUMNS)}"
            )
        return [_row(values, f"{file}, line {reader.line_num}") for values in reader]


def _row(values: dict[str, str], where: str) -> Row:
    try:
        row = Row(
            values["label"],
            values["youtube_id"],
            round(float(values["time_start"])),
            round(float(values["time_end"])),
            values["split"].strip(),
        )
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"{where} is no row of annotations ({error})") from error
    if not row.label or not row.youtube_id:
        raise ValueError(f"{where} has no label or no YouTube id")
    if row.end <= row.start:
        raise ValueError(f"{where} ends at second {row.end}, and begins at {row.start}")
    if row.split not in SPLITS:
        raise ValueError(f"{where} has the split {row.split!r}: there are {', '.join(SPLITS)}")
    return row


def _splits(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    train = [row for row in rows if row.split == "train"]
    validation = [row for row in rows if row.split in HELD_OUT_SPLITS]
    if validation:
        return train, validation
    # By the video, not by the clip: two clips of one video are too alike to be on both sides.
    return (
        [row for row in train if not held_out(row.youtube_id)],
        [row for row in train if held_out(row.youtube_id)],
    )
