"""What samples are compared with: the moments of the training images' features, computed once per data set."""

import hashlib

import numpy as np
from jaxtyping import Float

from ulx.data.cache import cache_root
from ulx.data.source import Dataset
from ulx.metrics.features import FeatureNetwork, feature_batches
from ulx.metrics.frechet import Moments
from ulx.processes import all_agree

__all__ = ["training_moments"]


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
    try:
        kept = Moments.load(path, key)
    except (FileNotFoundError, ValueError):
        kept = None
    if all_agree(kept is not None) and kept is not None:
        return kept
    moments = Moments.of(found) if found is not None and len(found) == len(dataset.train) else None
    if moments is None:
        images = (example["image"][None] for example in dataset.train)
        total, what = len(dataset.train), "features of the training set"
        for batch in feature_batches(network, images, batch_size, total=total, description=what):
            moments = Moments.of(batch) if moments is None else moments.update(batch)
    assert moments is not None  # feature_batches refuses an empty set
    path.parent.mkdir(parents=True, exist_ok=True)
    moments.save(path, key)
    return moments
