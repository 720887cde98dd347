"""The kernel distance between two sets of features: KID (Bińkowski et al. 2018), on whatever network's features.

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y)        k(x, y) = (xᵀy/d + 1)³

estimated without bias at any N, also where N is too small for a Fréchet distance. KID is this number on InceptionV3's
features; on EfficientNet-lite0's it is named `kd_efflite0`, and the two cannot be compared.

Others report the mean over random subsets of 1,000. All pairs of both sets are used here instead: the expectation is
the same, the noise is less, there is no subset size and no seed to state, and the standard error is one of the number
itself, which the spread over subsets that share examples is not.

An example and what was made of it, its reconstruction or its continuation, are not independent: k of the two is no part
of E k(x, y), and with it the estimate would be too low. Where the sets are such pairs it is left out, which is the
U-statistic of Gretton et al. 2012 (Lemma 6) in the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

__all__ = ["KernelDistance", "kernel_distance"]


@dataclass(frozen=True)
class KernelDistance:
    """The estimate of MMD² and its standard error, NaN with fewer than three examples on a side."""

    value: float
    standard_error: float


def kernel_distance(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m _"], *, paired: bool = False, rows: int = 2048
) -> KernelDistance:
    """The unbiased estimate of MMD² from all pairs of different examples; below zero about as often as above where
    both sets come from one distribution.

    If `paired`, b[i] was made of a[i], and the two are not compared with each other: equal pairs give 0.
    The standard error is the jackknife's over examples of either set, or over pairs (Arvesen 1969). For different
    distributions it is right to first order; the closer they are the more it errs on the large side, by √2 where
    independent sets are of equal ones. `rows` examples against as many are held at a time, in float64; changes no
    result beyond rounding.
    Raises ValueError for different numbers of features, or of examples that are paired, fewer than two examples, or
    features that are not finite.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions cannot be compared")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs at least two examples on each side, there are {len(a)} and {len(b)}")
    n, m = len(a), len(b)
    if paired and n != m:
        raise ValueError(f"{n} and {m} examples are no pairs")
    within_a, within_b = _within(a, rows), _within(b, rows)
    across_a, across_b = _across(a, b, rows, paired)
    if paired:
        of_pair = within_a + within_b - across_a - across_b
        return KernelDistance(float(of_pair.sum() / (n * (n - 1))), _error(_without_each(of_pair)))
    value = within_a.sum() / (n * (n - 1)) + within_b.sum() / (m * (m - 1)) - 2 * across_a.sum() / (n * m)
    # The other set's own pairs are the same whichever example of this one is left out, and so not in these.
    of_a = _without_each(within_a) - 2 * (across_a.sum() - across_a) / ((n - 1) * m)
    of_b = _without_each(within_b) - 2 * (across_b.sum() - across_b) / ((m - 1) * n)
    return KernelDistance(float(value), float(np.hypot(_error(of_a), _error(of_b))))


def _without_each(sums: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The mean over pairs of a symmetric function, with each example left out in turn; `sums` are those of an example
    with all others. NaN with fewer than three."""
    n = len(sums)
    return (sums.sum() - 2 * sums) / ((n - 1) * (n - 2)) if n > 2 else np.full(n, np.nan)


def _error(without: Float64[np.ndarray, " n"]) -> float:
    """The jackknife's standard error, from the estimates with each example left out."""
    n = len(without)
    return float(np.sqrt((n - 1) / n * np.sum((without - without.mean()) ** 2)))


def _within(x: Float[np.ndarray, "n d"], rows: int) -> Float64[np.ndarray, " n"]:
    """Of each example the sum of k over all the others of its set. k is symmetric: half of the blocks will do."""
    sums = np.zeros(len(x))
    for i, left in _blocks(x, rows):
        for j, right in _blocks(x, rows):
            if j.start < i.start:
                continue
            k = _kernel(left, right)
            if i == j:
                np.fill_diagonal(k, 0.0)
            else:
                sums[j] += k.sum(axis=0)
            sums[i] += k.sum(axis=1)
    return sums


def _across(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], rows: int, paired: bool
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " m"]]:
    """Of each example the sum of k over all examples of the other set, its own other one left out if `paired`."""
    sums_a, sums_b = np.zeros(len(a)), np.zeros(len(b))
    for i, left in _blocks(a, rows):
        for j, right in _blocks(b, rows):
            k = _kernel(left, right)
            if paired and i == j:
                np.fill_diagonal(k, 0.0)
            sums_a[i] += k.sum(axis=1)
            sums_b[j] += k.sum(axis=0)
    return sums_a, sums_b


def _kernel(x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # many times faster than the power


def _blocks(x: Float[np.ndarray, "n d"], rows: int) -> Iterator[tuple[slice, Float64[np.ndarray, "_b d"]]]:
    for start in range(0, len(x), rows):
        part = x[start : start + rows].astype(np.float64)  # float32 sums would drown a small difference
        if not np.isfinite(part).all():
            row = start + int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0])
            raise ValueError(f"the features of example {row} are not finite")
        yield slice(start, start + len(part)), part
