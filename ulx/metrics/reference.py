"""What samples are compared with: the moments of the training images' features, computed once per data set."""

import hashlib
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ulx.data.cache import cache_root
from ulx.data.source import Dataset
from ulx.metrics.features import FeatureNetwork, feature_batches
from ulx.metrics.frechet import Moments
from ulx.processes import all_agree, are_connected

__all__ = ["training_moments"]

EVERY = 60.0
"""Seconds after which what was computed so far is kept, lest an interruption cost more."""


def training_moments(
    dataset: Dataset,
    network: FeatureNetwork,
    cache_dir: str | None = None,
    batch_size: int = 64,
    *,
    found: Float[np.ndarray, "n d"] | None = None,
) -> Moments:
    """Moments of all training images, from the cache directory where they were kept, or computed and kept there.

    `found` are features of the training images that are known already, in any order: those of all of them save
    computing them again, of fewer they are no use. The file knows its data and its network; one that belongs to others,
    or cannot be read, is computed anew.
    """
    key = f"{dataset.fingerprint} train {network.definition}"
    path = cache_root(cache_dir) / "moments" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    kept = _kept(path, key)
    if all_agree(kept is not None) and kept is not None:
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    total = len(dataset.train)
    if found is not None and len(found) == total:
        moments = Moments.of(found)
        moments.save(path, key)
        return moments
    # Several processes may each have a cache of their own, of which not all were interrupted at the same image.
    begun, of_some = path.with_suffix(".begun.npz"), f"{key}, the first of them"
    moments = None if are_connected() else _kept(begun, of_some)
    start, last = 0 if moments is None else moments.count, time.monotonic()
    images = (dataset.train[i]["image"][None] for i in range(start, total))
    what = "features of the training set"
    if start < total:
        for batch in feature_batches(network, images, batch_size, total=total, start=start, description=what):
            moments = Moments.of(batch) if moments is None else moments.update(batch)
            if not are_connected() and time.monotonic() - last >= EVERY:
                moments.save(begun, of_some)
                last = time.monotonic()
    assert moments is not None  # feature_batches refuses an empty set
    moments.save(path, key)
    begun.unlink(missing_ok=True)
    return moments


def _kept(path: Path, key: str) -> Moments | None:
    try:
        return Moments.load(path, key)
    except (FileNotFoundError, ValueError):
        return None
