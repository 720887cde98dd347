"""What is compared: two folders of images, or two of videos."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from ulx.data.image import SUFFIXES, find_images, require_folder
from ulx.data.video import ANIMATIONS, Clip, find_videos
from ulx.data.video import SUFFIXES as VIDEO_SUFFIXES
from ulx.image_files import SHEETS, ImageFolder
from ulx.video_files import VideoFolder

__all__ = ["Examples", "open_both"]


@runtime_checkable
class Examples(Protocol):
    """A folder's examples, all of one shape: `ImageFolder` and `VideoFolder`."""

    folder: Path
    names: list[str]
    sheets: list[str]
    """Contact sheets, which are left out."""
    resolution: int

    @property
    def kind(self) -> str:
        """What one of them is called."""
        ...

    @property
    def frames(self) -> int:
        """Of each example."""
        ...

    def preparation(self) -> dict[str, Any]:
        """How examples are made of the files, as a card says it."""
        ...

    def decoder(self) -> str:
        """What reads the files, and its version."""
        ...

    def read(self, name: str, /) -> tuple[UInt8[np.ndarray, "*t h w 3"], bool]:
        """One example, and whether it had to be enlarged. Raises ValueError, naming the file."""
        ...


def open_both(a: Path, b: Path, resolution: int | None, clip: Clip | None) -> tuple[Examples, Examples]:
    """Both folders, of images or of videos by what they hold: GIFs, WebPs and PNGs are videos if they are animated.

    Without a resolution all must be squares of one size; the clip is for videos, and by default `Clip()`.
    Raises FileNotFoundError, NotADirectoryError, and ValueError for folders of different kinds or with both in one,
    with fewer than two examples, of different sizes, with a file that cannot be read; and for a clip of images.
    """
    kinds = {folder: _kind(folder) for folder in (a, b)}
    if kinds[a] != kinds[b]:
        raise ValueError(f"{a} holds {kinds[a]}s and {b} {kinds[b]}s: give two folders of one kind")
    if kinds[a] == "video":
        reference, compared = (VideoFolder(folder, resolution, clip or Clip()) for folder in (a, b))
    elif clip is None:
        reference, compared = (ImageFolder(folder, resolution) for folder in (a, b))
    else:
        raise ValueError(f"{a} and {b} hold images: --frames and --stride are for videos")
    both = reference, compared
    for each in both:
        if len(each.names) < 2:
            raise ValueError(f"{each.folder} holds one {each.kind}: a comparison needs at least 2 in each folder")
    if reference.resolution != compared.resolution:
        sizes = " and ".join(f"{each.folder} {each.resolution}×{each.resolution}" for each in both)
        raise ValueError(f"the {reference.kind}s have two sizes, {sizes}: give a --resolution")
    return both


def _kind(folder: Path) -> str:
    require_folder(folder, "images or videos")
    videos = find_videos(folder)
    moving = set(videos)
    images = [name for name in find_images(folder) if name not in moving and not SHEETS.fullmatch(name)]
    if images and videos:
        raise ValueError(
            f"{folder} holds images (such as {images[0]}) and videos (such as {videos[0]}): keep one kind in a folder"
        )
    if not images and not videos:
        suffixes = " ".join(dict.fromkeys(SUFFIXES + VIDEO_SUFFIXES + ANIMATIONS))
        raise ValueError(f"no images in {folder}, and no videos (looked for {suffixes}, subfolders included)")
    return "video" if videos else "image"
