"""What samples are compared with: the training images' features, computed once per data set and network."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Float

from ulx.data.cache import cache_root
from ulx.data.source import Dataset
from ulx.metrics import efficientnet
from ulx.metrics.features import feature_batches
from ulx.metrics.frechet import Moments

__all__ = ["Reference"]

KEEP = 20_000
"""Training images whose features themselves are kept, for the nearest-neighbour search."""


@dataclasses.dataclass(frozen=True)
class Reference:
    moments: Moments
    """Of all training images."""
    features: Float[np.ndarray, "n d"]
    """Of the first KEEP training images, in the order of the data set."""

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        network: efficientnet.EfficientNetLite0,
        cache_dir: str | None = None,
        batch_size: int = 64,
    ) -> "Reference":
        """The reference of `dataset`, from the cache directory where it was kept, or computed and kept there.

        A kept file that belongs to other data or another network, or that cannot be read, is computed anew.
        """
        key = f"{dataset.fingerprint} train {efficientnet.DEFINITION}"
        folder = cache_root(cache_dir) / "references" / hashlib.sha256(key.encode()).hexdigest()[:16]
        moments_path, features_path = folder / "moments.npz", folder / "features.npy"
        try:
            return cls(Moments.load(moments_path, key), np.load(features_path, allow_pickle=False))
        except (OSError, ValueError):
            pass
        moments, kept = Moments.empty(efficientnet.FEATURES), []
        images = (example["image"][None] for example in dataset.train)
        for found in feature_batches(
            network, images, batch_size, total=len(dataset.train), description="features of the training set"
        ):
            moments = moments.update(found)
            if sum(map(len, kept)) < KEEP:
                kept.append(found)
        reference = cls(moments, np.concatenate(kept)[:KEEP])
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / "aside.npy"
        np.save(aside, reference.features)
        aside.replace(features_path)
        moments.save(moments_path, key)
        return reference
