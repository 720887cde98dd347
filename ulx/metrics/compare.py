"""Two folders of images, or of videos, measured against each other: every number on a card with what it is and what
went in.

The first folder, A, is the reference: real ones, or the originals. The second, B, is what is measured against it.
"""

import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

import ulx
from ulx.data.video import Clip
from ulx.metrics import efficientnet, i3d
from ulx.metrics.examples import Examples, open_both
from ulx.metrics.features import FeatureNetwork, features
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.kernel import kernel_distance
from ulx.metrics.manifold import NEIGHBOURS, precision_recall
from ulx.metrics.pairs import errors, measures, namesakes

__all__ = ["commit", "compare", "definitions", "kernel_and_manifolds"]

FRECHET = """\
Fréchet distance between Gaussians fitted to the {} of A and of B, unbiased covariances; biased upwards, the more the \
smaller N"""
KERNEL = """\
KID's estimator on the {}: unbiased squared MMD of the kernel (x·y/d + 1)^3 over all pairs, but for an example and \
what was made of it; standard error by the jackknife"""
FEATURES = {i3d.METRIC: "logits"}
"""What the features are where they are not pooled ones."""
NAMESAKES = {"frechet": "FID", "kernel": "KID"}
NOT_INCEPTION = "{}. Not {}, whose features are InceptionV3's"
PRECISION = f"share of B's features within the manifold of A's: balls that reach neighbour {NEIGHBOURS}"
RECALL = f"share of A's features within the manifold of B's: balls that reach neighbour {NEIGHBOURS}"

Metric = dict[str, Any]


def compare(
    a: Path,
    b: Path,
    *,
    resolution: int | None = None,
    clip: Clip | None = None,
    batch_size: int = 64,
    networks: Sequence[FeatureNetwork] = (),
    with_lpips: bool = False,
    given: int = 0,
) -> dict[str, Any]:
    """The card: all metrics that the two folders allow under "metrics", why others are not there under "left_out".

    Images are measured by features of EfficientNet-lite0, and of `networks` as well, videos by I3D's of a `clip` (by
    default `Clip()`); pairs by LPIPS too if asked, and of videos after the first `given` frames alone: a model that is
    given them has not made them, and only the distances count them. Without a resolution all must be squares of one
    size. `batch_size` images, or frames of videos, are read at a time; changes no result beyond rounding.
    Raises FileNotFoundError, NotADirectoryError, ValueError for folders that may not be compared (`open_both`), a file
    that cannot be read, no frames left, or what belongs to the other kind, ModuleNotFoundError without the package of a
    network's weights.
    """
    both = reference, compared = open_both(a, b, resolution, clip)
    if given and reference.kind == "image":
        raise ValueError(f"{a} and {b} hold images: --given is for videos")
    if not 0 <= given < reference.frames:
        raise ValueError(f"--given {given}: must be below the {reference.frames} frames of a clip, and not below 0")
    networks = [*_networks(reference, networks)]
    of_pairs = measures(with_lpips)  # refused before anything is computed
    found, facts = zip(*(_measured(networks, folder, batch_size) for folder in both), strict=True)
    metrics: dict[str, Metric] = {}
    left_out: dict[str, str] = {}
    names = namesakes(reference, compared)
    rows = None if names is None else _rows(names, reference, compared)
    for network, of_a, of_b in zip(networks, *found, strict=True):
        distances, reasons = _distances(network, of_a, of_b, reference.kind, rows)
        metrics, left_out = metrics | distances, left_out | reasons
    if names is None:
        left_out |= dict.fromkeys(of_pairs, "the folders do not hold the same file names")
    else:
        pairs, reasons = errors(of_pairs, reference, compared, names, batch_size, given=given)
        metrics, left_out = metrics | pairs, left_out | reasons
    return {
        "metrics": metrics,
        "left_out": left_out,
        "kind": f"{reference.kind}s",
        "a": facts[0],
        "b": facts[1],
        "resolution": reference.resolution,
        **reference.preparation(),
        **({"given": given} if given else {}),
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "ulx": ulx.__version__,
        "commit": commit(),
    }


def _networks(examples: Examples, others: Sequence[FeatureNetwork]) -> Iterator[FeatureNetwork]:
    """The kind's own first."""
    if examples.kind == "image":
        yield efficientnet.load()
        yield from others
        return
    if others:
        raise ValueError(f"{examples.folder} holds videos: networks of images (--inception-weights) do not take them")
    if examples.frames < i3d.MIN_FRAMES:
        raise ValueError(
            f"I3D takes clips of at least {i3d.MIN_FRAMES} frames, got {examples.frames}: give a larger --frames"
        )
    yield i3d.load()


