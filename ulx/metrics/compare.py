"""Two folders of images measured against each other: every number on a card with what it is and what went in.

The first folder, A, is the reference: real images, or the originals. The second, B, is what is measured against it.
"""

import hashlib
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

import ulx
from ulx.data.folder import PREPARATION, read_image
from ulx.data.pixels import to_float
from ulx.image_files import ImageFolder
from ulx.metrics import efficientnet, lpips
from ulx.metrics.features import FeatureNetwork, features
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.images import SSIM_WINDOW, psnr, ssim
from ulx.metrics.kernel import kernel_distance
from ulx.metrics.manifold import NEIGHBOURS, precision_recall
from ulx.progress import Progress

__all__ = ["SSIM", "PairMeasure", "commit", "compare", "definitions", "kernel_and_manifolds"]

RULE = f"""\
upright, on white, halved by averaging while at least twice too large, then bicubic to the resolution, centre-cropped \
(ulx.data.folder.read_image, version {PREPARATION}); the network resizes further"""

FRECHET = """\
Fréchet distance between Gaussians fitted to the pooled features of A and of B, unbiased covariances; biased upwards, \
the more the smaller N"""
KERNEL = """\
KID's estimator on the pooled features: unbiased squared MMD of the kernel (x·y/d + 1)^3 over all pairs; standard \
error by the jackknife"""
NAMESAKES = {"frechet": "FID", "kernel": "KID"}
NOT_INCEPTION = "{}. Not {}, whose features are InceptionV3's"
PRECISION = f"share of B's features within the manifold of A's: balls that reach neighbour {NEIGHBOURS}"
RECALL = f"share of A's features within the manifold of B's: balls that reach neighbour {NEIGHBOURS}"
SSIM = f"""\
{SSIM_WINDOW}×{SSIM_WINDOW} Gaussian window of σ 1.5 within the image, K1 0.01, K2 0.03, range 0 to 1, mean over RGB"""
OF_PAIRS = {
    "psnr": "10 log10(255²/MSE) in dB of each pair of one name, mean over pairs; null: infinite, from an equal pair",
    "ssim": f"structural similarity of each pair of one name, mean over pairs: {SSIM}",
    lpips.METRIC: f"distance of each pair of one name in VGG16's activations, mean over pairs ({lpips.DEFINITION})",
}
SMALLEST = {
    "ssim": (SSIM_WINDOW, "its window has"),
    lpips.METRIC: (lpips.MIN_SIZE, "its network needs"),
}
"""Pixels each way that a measure of pairs needs, and why."""

Images = UInt8[np.ndarray, "n h w 3"]
Metric = dict[str, Any]
PairMeasure = Callable[..., Float[Array, " b"]]
"""measure(a, b) of two batches of images in [-1, 1]."""


def compare(
    a: Path,
    b: Path,
    *,
    resolution: int | None = None,
    batch_size: int = 64,
    networks: Sequence[FeatureNetwork] = (),
    with_lpips: bool = False,
) -> dict[str, Any]:
    """The card: all metrics that the two folders allow under "metrics", why others are not there under "left_out".

    Without a resolution all images must be squares of one size. `batch_size` images are read at a time; changes no
    result beyond rounding. By features of EfficientNet-lite0, and of `networks` as well; pairs by LPIPS too if asked.
    Raises FileNotFoundError, NotADirectoryError, ValueError for a folder with fewer than two images, a file that cannot
    be read, or images of several sizes, ModuleNotFoundError without the package of LPIPS's weights.
    """
    folders = reference, compared = ImageFolder(a, resolution), ImageFolder(b, resolution)
    for folder in folders:
        if len(folder.names) < 2:
            raise ValueError(f"{folder.folder} holds one image: a comparison needs at least 2 in each folder")
    if reference.resolution != compared.resolution:
        sizes = " and ".join(f"{folder.folder} {folder.resolution}×{folder.resolution}" for folder in folders)
        raise ValueError(f"the images have two sizes, {sizes}: give a --resolution")
    measures: dict[str, PairMeasure] = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim)}
    if with_lpips:
        measures[lpips.METRIC] = eqx.filter_jit(lpips.load())  # refused before anything is computed
    networks = [efficientnet.load(), *networks]
    found, facts = zip(*(_measured(networks, folder, batch_size) for folder in folders), strict=True)
    metrics: dict[str, Metric] = {}
    left_out: dict[str, str] = {}
    for network, *both in zip(networks, *found, strict=True):
        distances, reasons = _distances(network, *both)
        metrics, left_out = metrics | distances, left_out | reasons
    names = _pairs(reference, compared)
    if names is None:
        left_out |= dict.fromkeys(measures, "the folders do not hold the same file names")
    else:
        pairs, reasons = _errors(measures, reference, compared, names, batch_size)
        metrics, left_out = metrics | pairs, left_out | reasons
    return {
        "metrics": metrics,
        "left_out": left_out,
        "a": facts[0],
        "b": facts[1],
        "resolution": reference.resolution,
        "preparation": RULE,
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "ulx": ulx.__version__,
        "commit": commit(),
    }


