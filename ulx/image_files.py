"""Image files in and out of the commands: folders of them, outputs that overwrite nothing, contact sheets."""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ulx.aside import write_aside
from ulx.data.cache import UnreadableError
from ulx.data.extras import optional
from ulx.data.image import PREPARATION, SUFFIXES, find_images, image_size, read_image, require_folder

__all__ = [
    "SHEETS",
    "STRIPS",
    "ImageFolder",
    "claim",
    "contact_sheet",
    "film_strips",
    "framed",
    "moving_sheet",
    "one_size",
    "png",
    "png_names",
    "unreadable",
    "write_png",
    "zoom_for",
]

Images = UInt8[np.ndarray, "n h w 3"]
Picture = UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "t h w 3"]
"""An image or a clip."""

NAMED = 10  # files named in a message; the rest are counted
TILE = 96  # pixels; smaller images are enlarged to at least this
SHEETS = re.compile(r"(.*/)?(contact_sheet|(base|prior)-seed-?\d+-sheet)\.png")
"""The contact sheets that the commands write beside their images."""
STRIPS = 16
"""Clips on a sheet, each a strip of its frames."""
FRAME_MS = 125
"""Milliseconds of a frame of an animation."""
PLAIN, MARKED = (222, 222, 222), (230, 159, 0)
"""Colours of the frames' borders."""
RULE = f"""\
upright, on white, halved by averaging while at least twice too large, then bicubic to the resolution, centre-cropped \
(ulx.data.image.read_image, version {PREPARATION}); the network resizes further"""
GAP, CAPTION = 6, 14  # pixels between the tiles of a sheet, and for a line of text under them


class ImageFolder:
    """The images of a folder, prepared as for training: upright, on white, centre-cropped, resized to `resolution`.

    With None for it they must be squares of one size already, and that is the resolution.
    `names` are the relative paths of all image files, sorted, but for `sheets`, contact sheets written by the commands.
    Files that cannot be read are found while reading; they are left out and kept in `skipped` with the reason.
    Raises FileNotFoundError, NotADirectoryError, ValueError for a folder without images, and without a resolution for
    images that are not of one size or whose size cannot be read.
    """

    kind = "image"
    frames = 1
    """Of each example."""

    def __init__(self, folder: Path, resolution: int | None):
        require_folder(folder, "images")
        self.folder = folder
        found = find_images(folder)
        self.sheets = [name for name in found if SHEETS.fullmatch(name)]
        self.names = [name for name in found if name not in self.sheets]
        if not self.names:
            raise ValueError(f"no images in {folder} (looked for {' '.join(SUFFIXES)}, subfolders included)")
        self.skipped: list[tuple[str, str]] = []
        self.enlarged = 0
        self.resolution = one_size(folder, self.names, image_size, "image") if resolution is None else resolution

    def preparation(self) -> dict[str, Any]:
        """How images are made of the files, as a card says it."""
        return {"preparation": RULE}

    def decoder(self) -> str:
        """What reads the files, and its version."""
        return f"Pillow {optional('PIL').__version__}"

    def read(self, name: str) -> tuple[UInt8[np.ndarray, "h w 3"], bool]:
        """One image, and whether it had to be enlarged. Raises ValueError for a file that cannot be read, naming it."""
        try:
            return read_image(self.folder / name, self.resolution)
        except UnreadableError as error:
            raise unreadable(self.folder / name, "image", error) from error

    def batches(self, size: int) -> Iterator[tuple[list[str], Images]]:
        """Names and images, `size` at a time (fewer at the end). Raises ValueError if not one could be read."""
        self.skipped, self.enlarged, read = [], 0, 0
        names: list[str] = []
        images: list[np.ndarray] = []
        for name in self.names:
            try:
                image, smaller = read_image(self.folder / name, self.resolution)
            except UnreadableError as error:
                self.skipped.append((name, str(error)))
                continue
            names.append(name)
            images.append(image)
            self.enlarged += smaller
            read += 1
            if len(names) == size:
                yield names, np.stack(images)
                names, images = [], []
        if names:
            yield names, np.stack(images)
        if not read:
            raise ValueError(f"none of the files in {self.folder} can be read as an image: {self._skipped()}")

    def summary(self) -> str:
        """What was read so far, what had to be enlarged, and what was left out and why."""
        size = f"{self.resolution}×{self.resolution}"
        lines = [
            f"{len(self.names) - len(self.skipped)} images from {self.folder}, centre-cropped and resized to {size}"
        ]
        if self.enlarged:
            lines.append(f"{self.enlarged} of them are smaller than that and were enlarged")
        if self.sheets:
            lines.append(f"left out as contact sheets: {', '.join(self.sheets[:NAMED])}")
        if self.skipped:
            lines.append(
                f"{len(self.skipped)} of {len(self.names)} files cannot be read and were skipped: {self._skipped()}"
            )
        return "\n".join(lines)

    def _skipped(self) -> str:
        listed = ", ".join(f"{name} ({reason})" for name, reason in self.skipped[:NAMED])
        return listed + (f" and {len(self.skipped) - NAMED} more" if len(self.skipped) > NAMED else "")


def unreadable(file: Path, kind: str, error: UnreadableError) -> ValueError:
    """The error that names a file, of an "image" or a "video", and what to do."""
    article = "an" if kind == "image" else "a"
    return ValueError(f"{file} cannot be read as {article} {kind} ({error}): repair or remove it")


