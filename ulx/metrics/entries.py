"""Numbers as they stand in metrics.json and on cards, each beside its N and its standard error, and how they are
written."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ulx.metrics.frechet import Moments, frechet_distance

__all__ = ["Metric", "as_json", "frechet", "mean", "number", "plus_minus", "rank_remark", "rounded"]

Metric = dict[str, Any]


def mean(per_image: Any) -> Metric:
    """Mean over images with its standard error, which holds the images' spread and an estimator's noise alike.

    Infinite ones of the n, which a PSNR of equal images is, are left out of both, and counted under "infinite"; where
    there is nothing else the mean is infinite too.
    """
    values = np.asarray(per_image, np.float64)
    infinite = np.isinf(values)
    counted = {"infinite": int(infinite.sum())} if infinite.any() else {}
    if infinite.all():
        return {"value": float(values[0]), "standard_error": math.nan, "n": len(values)}
    kept = values[~infinite]
    error = float(kept.std(ddof=1) / np.sqrt(len(kept))) if len(kept) > 1 else math.nan
    return {"value": float(kept.mean()), "standard_error": error, "n": len(values), **counted}


def as_json(value: Any) -> str:
    """Indented, with null for what JSON has no word for: an infinite mean, the error of a single number."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def frechet(found: Float[np.ndarray, "n d"], reference: Moments) -> Metric:
    """The Fréchet distance of features to the reference's."""
    moments = Moments.of(found)
    return {
        "value": frechet_distance(moments, reference),
        "n": moments.count,
        "n_reference": reference.count,
        "rank_deficient": moments.rank_deficient or reference.rank_deficient,
    }


def rank_remark(metric: Mapping[str, Any]) -> str:
    """What has to stand beside a Fréchet distance of too few examples; beside anything else nothing."""
    return "rank-deficient, so biased: compare at equal N only" if metric.get("rank_deficient") else ""


def number(value: float) -> str:
    """Four significant digits, without an exponent: 0.03721, 21.34, 1235."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def plus_minus(metric: Mapping[str, Any]) -> str:
    """Value and standard error: 0.3721 ± 0.0043. Without an error the value alone; and how many infinite ones are not
    in it."""
    value, error = rounded(metric)
    left_out = f" (and {metric['infinite']} infinite)" if "infinite" in metric else ""
    return (f"{value} ± {error}" if error else value) + left_out


def rounded(metric: Mapping[str, Any]) -> tuple[str, str]:
    """Value and standard error, both to the error's second digit; "" for an error that is not known. Either may come
    from `as_json`."""
    value, error = metric["value"], metric.get("standard_error")
    value, error = math.inf if value is None else value, math.nan if error is None else error
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return number(value), ""
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f}", f"{error:.{digits}f}"
