"""Errors between the two files of one name in two folders."""

from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float

from ulx.data.pixels import to_float
from ulx.metrics import lpips
from ulx.metrics.entries import Metric, mean
from ulx.metrics.examples import Examples
from ulx.metrics.images import SSIM_WINDOW, psnr, ssim
from ulx.progress import Progress

__all__ = ["SSIM", "PairMeasure", "errors", "measures", "namesakes"]

AVERAGED = {
    "image": ("of each pair of one name", "mean over pairs", "equal pairs"),
    "video": ("of each frame of a pair of one name", "mean over its frames, then over pairs", "those with equal ones"),
}
SMALLEST = {
    "ssim": (SSIM_WINDOW, "its window has"),
    lpips.METRIC: (lpips.MIN_SIZE, "its network needs"),
}
"""Pixels each way that a measure needs, and why."""

SSIM = f"""\
{SSIM_WINDOW}×{SSIM_WINDOW} Gaussian window of σ 1.5 within the image, K1 0.01, K2 0.03, range 0 to 1, mean over RGB"""
PairMeasure = Callable[..., Float[Array, " b"]]
"""measure(a, b) of two batches of images in [-1, 1]."""


def measures(with_lpips: bool) -> dict[str, PairMeasure]:
    """PSNR, SSIM, and LPIPS if asked: then ModuleNotFoundError without the package of its weights."""
    found: dict[str, PairMeasure] = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim)}
    return found | ({lpips.METRIC: eqx.filter_jit(lpips.load())} if with_lpips else {})


def namesakes(a: Examples, b: Examples) -> list[tuple[str, str]] | None:
    """The files of one name in both, or None unless every file has its other one."""
    if a.names == b.names:
        return list(zip(a.names, b.names, strict=True))
    of_a, of_b = (dict(zip(_without_suffixes(folder.names), folder.names, strict=True)) for folder in (a, b))
    if of_a.keys() != of_b.keys() or not len(of_a) == len(a.names) == len(b.names):
        return None
    return [(of_a[name], of_b[name]) for name in of_a]


def _without_suffixes(names: list[str]) -> list[str]:
    """A name's suffix does not count (`ulx.reconstruct` makes a.png of a.jpg), unless that makes two names one."""
    plain = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    times = Counter(plain)
    return [short if times[short] == 1 else name for name, short in zip(names, plain, strict=True)]


def errors(
    measures: dict[str, PairMeasure],
    a: Examples,
    b: Examples,
    names: list[tuple[str, str]],
    batch_size: int,
    *,
    given: int = 0,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """What `measures` find in the pairs, in every frame of a video by itself after the first `given` ones, and why some
    are left out.

    `batch_size` images or frames are held at a time, and one pair at least.
    """
    left_out = {}
    for name, (least, why) in SMALLEST.items():
        if name in measures and a.resolution < least:
            left_out[name] = f"{why} {least}×{least} pixels, the {a.kind}s are smaller"
    used = {name: measure for name, measure in measures.items() if name not in left_out}
    values: dict[str, list[np.ndarray]] = {name: [] for name in used}
    size = max(1, batch_size // a.frames)
    with Progress("pairs", total=len(names), unit="pairs") as progress:
        for start in range(0, len(names), size):
            part = names[start : start + size]
            both = (np.stack([each.read(pair[side])[0] for pair in part]) for side, each in enumerate((a, b)))
            if given:
                both = (clips[:, given:] for clips in both)
            x, y = (to_float(examples.reshape(-1, *examples.shape[-3:])) for examples in both)
            for name, measure in used.items():
                of_frames = np.asarray(measure(x, y), np.float64)
                values[name].append(of_frames.reshape(len(part), -1).mean(axis=1))
            progress.advance(len(part))
    definitions = _definitions(a.kind, given)
    found = {}
    for name, parts in values.items():
        metric = mean(np.concatenate(parts))
        found[name] = metric | {"n_pairs": metric.pop("n"), "definition": definitions[name]}
    return found, left_out


def _definitions(kind: str, given: int) -> dict[str, str]:
    each, mean, equal = AVERAGED[kind]
    if given:
        each = f"{each}, after the first {given}"
    return {
        "psnr": f"10 log10(255²/MSE) in dB {each}, {mean}; {equal}, whose mean is infinite, are left out and counted",
        "ssim": f"structural similarity {each}, {mean}: {SSIM}",
        lpips.METRIC: f"distance {each} in VGG16's activations, {mean} ({lpips.DEFINITION})",
    }
