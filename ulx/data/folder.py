"""A folder of the user's own images: `path/class/*.png`, or images directly in `path` (one class, "all").

Files in deeper folders belong to the class of the first. With `train/` and `validation/` (or `val/`) inside `path`,
those are the splits and hold the classes; otherwise about 10 % of the files are held out by a hash of their relative
path, so a file added later moves no other. Files without an image suffix, and hidden ones, are ignored.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from ulx.data.cache import Prepared, Recipe, UnreadableError, prepare
from ulx.data.extras import optional
from ulx.data.source import Dataset
from ulx.data.split import Item, held_out, subset, unit_hash

__all__ = [
    "SUFFIXES",
    "center_crop",
    "find_files",
    "find_images",
    "image_size",
    "open_folder",
    "read_image",
    "reason_of",
    "upright_rgb",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
PREPARATION = 1  # of read_image; a change makes every cache anew
NAMED = 10  # files named in a message; the rest are counted


def open_folder(
    path: str | os.PathLike[str],
    resolution: int = 32,
    *,
    on_unreadable: Literal["skip", "refuse"] = "skip",
    cache_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """The folder as a data set, read into the cache first if it is not there or if a file has changed.

    Unreadable files are named and counted in a warning and left out, or in a `ValueError` with
    `on_unreadable="refuse"`. Raises `FileNotFoundError`, `NotADirectoryError`, `ValueError` for a folder with
    nothing to learn from, `OSError` for a cache that cannot be written.
    """
    root = Path(path).expanduser().resolve()
    train, validation, class_names = _list_splits(root)
    train, validation = subset(train, validation, limit)

    def load(name: str) -> tuple[dict[str, np.ndarray], str | None]:
        image, smaller = read_image(root / name, resolution)
        return {"image": image}, f"smaller than {resolution} pixels" if smaller else None

    prepared = prepare(
        Recipe(
            name="folder",
            resolution=resolution,
            class_names=class_names,
            settings={
                "preparation": PREPARATION,
                "path": str(root),
                "train": _stamp(root, train),
                "validation": _stamp(root, validation),
            },
            items=lambda: (train, validation),
            load=load,
            example_bytes=3 * resolution**2,
        ),
        cache_dir,
    )
    _report(root, prepared, on_unreadable)
    return prepared.dataset


def find_images(path: str | os.PathLike[str]) -> list[str]:
    """`find_files` of images. Raises `FileNotFoundError`, `NotADirectoryError`."""
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"no folder of images at {root} (--data.path)")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: --data.path wants the folder that holds the images")
    return find_files(root, SUFFIXES)


def find_files(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Relative paths (with `/`) of all files with these suffixes (lower case) under a folder, sorted, but for hidden
    ones; links to folders are followed."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


def read_image(path: str | os.PathLike[str], resolution: int) -> tuple[UInt8[np.ndarray, "h w 3"], bool]:
    """The image upright, on white, centre-cropped to `resolution`; and whether it had to be enlarged for that.

    Grey, palette, 16-bit, CMYK and transparent images are handled; of an animation it is the first frame.
    Raises `UnreadableError` with the reason.
    """
    image_module = optional("PIL.Image")
    try:
        with image_module.open(path) as opened:
            opened.load()
            image = upright_rgb(opened)
    except UnreadableError:
        raise
    except Exception as error:  # damaged bytes raise anything in Pillow's decoders: struct.error, IndexError, ...
        raise UnreadableError(reason_of(Path(path), error)) from error
    smaller = min(image.size) < resolution
    return center_crop(image, resolution), smaller


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height as the file's header has them, before it is turned upright. Raises `UnreadableError`."""
    image_module = optional("PIL.Image")
    try:
        with image_module.open(path) as opened:
            return opened.size
    except Exception as error:
        raise UnreadableError(reason_of(Path(path), error)) from error


def center_crop(image: Any, resolution: int) -> UInt8[np.ndarray, "h w 3"]:
    """An RGB `PIL.Image` of any size -> its middle square at `resolution`, as the ADM paper prepared ImageNet:
    halved by averaging while it is at least twice too large, then bicubic."""
    resampling = optional("PIL.Image").Resampling
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.array(image)[top : top + resolution, left : left + resolution]


