"""Examples that stay compressed in their records, and are decoded when they are read.

An image is kept as lossless WebP or as JPEG of quality 95 without chroma subsampling; a clip as H.264, also without
chroma subsampling, all of its frames, so that a training example is cut out of it anew each time. Every twelfth frame
is coded by itself: to reach any frame, eleven others are decoded at most. What this costs in bytes and in fidelity was
measured (benchmarks/data_throughput.py): at equal PSNR H.264 takes less than a quarter of JPEG's bytes.

An encoder's output is the same for the same version of its library, whatever the number of threads around it.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from ulx.data.extras import optional
from ulx.data.source import Example, Source
from ulx.data.video import Clip, ShortError, exact_rgb, frames_of_size

__all__ = [
    "CRF",
    "VIDEO_BYTES",
    "Encoded",
    "ImageCodec",
    "decode_clip",
    "decode_image",
    "encode_clip",
    "encode_image",
    "image_encoder",
    "read_video",
    "video_encoder",
]

ImageCodec = Literal["webp", "jpeg"]
CODECS = {
    "webp": {"format": "WEBP", "lossless": True, "quality": 40, "method": 2},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
CRF = 12
"""x264's constant rate factor: about as near as JPEG of quality 95 at 128×128, 41 dB."""
VIDEO_BYTES = 40
"""Of a video of ten seconds, for each pixel of a frame, about."""
KEYFRAME_EVERY = 12
RATE = 25  # frames are counted, not timed; a container wants a number

Bytes = UInt8[np.ndarray, " n"]
Image = UInt8[np.ndarray, "h w 3"]


def encode_image(image: Image, codec: ImageCodec) -> Bytes:
    buffer = io.BytesIO()
    optional("PIL.Image").fromarray(image).save(buffer, **CODECS[codec])
    return np.frombuffer(buffer.getvalue(), np.uint8)


def image_encoder() -> str:
    """Who encodes images, and the version: another may give other bytes."""
    return f"Pillow {optional('PIL').__version__}"


def video_encoder() -> str:
    """Who encodes videos, and the versions."""
    av = optional("av", extra="video")
    return f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


def decode_image(content: Bytes) -> Image:
    with optional("PIL.Image").open(io.BytesIO(content.tobytes())) as opened:
        return np.asarray(opened.convert("RGB"))


def encode_clip(frames: Iterable[Image], crf: int = CRF) -> tuple[Bytes, int]:
    """H.264 in an MP4 file, and how many frames went into it; of even height and width. Holds one frame at a time.

    Raises ValueError for no frames.
    """
    av = optional("av", extra="video")
    buffer, stream = io.BytesIO(), None
    settings = {"crf": str(crf), "g": str(KEYFRAME_EVERY), "sc_threshold": "0", "bf": "0", "threads": "1"}
    # Without it, x264 (of PyAV 18.1) does not always give the same bytes for the same frames.
    settings |= {"x264-params": "mbtree=0"}
    with av.open(buffer, "w", format="mp4") as container:
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=RATE, options=settings)
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv444p"
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv444p", interpolation=exact_rgb(av))))
        if stream is None:
            raise ValueError("a clip has at least one frame")
        container.mux(stream.encode(None))
        count = stream.frames
    return np.frombuffer(buffer.getvalue(), np.uint8), count


def decode_clip(content: Bytes, first: int, clip: Clip) -> UInt8[np.ndarray, "t h w 3"]:
    """The clip that begins with frame `first`. Raises ValueError for one that ends behind the last frame."""
    av = optional("av", extra="video")
    wanted = range(first, first + clip.span, clip.stride)
    found = []
    with av.open(io.BytesIO(content.tobytes())) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # the loader has its own workers
        ticks = 1 / (RATE * stream.time_base)  # of a frame
        container.seek(int(first * ticks), stream=stream)
        for frame in container.decode(stream):
            if frame.pts / ticks in wanted:
                found.append(frame.to_ndarray(format="rgb24", interpolation=exact_rgb(av)))
                if len(found) == clip.frames:
                    return np.stack(found)
    raise ValueError(f"frames {first} to {wanted[-1]} are wanted of a video that ends before")


def read_video(
    path: Path, resolution: int, at_least: int, crf: int = CRF, seconds: tuple[float, float] | None = None
) -> tuple[Example, str | None]:
    """A video file's example, and a remark if its frames had to be enlarged.

    Of a video file that is longer than what is between the two `seconds` only that is kept (`frames_of_size`). Frames
    are prepared as images are. Raises `ShortError` for a video of fewer than `at_least` frames, and
    `UnreadableError` with the reason for a damaged one.
    """
    enlarged = []
    content, count = encode_clip(frames_of_size(path, resolution, enlarged, seconds), crf)
    if count < at_least:
        raise ShortError(f"has {count} frame{'s' * (count != 1)}, and at least {at_least} are wanted")
    remark = f"smaller than {resolution} pixels" if enlarged[0] else None
    return {"h264": content, "frames": np.asarray(count, np.int32)}, remark


@dataclass(frozen=True)
class Encoded:
    """The decoded examples of records; a `Source`. Of a clip it reads the first frames, and draws any.

    Raises `ShortError` for a video that has not as many.
    """

    records: Source
    clip: Clip | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self._decoded(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """With clips that begin anywhere, all places equally likely."""
        return self._decoded(index, rng)

    def _decoded(self, index: int, rng: np.random.Generator | None) -> Example:
        example = dict(self.records[index])
        if self.clip is None:
            (codec,) = CODECS.keys() & example.keys()
            return {"image": decode_image(example.pop(codec)), **example}
        count = int(example.pop("frames"))
        places = count - self.clip.span + 1
        if places < 1:
            raise ShortError(f"has {count} frame{'s' * (count != 1)}, and {self.clip.span} are wanted")
        first = 0 if rng is None else int(rng.integers(places))
        return {"image": decode_clip(example.pop("h264"), first, self.clip), **example}