def _rows(names: list[tuple[str, str]], a: Examples, b: Examples) -> Int[np.ndarray, " n"]:
    """For each example of a, in its order, which one of b is its other one."""
    other, place = dict(names), {name: row for row, name in enumerate(b.names)}
    return np.array([place[other[name]] for name in a.names])


def _distances(
    network: FeatureNetwork,
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    example: str,
    rows: Int[np.ndarray, " n"] | None,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """All distances of features b to features a, with what they are, and why some are left out. `rows` of b were made
    of a, if any were."""
    moments = Moments.of(a), Moments.of(b)
    frechet = {
        "value": frechet_distance(*moments),
        "n_a": len(a),
        "n_b": len(b),
        "rank_deficient": any(each.rank_deficient for each in moments),
    }
    found, reasons = kernel_and_manifolds(network, a, b if rows is None else b[rows], example, paired=rows is not None)
    meant = definitions(network)
    return {name: metric | meant[name] for name, metric in {network.metric: frechet, **found}.items()}, reasons


def definitions(network: FeatureNetwork) -> dict[str, Metric]:
    """What each distance between the network's features is, by its name, and by which weights."""
    names, what = _names(network), FEATURES.get(network.metric, "pooled features")
    kinds = {"frechet": FRECHET.format(what), "kernel": KERNEL.format(what), "precision": PRECISION, "recall": RECALL}
    if network.metric == efficientnet.METRIC:
        kinds |= {kind: NOT_INCEPTION.format(kinds[kind], name) for kind, name in NAMESAKES.items()}
    weights = {"definition": network.definition, "sha256": network.sha256}
    return {names[kind]: {"definition": text, "network": weights} for kind, text in kinds.items()}


def _names(network: FeatureNetwork) -> dict[str, str]:
    # The kind's own network's precision and recall go without an addition.
    plain = network.metric in (efficientnet.METRIC, i3d.METRIC)
    shares = {kind: kind if plain else f"{kind}_{network.metric}" for kind in ("precision", "recall")}
    return {"frechet": network.metric, "kernel": network.kernel_metric} | shares


def kernel_and_manifolds(
    network: FeatureNetwork,
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    example: str = "image",
    *,
    paired: bool = False,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The kernel distance, precision and recall of features b against features a, at least two of each, by their names;
    and why some are left out. `example` is what they are features of; `paired` if b[i] was made of a[i]."""
    names, count = _names(network), {"n_a": len(a), "n_b": len(b)}
    kernel = kernel_distance(a, b, paired=paired)
    metrics: dict[str, Metric] = {
        names["kernel"]: {"value": kernel.value, "standard_error": kernel.standard_error, **count}
    }
    if min(len(a), len(b)) <= NEIGHBOURS:
        reason = f"they need more than {NEIGHBOURS} {example}s in each folder"
        return metrics, {names[kind]: reason for kind in ("precision", "recall")}
    shares = precision_recall(a, b)
    for kind, value in (("precision", shares.precision), ("recall", shares.recall)):
        metrics[names[kind]] = {"value": value, "neighbours": NEIGHBOURS, **count}
    return metrics, {}


def _measured(
    networks: Sequence[FeatureNetwork], folder: Examples, batch_size: int
) -> tuple[list[Float[np.ndarray, "n _d"]], dict[str, Any]]:
    """A folder's features by each network, and what the card says of it."""
    total, size, enlarged = len(folder.names), max(1, batch_size // folder.frames), set()

    def parts(digest) -> Iterator[UInt8[np.ndarray, "..."]]:
        for start in range(0, total, size):
            names = folder.names[start : start + size]
            examples, smaller = zip(*map(folder.read, names), strict=True)
            enlarged.update(name for name, each in zip(names, smaller, strict=True) if each)
            stacked = np.stack(examples)
            digest.update(stacked.tobytes())
            yield stacked

    found, digests = [], []
    for network in networks:
        description = f"{network.metric}: features of {folder.folder}"
        digests.append(hashlib.sha256())
        unit = f"{folder.kind}s"
        found.append(features(network, parts(digests[-1]), size, total=total, description=description, unit=unit))
    if len({digest.hexdigest() for digest in digests}) > 1:
        raise ValueError(f"{folder.folder} changed while it was read: leave it alone, and compare again")
    return found, {
        "path": str(folder.folder),
        "n": total,
        "pixels_sha256": digests[0].hexdigest(),
        "decoder": folder.decoder(),
        "enlarged": len(enlarged),
        "contact_sheets_left_out": folder.sheets,
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from, "-dirty" where the code was changed; None where it is in
    none."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        # A repository that ulx is merely installed inside of does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", "metrics/compare.py"], check=True, capture_output=True)
        ask = lambda *what: subprocess.run([*git, *what], check=True, capture_output=True, text=True).stdout  # noqa: E731
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":/experiments", ":/benchmarks/*.py")
        return ask("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
