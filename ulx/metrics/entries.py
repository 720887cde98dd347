"""Numbers as they stand in metrics.json and on cards, each beside its N and its standard error, and how they are
written."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ulx.metrics.frechet import Moments, frechet_distance

__all__ = ["Metric", "frechet", "mean", "number", "plus_minus", "rounded"]

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


def number(value: float) -> str:
    """Four significant digits, without an exponent: 0.03721, 21.34, 1235."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def plus_minus(metric: Mapping[str, Any]) -> str:
    """Value and standard error: 0.3721 ± 0.0043. Without an error the value alone."""
    value, error = rounded(metric)
    return f"{value} ± {error}" if error else value


def rounded(metric: Mapping[str, Any]) -> tuple[str, str]:
    """Value and standard error, both to the error's second digit; "" for an error that is not known."""
    value, error = metric["value"], metric.get("standard_error", math.nan)
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return number(value), ""
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f}", f"{error:.{digits}f}"
