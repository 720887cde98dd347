"""Numbers as they stand in metrics.json and on cards: each beside its N and its standard error."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ulx.metrics.frechet import Moments, frechet_distance

__all__ = ["Metric", "frechet", "mean"]

Metric = dict[str, Any]


def mean(per_image: Any) -> Metric:
    """Mean over images with its standard error, which holds the images' spread and an estimator's noise alike."""
    values = np.asarray(per_image, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"value": float(values.mean()), "standard_error": error, "n": len(values)}


def frechet(found: Float[np.ndarray, "n d"], reference: Moments) -> Metric:
    """The Fréchet distance of features to the reference's."""
    moments = Moments.of(found)
    return {
        "value": frechet_distance(moments, reference),
        "n": moments.count,
        "n_reference": reference.count,
        "rank_deficient": moments.rank_deficient or reference.rank_deficient,
    }
