"""Video files, read a frame at a time: upright, on white, as RGB.

Video files are decoded by PyAV (FFmpeg's libraries; `pip install "ulx[video]"`), GIFs and animated WebPs and PNGs by
Pillow, by which their first frame is the same as where they are read as an image (but for a PNG's picture for readers
that know no animation, which is none of its frames).

Where implementations go apart:

* YUV becomes RGB by libswscale, with the matrix and the range that the file states (BT.601 and limited where it states
  none), rounded exactly. libswscale's default is a faster way for 4:2:0, the usual sampling: on flat colours its levels
  come out 1.2 too low on average, and up to 2.7 off.
* Frames are counted as they are stored, in the order of showing, whatever their times: a video of a variable frame rate
  is not resampled, and none is brought to another rate.
* A frame is turned and mirrored as the file's display matrix says. Pixels are taken for squares, interlaced fields are
  not separated, HDR's transfer functions are left as they are.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ulx.data.cache import UnreadableError
from ulx.data.extras import optional
from ulx.data.image import center_crop, find_files, image_size, reason_of, upright_rgb

__all__ = [
    "SUFFIXES",
    "Clip",
    "ShortError",
    "decoders",
    "exact_rgb",
    "find_videos",
    "frames",
    "frames_of_size",
    "pictures",
    "read_clip",
    "video_size",
]

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg")
PNG = ".png"
ANIMATIONS = (".gif", ".webp", PNG)
"""Read by Pillow; those of one frame are images. PNGs are what the commands write of clips."""

SLACK = 2.0
"""Seconds by which a file may be longer than the clip that it was cut to."""
TOLERANCE = 1e-3
"""Of times, in seconds: Matroska counts in this, and frames are much further apart."""

Picture = Callable[[], Any]
"""Makes a frame's upright RGB `PIL.Image`: to be called before the next frame is asked for, or not at all."""