def _distances(
    network: FeatureNetwork, a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[dict[str, Metric], dict[str, str]]:
    """All distances of features b to features a, with what they are, and why some are left out."""
    moments = Moments.of(a), Moments.of(b)
    frechet = {
        "value": frechet_distance(*moments),
        "n_a": len(a),
        "n_b": len(b),
        "rank_deficient": any(each.rank_deficient for each in moments),
    }
    found, reasons = kernel_and_manifolds(network, a, b)
    meant = definitions(network)
    return {name: metric | meant[name] for name, metric in {network.metric: frechet, **found}.items()}, reasons


def definitions(network: FeatureNetwork) -> dict[str, Metric]:
    """What each distance between the network's features is, by its name, and by which weights."""
    names = _names(network)
    kinds = {"frechet": FRECHET, "kernel": KERNEL, "precision": PRECISION, "recall": RECALL}
    if _is_own(network):
        kinds |= {kind: NOT_INCEPTION.format(kinds[kind], name) for kind, name in NAMESAKES.items()}
    weights = {"definition": network.definition, "sha256": network.sha256}
    return {names[kind]: {"definition": text, "network": weights} for kind, text in kinds.items()}


def _is_own(network: FeatureNetwork) -> bool:
    """Whose precision and recall go without an addition to their names."""
    return network.metric == efficientnet.METRIC


def _names(network: FeatureNetwork) -> dict[str, str]:
    plain = _is_own(network)
    shares = {kind: kind if plain else f"{kind}_{network.metric}" for kind in ("precision", "recall")}
    return {"frechet": network.metric, "kernel": network.kernel_metric} | shares


def kernel_and_manifolds(
    network: FeatureNetwork, a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The kernel distance, precision and recall of features b against features a, at least two of each, by their names;
    and why some are left out."""
    names, count = _names(network), {"n_a": len(a), "n_b": len(b)}
    kernel = kernel_distance(a, b)
    metrics: dict[str, Metric] = {
        names["kernel"]: {"value": kernel.value, "standard_error": kernel.standard_error, **count}
    }
    if min(len(a), len(b)) <= NEIGHBOURS:
        reason = f"they need more than {NEIGHBOURS} images in each folder"
        return metrics, {names[kind]: reason for kind in ("precision", "recall")}
    shares = precision_recall(a, b)
    for kind, value in (("precision", shares.precision), ("recall", shares.recall)):
        metrics[names[kind]] = {"value": value, "neighbours": NEIGHBOURS, **count}
    return metrics, {}


def _measured(
    networks: Sequence[FeatureNetwork], folder: ImageFolder, batch_size: int
) -> tuple[list[Float[np.ndarray, "n _d"]], dict[str, Any]]:
    """A folder's features by each network, and what the card says of it."""

    def parts(digest) -> Iterator[Images]:
        for _, images in folder.batches(batch_size):
            _refuse_unreadable(folder)
            digest.update(images.tobytes())
            yield images

    found, digests = [], []
    for network in networks:
        total, description = len(folder.names), f"{network.metric}: features of {folder.folder}"
        digests.append(hashlib.sha256())
        found.append(features(network, parts(digests[-1]), batch_size, total=total, description=description))
        _refuse_unreadable(folder)
    if len({digest.hexdigest() for digest in digests}) > 1:
        raise ValueError(f"{folder.folder} changed while it was read: leave it alone, and compare again")
    return found, {
        "path": str(folder.folder),
        "n": len(found[0]),
        "pixels_sha256": digests[0].hexdigest(),
        "enlarged": folder.enlarged,
        "contact_sheets_left_out": folder.sheets,
    }


def _refuse_unreadable(folder: ImageFolder) -> None:
    for name, reason in folder.skipped:
        raise ValueError(f"{folder.folder / name} cannot be read as an image ({reason}): repair or remove it")


def _pairs(a: ImageFolder, b: ImageFolder) -> list[tuple[str, str]] | None:
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


def _errors(
    measures: dict[str, PairMeasure], a: ImageFolder, b: ImageFolder, names: list[tuple[str, str]], batch_size: int
) -> tuple[dict[str, Metric], dict[str, str]]:
    """What `measures` find in the pairs, and why some are left out."""
    left_out = {}
    for name, (least, why) in SMALLEST.items():
        if name in measures and a.resolution < least:
            left_out[name] = f"{why} {least}×{least} pixels, the images are smaller"
    used = {name: measure for name, measure in measures.items() if name not in left_out}
    values: dict[str, list[np.ndarray]] = {name: [] for name in used}
    with Progress("pairs", total=len(names), unit="pairs") as progress:
        for start in range(0, len(names), batch_size):
            part = names[start : start + batch_size]
            x, y = (
                to_float(np.stack([read_image(folder.folder / pair[side], folder.resolution)[0] for pair in part]))
                for side, folder in enumerate((a, b))
            )
            for name, measure in used.items():
                values[name].append(np.asarray(measure(x, y), np.float64))
            progress.advance(len(part))
    return {
        name: _mean(np.concatenate(parts)) | {"definition": OF_PAIRS[name]} for name, parts in values.items()
    }, left_out


def _mean(values: Float[np.ndarray, " n"]) -> Metric:
    infinite = bool(np.isinf(values).any())  # equal pairs, and the PSNR's mean with them
    error = float("nan") if infinite else float(values.std(ddof=1) / np.sqrt(len(values)))
    return {"value": float(values.mean()), "standard_error": error, "n_pairs": len(values)}


def commit() -> str | None:
    """The commit of the checkout that this code runs from, "-dirty" where it was changed; None where it is in none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # A repository that ulx is merely installed inside of does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