def one_size(folder: Path, names: Sequence[str], size_of: Callable[[Path], tuple[int, int]], kind: str) -> int:
    """The side of the squares that all files hold, by `size_of`, their width and height.

    Raises ValueError, naming the file, for what is no square or of another size, or cannot be read.
    """
    side, first = 0, names[0]
    for name in names:
        file = folder / name
        try:
            width, height = size_of(file)
        except UnreadableError as error:
            raise unreadable(file, kind, error) from error
        side = side or width
        if not width == height == side:
            of_first = "" if name == first else f", and {first} is {side}×{side}"
            raise ValueError(
                f"{file} is {width}×{height} pixels{of_first}: give a --resolution, or squares of one size"
            )
    return side


def png_names(names: Sequence[str]) -> list[str]:
    """`a/b.jpg` -> `a/b.png`; files that differ by the suffix alone keep it: `b.jpg.png`, `b.webp.png`.

    Raises ValueError if two names still meet.
    """
    plain = [Path(name).with_suffix(".png").as_posix() for name in names]
    times = Counter(plain)
    unique = [new if times[new] == 1 else f"{name}.png" for name, new in zip(names, plain, strict=True)]
    if len(set(unique)) != len(unique):
        twice = next(new for new, count in Counter(unique).items() if count > 1)
        raise ValueError(f"several images would be written to {twice}: rename one of them")
    return unique


def claim(out: Path, names: Iterable[str], overwrite: bool) -> None:
    """Create the folder `out`, unless one of the files to be written is there already.

    Raises FileExistsError, naming such a file (not with `overwrite`), NotADirectoryError, OSError.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: --out wants a folder")
    there = [] if overwrite else [name for name in names if (out / name).exists()]
    if there:
        raise FileExistsError(
            f"{out / there[0]} exists already ({len(there)} such files): choose another --out, or pass --overwrite"
        )
    out.mkdir(parents=True, exist_ok=True)


def png(image: Picture) -> bytes:
    """The bytes of a PNG file, of a clip an animated one."""
    buffer, images = (
        io.BytesIO(),
        [optional("PIL.Image").fromarray(frame) for frame in image.reshape(-1, *image.shape[-3:])],
    )
    rest: dict[str, Any] = {}
    if len(images) > 1:
        # Pillow makes one frame of equal ones, unless they are blended otherwise, which is the same without an alpha.
        blend = [index % 2 for index in range(len(images))]
        rest = {"save_all": True, "append_images": images[1:], "duration": FRAME_MS, "loop": 0, "blend": blend}
    images[0].save(buffer, "PNG", **rest)
    return buffer.getvalue()


def framed(clips: UInt8[np.ndarray, "n t h w 3"], given: int) -> UInt8[np.ndarray, "n t _h _w 3"]:
    """Every frame with a border of one pixel, coloured around the `given` ones."""
    count, length, height, width, _ = clips.shape
    bordered = np.full((count, length, height + 2, width + 2, 3), PLAIN, np.uint8)
    bordered[:, :given] = MARKED
    bordered[:, :, 1:-1, 1:-1] = clips
    return bordered


def film_strips(clips: UInt8[np.ndarray, "n t h w 3"]) -> UInt8[np.ndarray, "n h _w 3"]:
    """Each clip as one image, its frames side by side."""
    return np.concatenate(list(clips.swapaxes(0, 1)), axis=2)


def moving_sheet(*stacked: UInt8[np.ndarray, "n t h w 3"]) -> UInt8[np.ndarray, "t _h _w 3"]:
    """A contact sheet of clips that move: `contact_sheet` of the first `STRIPS`, frame by frame."""
    frames = zip(*(clips[:STRIPS].swapaxes(0, 1) for clips in stacked), strict=True)
    return np.stack([contact_sheet(*at_once) for at_once in frames])


def write_png(path: Path, image: Picture) -> None:
    """Aside first, and renamed when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        aside.write_bytes(png(image))


def zoom_for(height: int) -> int:
    """How many times a small image is enlarged to be looked at: an integer, so that pixels stay square and sharp."""
    return max(1, -(-TILE // height))


def contact_sheet(
    *stacked: Images, captions: Sequence[str] = (), zoom: int | None = None
) -> UInt8[np.ndarray, "_h _w 3"]:
    """All images on one sheet, enlarged by an integer factor (nearest neighbour).

    Each tile holds image i of every array, one above the other: originals over reconstructions, say.
    `captions` are written under the tiles, cut to their width.
    Raises ValueError for no images, or arrays and captions of different lengths.
    """
    count = len(stacked[0]) if stacked else 0
    lengths = {len(images) for images in stacked} | ({len(captions)} if captions else set())
    if lengths != {count} or not count:
        raise ValueError(f"a contact sheet needs one image of each kind (and one caption) per tile, got {lengths}")
    zoom = zoom_for(stacked[0].shape[1]) if zoom is None else zoom
    tiles = np.concatenate(stacked, axis=1).repeat(zoom, axis=1).repeat(zoom, axis=2)
    _, height, width, _ = tiles.shape
    columns = min(count, max(1, round(math.sqrt(count * height / width))))
    step_y, step_x = height + GAP + (CAPTION if captions else 0), width + GAP
    rows = -(-count // columns)
    sheet = np.full((rows * step_y + GAP, columns * step_x + GAP, 3), 222, np.uint8)
    corners = [(GAP + i // columns * step_y, GAP + i % columns * step_x) for i in range(count)]
    for tile, (y, x) in zip(tiles, corners, strict=True):
        sheet[y : y + height, x : x + width] = tile
    if not captions:
        return sheet
    image = optional("PIL.Image").fromarray(sheet)
    draw = optional("PIL.ImageDraw").Draw(image)
    font = optional("PIL.ImageFont").load_default(11)
    for caption, (y, x) in zip(captions, corners, strict=True):
        while caption and draw.textlength(caption, font) > width:
            caption = caption[:-1]
        draw.text((x, y + height + 1), caption, fill=(40, 40, 40), font=font)
    return np.array(image)