def upright_rgb(image: Any) -> Any:
    """A `PIL.Image` of any mode as RGB: turned as its EXIF says, on white. Raises `UnreadableError`."""
    image_module = optional("PIL.Image")
    image = optional("PIL.ImageOps").exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, grey; Pillow's own conversion clips it to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableError("32-bit integers, of no known range")
        return image_module.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableError("floating-point pixels, of no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        image = image_module.alpha_composite(white, image)
    return image.convert("RGB")


def reason_of(path: Path, error: Exception) -> str:
    """Why a file could not be read, in words that do not repeat its name."""
    if isinstance(error, optional("PIL").UnidentifiedImageError):
        return "is empty" if path.stat().st_size == 0 else "is no image that Pillow knows"
    return f"{error}" or type(error).__name__


def _list_splits(root: Path) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """Training items, validation items and class names."""
    names = find_images(root)
    if not names:
        raise ValueError(f"no images in {root} (looked for {' '.join(SUFFIXES)}, subfolders included)")
    folders = {name.split("/")[0] for name in names if "/" in name}
    validation_folders = sorted(folders & {"validation", "val"})
    if "train" in folders and validation_folders:
        if len(validation_folders) == 2:
            raise ValueError(f"{root} has validation/ and val/: keep one of them")
        train = [name for name in names if name.startswith("train/")]
        validation = [name for name in names if name.startswith(f"{validation_folders[0]}/")]
        depth = 1
    else:
        depth = 1 if folders == {"train"} and all("/" in name for name in names) else 0
        train, validation = _hold_out(root, names)
    class_of = _classes(root, [*train, *validation], depth)
    class_names = tuple(sorted(set(class_of.values())))
    label = {name: index for index, name in enumerate(class_names)}
    train, validation = ([Item(name, label[class_of[name]]) for name in part] for part in (train, validation))
    return train, validation, class_names


def _hold_out(root: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(names) < 2:
        raise ValueError(f"{root} holds one image: at least 2 are needed, one to train on and one to validate")
    held = {name for name in names if held_out(name)}
    if not held:  # few files: the one that came nearest to being held out
        held = {min(names, key=unit_hash)}
    elif len(held) == len(names):
        held.remove(max(names, key=unit_hash))
    return [name for name in names if name not in held], [name for name in names if name in held]


def _classes(root: Path, names: Iterable[str], depth: int) -> dict[str, str]:
    """The class of each file: its folder at `depth`, or "all" where there are none."""
    class_of = {name: parts[depth] for name in names if len(parts := name.split("/")) > depth + 1}
    loose = [name for name in names if name not in class_of]
    if loose and class_of:
        raise ValueError(
            f"{root} has images in class folders (such as {min(class_of)}) and {len(loose)} beside them "
            f"(such as {loose[0]}): move those into a class folder too"
        )
    return class_of or dict.fromkeys(loose, "all")


def _stamp(root: Path, items: Iterable[Item]) -> str:
    """Hash of the names, labels, sizes and times of the files: it changes when one of them does."""
    digest = hashlib.sha256()
    for item in items:
        status = (root / item.name).stat()
        digest.update(json.dumps([item.name, item.label, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def _report(root: Path, prepared: Prepared, on_unreadable: str) -> None:
    """Errors and warnings about what was found in the files."""
    total = len(prepared.refused) + len(prepared.dataset.train) + len(prepared.dataset.validation)
    if prepared.refused:
        listed = [f"{name} ({reason})" for name, reason in prepared.refused]
        message = f"{len(listed)} of {total} files in {root} cannot be read as images: {_first(listed)}"
        if on_unreadable == "refuse":
            raise ValueError(f"{message}. Repair or remove them, or leave them out with --data.on-unreadable skip")
        for split in ("train", "validation"):
            if len(getattr(prepared.dataset, split)) == 0:
                raise ValueError(f"{message}. Nothing is left for {split}")
        warnings.warn(f"{message}. They are left out", stacklevel=3)
    if prepared.remarks:
        names = [name for name, _ in prepared.remarks]
        warnings.warn(
            f"{len(names)} of {total} images in {root} are smaller than {prepared.dataset.resolution} pixels and "
            f"were enlarged: {_first(names)}. A smaller --data.resolution would suit them",
            stacklevel=3,
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
