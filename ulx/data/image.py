"""Image files: found, read upright on white as RGB, cropped and resized as the ADM paper prepared ImageNet."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ulx.data.cache import UnreadableError
from ulx.data.extras import optional

__all__ = [
    "SUFFIXES",
    "center_crop",
    "find_files",
    "find_images",
    "image_size",
    "read_image",
    "reason_of",
    "require_folder",
    "upright_rgb",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
PREPARATION = 1  # of read_image; a change makes every cache anew


def find_images(folder: Path) -> list[str]:
    """`find_files` of images."""
    return find_files(folder, SUFFIXES)


def require_folder(folder: Path, what: str) -> None:
    """Raises FileNotFoundError or NotADirectoryError, saying `what` the folder ought to hold."""
    if not folder.is_dir():
        kind = NotADirectoryError if folder.exists() else FileNotFoundError
        raise kind(f"{folder} is no folder: give the one that holds the {what}")


def find_files(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Relative paths (with `/`) of all files with these suffixes (lower case) under a folder, sorted, but for hidden
    ones. Links to folders are followed, but no folder is taken twice: it goes by the name that comes first.

    Raises OSError for a folder that cannot be listed: what is in it would be missing and nobody told.
    """
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=_not_listed, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would never end, and by two names a file would be on both sides of a split
            subfolders.clear()
            continue
        seen.add(real)
        # A disk has a folder for what its repair finds, which nobody else may list.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "lost+found")
        found += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


def _not_listed(error: OSError) -> None:
    raise OSError(
        f"the folder {error.filename} cannot be listed ({error.strerror}): allow it, or move it away"
    ) from error


def read_image(file: str | os.PathLike[str] | bytes, resolution: int) -> tuple[UInt8[np.ndarray, "h w 3"], bool]:
    """The image upright, on white, centre-cropped to `resolution`; and whether it had to be enlarged for that.

    `file` is its path, or its content. Grey, palette, 16-bit, CMYK and transparent images are handled; of an animation
    it is the first frame. Raises `UnreadableError` with the reason.
    """
    image_module = optional("PIL.Image")
    try:
        with image_module.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            opened.load()
            image = upright_rgb(opened)
    except UnreadableError:
        raise
    except Exception as error:  # damaged bytes raise anything in Pillow's decoders: struct.error, IndexError, ...
        raise UnreadableError(reason_of(file if isinstance(file, bytes) else Path(file), error)) from error
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


def reason_of(file: Path | bytes, error: Exception) -> str:
    """Why a file, or its content, could not be read, in words that do not repeat its name."""
    if isinstance(error, FileNotFoundError):
        return "is a link to nothing" if isinstance(file, Path) and file.is_symlink() else "is not there"
    if isinstance(error, optional("PIL").UnidentifiedImageError):
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        return "is no image that Pillow knows" if size else "is empty"
    return f"{error}" or type(error).__name__
