"""Folders of video files, beside those of images (`ulx.image_files`)."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ulx.data.cache import UnreadableError
from ulx.data.image import PREPARATION, find_images, require_folder
from ulx.data.video import ANIMATIONS, SUFFIXES, Clip, ShortError, decoders, find_videos, read_clip, video_size
from ulx.image_files import SHEETS, one_size, unreadable

__all__ = ["VideoFolder"]

RULE = f"""\
frames decoded to RGB, by the matrix and range that a file states (BT.601, limited, where none), rounded exactly \
(ulx.data.video), upright, on white, halved by averaging while at least twice too large, then bicubic to the \
resolution, centre-cropped (ulx.data.image.read_image, version {PREPARATION}); the network resizes further"""
CLIP = """\
from the first frame of a video, every stride-th as stored, whatever their times; all of them count, those that a \
model was given too"""


class VideoFolder:
    """The videos of a folder: of each the frames of a `clip`, prepared as images are, at `resolution`.

    With None for it they must be squares of one size already, and that is the resolution.
    `names` are the relative paths of all video files, sorted, animated GIFs, WebPs and PNGs among them; `sheets`
    those of contact sheets written by the commands. Raises FileNotFoundError, NotADirectoryError, ValueError for a
    folder without videos, for a GIF or a WebP that cannot be read, and without a resolution for videos that are not of
    one size or whose size cannot be read.
    """

    kind = "video"

    def __init__(self, folder: Path, resolution: int | None, clip: Clip):
        require_folder(folder, "videos")
        self.folder, self.clip, self.frames = folder, clip, clip.frames
        self.names = find_videos(folder)
        self.sheets = [name for name in find_images(folder) if SHEETS.fullmatch(name)]
        if not self.names:
            looked_for = f"{' '.join(SUFFIXES)}, and animated {' '.join(ANIMATIONS)}"
            raise ValueError(f"no videos in {folder} (looked for {looked_for}, subfolders included)")
        self.resolution = one_size(folder, self.names, video_size, "video") if resolution is None else resolution

    def preparation(self) -> dict[str, Any]:
        """How clips are made of the files, as a card says it."""
        clip = {"frames": self.clip.frames, "stride": self.clip.stride, "rule": CLIP}
        return {"preparation": RULE, "clip": clip}

    def decoder(self) -> str:
        """What reads the files, and its version."""
        return decoders(self.names)

    def read(self, name: str) -> tuple[UInt8[np.ndarray, "t h w 3"], bool]:
        """One clip, and whether it had to be enlarged. Raises ValueError for a file that cannot be read or has too few
        frames, naming it."""
        file = self.folder / name
        try:
            return read_clip(file, self.clip, self.resolution)
        except ShortError as error:
            raise ValueError(f"{file} {error}: give smaller --frames or --stride, or remove it") from error
        except UnreadableError as error:
            raise unreadable(file, "video", error) from error
