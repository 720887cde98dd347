"""Small videos for tests, written without loss."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LOSSLESS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mkv": ("ffv1", "bgr0", {}),
    ".mp4": ("libx264rgb", "rgb24", {"qp": "0"}),
    ".m4v": ("libx264rgb", "rgb24", {"qp": "0"}),
    ".mov": ("qtrle", "rgb24", {}),
    ".avi": ("png", "rgb24", {}),
    ".webm": ("libvpx-vp9", "gbrp", {"lossless": "1"}),
}
"""Codec, pixel format and options that keep RGB as it is, by suffix."""


def write_video(
    path: Path, frames: np.ndarray, rotation: tuple[float, bool, bool] | None = None, **options: Any
) -> None:
    """`t h w 3` uint8, or `t h w 4` for an encoder of alpha; `rotation` as PyAV takes it: degrees, mirrors.

    Of `options`, `codec`, `pixels` and `format` go before what the suffix stands for; `times`, in tenths of a second,
    make a variable frame rate, and `rate` is the nominal one, 10 by default.
    """
    codec, pixels, settings = LOSSLESS.get(path.suffix, ("", "", {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=options.get("format")) as container:
        # MPEG-2 knows no rate of ten; the times below are what counts.
        rate = options.get("rate", 10)
        stream: Any = container.add_stream(options.get("codec", codec), rate=rate, options=dict(settings))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = options.get("pixels", pixels)
        if rotation:
            stream.set_display_rotation(*rotation)
        times = options.get("times", range(len(frames)))
        for time, frame in zip(times, frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, "rgba" if frame.shape[-1] == 4 else "rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """`count` frames of random pixels, a little short of white."""
    return np.random.default_rng(seed).integers(0, 246, (count, height, width, 3), dtype=np.uint8)
