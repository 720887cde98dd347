"""Are samples copies of training images? By pixels, against what the decoder and chance alone would give."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from ulx.data.source import Split
from ulx.metrics.images import nearest

__all__ = ["NEAREST_AMONG", "copies_among", "spread_over"]

SIDE = 32
NEAREST_AMONG = 50_000
"""Training images among which the nearest one to a sample is sought; in a larger set, that many spread over it."""

Images = UInt8[np.ndarray, "_n _h _w _c"]


def copies_among(
    train: Split, samples: Images, held_out: Images, originals: Images, reconstructions: Images
) -> tuple[dict[str, Any], Int[np.ndarray, " n"]]:
    """Are samples copies, and which training image is nearest to each? By pixels, at 32×32 or less.

    A sample counts as a copy where it is as near to a training image as that image's own reconstruction typically is:
    closer than that the decoder cannot come even to an image it was given. The same share among held-out images, real
    and surely no copies, says how much of it is chance.
    """
    kept = spread_over(len(train), NEAREST_AMONG)
    thumbnails = np.concatenate([_thumbnails(train[i]["image"][None]) for i in kept])
    index, distance = nearest(_thumbnails(samples), thumbnails)
    _, held_out_distance = nearest(_thumbnails(held_out), thumbnails)
    difference = _thumbnails(originals) - _thumbnails(reconstructions)
    threshold = float(np.median(np.sqrt(np.sum(difference**2, axis=(1, 2, 3)))))
    rms = 1 / np.sqrt(thumbnails[0].size)  # distances are reported per pixel and channel, in grey levels of 255
    return {
        "share_of_samples": float(np.mean(distance <= threshold)),
        "share_of_held_out_images": float(np.mean(held_out_distance <= threshold)),
        "threshold": threshold * rms,
        "median_distance_of_samples": float(np.median(distance)) * rms,
        "median_distance_of_held_out_images": float(np.median(held_out_distance)) * rms,
        "n": len(samples),
        "n_reference": len(thumbnails),
        "space": "RMS difference in grey levels of 255, at 32x32 pixels or less",
    }, np.asarray(kept)[index]


def _thumbnails(images: Images) -> Float[np.ndarray, "n h w c"]:
    """Averaged over blocks down to at most 32 pixels; these are not all of one size where 32 does not divide it."""
    return np.stack([_averaged(_averaged(image.astype(np.float32), 0), 1) for image in images])


def _averaged(image: Float[np.ndarray, "h w c"], axis: int) -> Float[np.ndarray, "_h _w c"]:
    size = image.shape[axis]
    begins = np.arange(min(size, SIDE)) * size // min(size, SIDE)
    counts = np.diff(begins, append=size).astype(np.float32)
    return np.add.reduceat(image, begins, axis=axis) / np.expand_dims(counts, [i for i in range(3) if i != axis])


def spread_over(total: int, count: int) -> list[int]:
    """`count` indices spread over range(total)."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