class ShortError(UnreadableError):
    """A video has fewer frames than are wanted of it."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames that are taken of a video: the first, and then every `stride`-th."""

    frames: int = 16
    stride: int = 1

    def __post_init__(self):
        for name in ("frames", "stride"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def span(self) -> int:
        """How many frames a video must have."""
        return (self.frames - 1) * self.stride + 1

    def of(self, frames: int | None) -> "Clip":
        """A clip of another length, if it is given, of the same stride."""
        return self if frames is None else dataclasses.replace(self, frames=frames)


def find_videos(folder: Path, *, strict: bool = True) -> list[str]:
    """Relative paths (with `/`) of all video files under a folder, sorted, and of GIFs, WebPs and PNGs if they are
    animated.

    Raises ValueError for a GIF or a WebP that cannot be read, naming it; where this is not `strict`, it counts as a
    video, and whoever reads it says what ails it.
    """
    found = find_files(folder, SUFFIXES + ANIMATIONS)
    moving = {name: _moves(folder / name) for name in found if _is_animation(name)}
    # A PNG that cannot be read is what the others are.
    among_clips = any(moves is True for name, moves in moving.items() if name.lower().endswith(PNG))

    def is_video(name: str) -> bool:
        moves = moving.get(name, True)
        if not isinstance(moves, Exception):
            return moves
        if name.lower().endswith(PNG):
            return among_clips
        if strict:
            raise ValueError(f"{folder / name} cannot be read ({reason_of(folder / name, moves)}): repair or remove it")
        return True

    return [name for name in found if is_video(name)]


def frames(path: Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields all frames of a video, at its own size. Raises `UnreadableError` with the reason."""
    decoding = pictures(path)  # which may lack its package: no fault of the file
    with _with_reason(path):
        for picture in decoding:
            yield np.asarray(picture())


def frames_of_size(
    path: Path, resolution: int, enlarged: list[bool], seconds: tuple[float, float] | None = None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields all frames prepared as images are (`ulx.data.image.read_image`): on white, centre-cropped to
    `resolution`; of a video (not of an animation) that is longer than what is between the two `seconds`, by more than
    `SLACK`, those between them alone. Adds to `enlarged`, before the first, whether they had to be. Raises
    `UnreadableError` with the reason."""
    decoding = pictures(path, seconds)  # which may lack its package: no fault of the file
    with _with_reason(path):
        for picture in decoding:
            image = picture()
            if not enlarged:
                enlarged.append(min(image.size) < resolution)
            yield center_crop(image, resolution)
        if not enlarged:
            raise UnreadableError("holds no frame")


def read_clip(path: Path, clip: Clip, resolution: int) -> tuple[UInt8[np.ndarray, "t h w 3"], bool]:
    """The clip's frames, prepared as images are (`ulx.data.image.read_image`): on white, centre-cropped to
    `resolution`; and whether they had to be enlarged for that.

    Nothing is decoded after the last of them. Raises `ShortError`, and `UnreadableError` with the reason for files that
    are damaged up to there, hold no video, or whose frames change their size.
    """
    found, smaller, count = [], False, 0
    decoding = pictures(path)  # which may lack its package: no fault of the file
    with _with_reason(path), contextlib.closing(decoding) as opened:
        for count, picture in enumerate(opened, start=1):
            if (count - 1) % clip.stride == 0:
                image = picture()
                smaller = min(image.size) < resolution
                found.append(center_crop(image, resolution))
                if len(found) == clip.frames:
                    return np.stack(found), smaller
    has = "1 frame" if count == 1 else f"{count} frames"
    raise ShortError(f"has {has}, and {clip.frames} with a stride of {clip.stride} need {clip.span}")


def video_size(path: Path) -> tuple[int, int]:
    """Width and height as the file's header has them, before it is turned upright. Raises `UnreadableError`."""
    if _is_animation(path.name):
        return image_size(path)
    av = optional("av", extra="video")
    with _with_reason(path), _open(path, av) as container:
        stream = _stream(container)
        return stream.codec_context.width, stream.codec_context.height


def decoders(names: Iterable[str]) -> str:
    """The versions of what decodes files of these names."""
    found = set()
    for animation in {_is_animation(name) for name in names}:
        if animation:
            found.add(f"Pillow {optional('PIL').__version__}")
        else:
            av = optional("av", extra="video")
            parts = (f"{part} {'.'.join(map(str, av.library_versions[part]))}" for part in ("libavcodec", "libswscale"))
            found.add(f"PyAV {av.__version__} ({', '.join(parts)})")
    return ", ".join(sorted(found))


def _is_animation(name: str) -> bool:
    return name.lower().endswith(ANIMATIONS)


def _moves(path: Path) -> bool | Exception:
    """What its reading raised, of a file that cannot be read."""
    image_module = optional("PIL.Image")
    try:
        with image_module.open(path) as opened:
            frames = opened.n_frames - 1 if _has_another_picture(opened) else 2
            return getattr(opened, "is_animated", False) and frames > 1
    except Exception as error:  # damaged bytes raise anything in Pillow's decoders
        return error


def pictures(path: Path, seconds: tuple[float, float] | None = None) -> Generator[Picture, None, None]:
    """One for each frame, in the order of showing; only what is called is converted. `seconds` as above, of videos that
    are no animations."""
    if _is_animation(path.name):
        return _of_animation(path, optional("PIL.Image"), optional("PIL.ImageSequence"))
    return _of_video(path, optional("av", extra="video"), seconds)


def _of_animation(path: Path, image_module: Any, sequence_module: Any) -> Generator[Picture, None, None]:
    with image_module.open(path) as opened:
        first = int(_has_another_picture(opened))
        for image in itertools.islice(sequence_module.Iterator(opened), first, None):
            yield functools.partial(upright_rgb, image)


def _has_another_picture(opened: Any) -> bool:
    """Whether Pillow counts as the first frame what a PNG shows to readers that know no animation."""
    return getattr(opened, "default_image", False)


def _of_video(path: Path, av: Any, seconds: tuple[float, float] | None) -> Generator[Picture, None, None]:
    with _open(path, av) as container:
        first, stream = None, _stream(container)
        cut = _cut(container, seconds, av)
        for index, frame in enumerate(_decoded(container, stream, cut)):
            if frame.is_corrupt:
                raise UnreadableError(f"its frame {index}{' of the clip' * (cut is not None)} is damaged")
            size = frame.width, frame.height
            first = first or size
            if size != first:
                raise UnreadableError(f"its frames change from {first[0]}×{first[1]} to {size[0]}×{size[1]} pixels")
            yield functools.partial(_picture, frame, av)


def _cut(container: Any, seconds: tuple[float, float] | None, av: Any) -> tuple[float, float] | None:
    """`seconds`, if the file is longer than what is between them: the whole video. One that was cut to them already
    begins at 0, and may be some seconds longer, to the next key frame."""
    if seconds is None:
        return None
    if container.duration is None:  # a recording that was never closed has none
        raise UnreadableError("does not say how long it is: it may be the clip, or the whole video")
    begin, end = seconds
    length, of_clip = container.duration / av.time_base, end - begin
    if length > begin:
        return seconds if length > of_clip + SLACK else None
    if length > 2 * of_clip:
        raise UnreadableError(f"is {length:.0f} seconds long: over before second {begin:g}, and longer than the clip")
    return None


def _decoded(container: Any, stream: Any, seconds: tuple[float, float] | None) -> Iterator[Any]:
    """The stream's frames, or those between two times."""
    if seconds is None:
        yield from container.decode(stream)
        return
    begin, end = seconds
    found = False
    for frame, time in _from_before(container, stream, begin):
        if time >= end - TOLERANCE:
            break
        if time >= begin - TOLERANCE:
            found = True
            yield frame
    if not found:
        raise UnreadableError(f"has no frame between seconds {begin:g} and {end:g}")


def _from_before(container: Any, stream: Any, begin: float) -> Iterator[tuple[Any, float]]:
    """Frames with their seconds, from one on that is not after `begin`. Where a file has no index a jump to a time may
    land behind it: then it is tried from further ahead, and last from the first frame."""
    start = (stream.start_time or 0) * stream.time_base

    def seconds(frame: Any) -> float:
        if frame.time is None:
            raise UnreadableError("its frames have no times")
        return float(frame.time - start)

    margin = 1.0
    while True:
        target = max(0.0, begin - margin)
        container.seek(round((target + start) / stream.time_base), stream=stream)  # to the last key frame before
        frames = container.decode(stream)
        first = next(frames, None)
        if target == 0 or (first is not None and seconds(first) <= begin + TOLERANCE):
            break
        margin *= 4
    for frame in frames if first is None else itertools.chain([first], frames):
        yield frame, seconds(frame)


def _open(path: Path, av: Any) -> Any:
    # Text in another encoding, of which PyAV makes an error before 19, is no reason to refuse a video; and a playlist
    # under a video's name is not followed out of this machine.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(str(path), options={"protocol_whitelist": "file"}, **lenient)


def _stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise UnreadableError("has no video stream")
    return stream


def _picture(frame: Any, av: Any) -> Any:
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", interpolation=exact_rgb(av))
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is not None:
        pixels = np.ascontiguousarray(_turned(pixels, np.frombuffer(bytes(matrix), np.int32)))
    return upright_rgb(optional("PIL.Image").fromarray(pixels))


def exact_rgb(av: Any) -> Any:
    """libswscale's flags for conversions between YUV and RGB that round exactly."""
    flags = av.video.reformatter.Interpolation
    return flags.BILINEAR | flags.ACCURATE_RND | flags.BITEXACT | flags.FULL_CHR_H_INT


def _turned(pixels: UInt8[np.ndarray, "h w c"], matrix: np.ndarray) -> UInt8[np.ndarray, "_h _w c"]:
    """By FFmpeg's display matrix, rows (a b u; c d v; x y w) in fixed point: (x, y) is shown at (ax + cy, bx + dy)."""
    one = 1 << 16
    a, b, c, d = (int(np.rint(matrix[i] / one)) for i in (0, 1, 3, 4))
    entries = tuple(map(abs, (a, b, c, d)))
    off = np.abs(matrix[[0, 1, 3, 4]] - np.array([a, b, c, d]) * one).max()
    if off > 1 or entries not in ((1, 0, 0, 1), (0, 1, 1, 0)):
        raise UnreadableError("is to be shown turned by an angle, or scaled: only quarter turns and mirrors are known")
    if a == 0:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]


@contextlib.contextmanager
def _with_reason(path: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableError:
        raise
    except Exception as error:  # of PyAV's and Pillow's decoders, which damaged bytes make raise anything
        # FFmpeg's own words, without its function's name and number.
        reason = getattr(error, "strerror", None) or reason_of(path, error)
        if not path.exists():
            reason = reason_of(path, FileNotFoundError())
        elif path.stat().st_size == 0:
            reason = "is empty"
        raise UnreadableError(reason) from error
