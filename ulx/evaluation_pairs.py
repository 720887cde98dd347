"""What an evaluation says of pairs: reconstructions and their originals, latents that were swapped, continuations."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float, UInt8

from ulx.data.pixels import to_float
from ulx.metrics import lpips
from ulx.metrics.entries import Metric, mean
from ulx.metrics.images import SSIM_WINDOW, psnr, ssim
from ulx.metrics.pairs import PairMeasure
from ulx.typing import PerExample

__all__ = ["NEXT", "continuation", "errors", "mean_psnr", "swap"]

NEXT = 3
"""Frames after the given ones by which continuations are judged against the last of these, repeated."""

Images = UInt8[np.ndarray, "..."]
"""Images `n h w c`, or clips `n t h w c`."""


def errors(images: Images, originals: Images, distance: PairMeasure | None) -> dict[str, Metric]:
    """What pairs say: PSNR; SSIM and, if it is given, LPIPS where the images are large enough for it."""
    metrics, side = {"psnr": mean_psnr(images, originals)}, min(images.shape[-3:-1])
    if side >= SSIM_WINDOW:
        metrics["ssim"] = _of_pairs(ssim, images, originals)
    if distance is not None and side >= lpips.MIN_SIZE:
        metrics[lpips.METRIC] = _of_pairs(eqx.filter_jit(distance), images, originals)
    return metrics


def mean_psnr(images: Images, originals: Images) -> Metric:
    return mean(_by_parts(psnr, images, originals))


def _by_parts(measure: PairMeasure, images: Images, originals: Images, rows: int = 64) -> Float[np.ndarray, " n"]:
    """Of each pair; so many at a time are held as floats."""
    parts = [slice(start, start + rows) for start in range(0, len(images), rows)]
    return np.concatenate([measure(to_float(images[part]), to_float(originals[part])) for part in parts])


def _of_pairs(measure: PairMeasure, images: Images, originals: Images) -> Metric:
    """Of clips, every frame's, averaged over each clip first."""
    x, y = (each.reshape(-1, *each.shape[-3:]) for each in (images, originals))
    return mean(_by_parts(measure, x, y).reshape(len(images), -1).mean(axis=1))


def continuation(continued: Images, originals: Images, given: int) -> dict[str, Metric]:
    """Of the frames after the given ones, and of the last given one in their place."""
    after = slice(given, given + NEXT)
    wanted = originals[:, after]
    repeated = np.broadcast_to(originals[:, given - 1 : given], wanted.shape)
    own, other = (_by_parts(psnr, each, wanted) for each in (continued[:, after], repeated))
    return {"psnr": mean(own), "psnr_of_last_frame": mean(other), "gap": _gap(own, other)}


def swap(swapped: Images, originals: Images) -> dict[str, Any]:
    """Image i's decoder noise with image i − 1's latent: to which original is the result near?"""
    count = len(swapped)
    own = psnr(to_float(swapped), to_float(np.roll(originals, 1, axis=0)[:count]))
    other = psnr(to_float(swapped), to_float(originals[:count]))
    return {"psnr_to_the_latents_image": mean(own), "psnr_to_the_other": mean(other), "gap": _gap(own, other)}


def _gap(own: PerExample | Float[np.ndarray, " b"], other: PerExample | Float[np.ndarray, " b"]) -> Metric:
    """Of PSNRs, in dB; none where both are infinite."""
    one, two = np.asarray(own), np.asarray(other)
    return mean(np.subtract(one, two, out=np.zeros_like(one), where=one != two))
