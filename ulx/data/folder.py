"""A folder of the user's own images or videos: `path/class/*.png`, or files directly in `path` (one class, "all").

Files in deeper folders belong to the class of the first. With `train/` and `validation/` (or `valid/`, `val/`) inside
`path`, those are the splits and hold the classes; otherwise about 10 % of the files, two at least, are held out by a
hash of their relative path, so a file added later moves no other. Files without a suffix of theirs, and hidden ones,
are ignored.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ulx.data.cache import Prepared, Recipe, each, prepare
from ulx.data.encoded import CRF, VIDEO_BYTES, Encoded, read_video
from ulx.data.image import PREPARATION, SUFFIXES, find_images, read_image, require_folder
from ulx.data.source import Dataset
from ulx.data.split import LEAST, Item, digest_of, held_out, subset, unit_hash
from ulx.data.video import ANIMATIONS, Clip, find_videos
from ulx.data.video import SUFFIXES as VIDEO_SUFFIXES

__all__ = ["first_named", "list_splits", "open_folder", "stamp"]

NAMED = 10  # files named in a message; the rest are counted
VALIDATION = {"validation", "valid", "val"}
OTHER_SPLITS = {"test", "testing", "dev", "eval", "holdout"}


def open_folder(
    path: str | os.PathLike[str],
    resolution: int = 32,
    *,
    clip: Clip | None = None,
    frames: int | None = None,
    on_unreadable: Literal["skip", "refuse"] = "skip",
    cache_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """The folder as a data set, read into the cache first if it is not there or if a file has changed.

    Of images; with a `clip` of videos (animated GIFs, WebPs and PNGs among them), all of whose frames are kept, in the
    cache compressed; examples are of so many `frames`, if these are given. Unreadable files, and videos too short for
    the clip, are named and counted in a warning and left out, or in a `ValueError` with `on_unreadable="refuse"`.
    Raises `FileNotFoundError`, `NotADirectoryError`, `ValueError` for a folder with nothing to learn from, `OSError`
    for a cache that cannot be written.
    """
    root = Path(path).expanduser().resolve()
    kind = "image" if clip is None else "video"
    train, validation, class_names = list_splits(root, kind)
    train, validation = subset(train, validation, limit)

    def load_image(name: str) -> tuple[dict[str, np.ndarray], str | None]:
        image, smaller = read_image(root / name, resolution)
        return {"image": image}, f"smaller than {resolution} pixels" if smaller else None

    def load_video(name: str) -> tuple[dict[str, np.ndarray], str | None]:
        assert clip is not None
        return read_video(root / name, resolution, at_least=clip.span)

    settings: dict[str, Any] = {"path": str(root), "train": stamp(root, train), "validation": stamp(root, validation)}
    if clip is not None:
        settings |= {"crf": CRF, "at_least": clip.span}
    recipe = Recipe(
        name="folder" if clip is None else "clips",
        resolution=resolution,
        class_names=class_names,
        settings={"preparation": PREPARATION} | settings,
        items=lambda: (train, validation),
        make=each(load_image if clip is None else load_video),
        example_bytes=3 * resolution**2 if clip is None else VIDEO_BYTES * resolution**2,
        unit=f"{kind}s",
    )
    prepared = prepare(recipe, cache_dir)
    _report(root, prepared, kind, on_unreadable)
    if clip is None:
        return prepared.dataset
    return prepared.dataset.mapped(lambda records: Encoded(records, clip.of(frames)))


def list_splits(root: Path, kind: Literal["image", "video"]) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """Training items, validation items and class names. Raises as `open_folder` does."""
    require_folder(root, f"{kind}s (--data.path)")
    names = find_images(root) if kind == "image" else find_videos(root, strict=False)
    if not names:
        looked_for = " ".join(SUFFIXES if kind == "image" else VIDEO_SUFFIXES + ANIMATIONS)
        raise ValueError(f"no {kind}s in {root} (looked for {looked_for}, subfolders included)")
    folders = {name.split("/")[0] for name in names if "/" in name}
    validation_folders = sorted(folders & VALIDATION)
    if "train" in folders and validation_folders:
        if len(validation_folders) > 1:
            raise ValueError(f"{root} has {'/ and '.join(validation_folders)}/: keep one of them")
        train = [name for name in names if name.startswith("train/")]
        validation = [name for name in names if name.startswith(f"{validation_folders[0]}/")]
        depth = 1
    elif "train" in folders and folders - {"train"} <= OTHER_SPLITS and len(folders) > 1:
        # Two classes by these names would be trained on what was set aside.
        raise ValueError(
            f"{root} has train/ and {'/, '.join(sorted(folders - {'train'}))}/ and no validation/: give what is to be "
            "measured on that name, or move train/ elsewhere and 10 % of it will be held out"
        )
    else:
        depth = 1 if folders == {"train"} and all("/" in name for name in names) else 0
        train, validation = _hold_out(root, names, kind)
    class_of = _classes(root, [*train, *validation], depth, kind)
    class_names = tuple(sorted(set(class_of.values())))
    label = {name: index for index, name in enumerate(class_names)}
    train, validation = ([Item(name, label[class_of[name]]) for name in part] for part in (train, validation))
    return train, validation, class_names


def _hold_out(root: Path, names: Sequence[str], kind: str) -> tuple[list[str], list[str]]:
    if len(names) <= LEAST:
        raise ValueError(
            f"{root} holds {len(names)} {kind}{'s' * (len(names) > 1)}: at least {LEAST + 1} are needed, one to train "
            f"on, {LEAST} to validate"
        )
    # Of few files those that came nearest to being held out, and not all of them.
    count = min(max(LEAST, sum(map(held_out, names))), len(names) - 1)
    held = set(sorted(names, key=unit_hash)[:count])
    return [name for name in names if name not in held], [name for name in names if name in held]


def _classes(root: Path, names: Iterable[str], depth: int, kind: str) -> dict[str, str]:
    """The class of each file: its folder at `depth`, or "all" where there are none."""
    class_of = {name: parts[depth] for name in names if len(parts := name.split("/")) > depth + 1}
    loose = [name for name in names if name not in class_of]
    if loose and class_of:
        raise ValueError(
            f"{root} has {kind}s in class folders (such as {min(class_of)}) and {len(loose)} beside them "
            f"(such as {loose[0]}): move those into a class folder too"
        )
    return class_of or dict.fromkeys(loose, "all")


def stamp(root: Path, items: Iterable[Item], times: bool = True) -> str:
    """Hash of the names, labels, sizes and, of files that may change in place, times: it changes when one does. What
    cannot be looked at, such as a link to nothing, has neither."""

    def rows() -> Iterator[list[Any]]:
        for item in items:
            try:
                status = (root / item.name).stat()
            except OSError:
                yield [item.name, item.label]
                continue
            yield [item.name, item.label, status.st_size, *([status.st_mtime_ns] if times else [])]

    return digest_of(rows())


def _report(root: Path, prepared: Prepared, kind: str, on_unreadable: str) -> None:
    """Errors and warnings about what was found in the files."""
    total = len(prepared.refused) + len(prepared.dataset.train) + len(prepared.dataset.validation)
    if prepared.refused:
        listed = [f"{name} ({reason})" for name, reason in prepared.refused]
        message = f"{len(listed)} of {total} files in {root} cannot be read as {kind}s: {first_named(listed)}"
        if on_unreadable == "refuse":
            raise ValueError(f"{message}. Repair or remove them, or leave them out with --data.on-unreadable skip")
        for split in ("train", "validation"):
            if len(getattr(prepared.dataset, split)) == 0:
                raise ValueError(f"{message}. Nothing is left for {split}")
        warnings.warn(f"{message}. They are left out", stacklevel=3)
    if prepared.remarks:
        names = [name for name, _ in prepared.remarks]
        warnings.warn(
            f"{len(names)} of {total} {kind}s in {root} are smaller than {prepared.dataset.resolution} pixels and "
            f"were enlarged: {first_named(names)}. A smaller --data.resolution would suit them",
            stacklevel=3,
        )


def first_named(names: Sequence[str]) -> str:
    """The first of them, and how many more there are, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
