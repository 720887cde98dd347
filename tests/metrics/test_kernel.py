"""The kernel distance: exactly unbiased over every possible draw, Gaussians in closed form, every pair once."""

import itertools
from typing import Any

import numpy as np
import pytest

from ulx.metrics.kernel import kernel_distance


def draw(count, dims=6, seed=0, mean: Any = 0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).normal(size=(count, dims))


def kernel(x, y):
    return (np.dot(x, y) / len(x) + 1) ** 3


def direct(a, b):
    """The formula, pair by pair."""

    def mean(pairs):
        return np.mean([kernel(x, y) for x, y in pairs])

    return mean(itertools.permutations(a, 2)) + mean(itertools.permutations(b, 2)) - 2 * mean(itertools.product(a, b))


def of_pairs(a, b):
    """The same without k of an example and its own other one."""

    def mean(x, y):
        return np.mean([kernel(x[i], y[j]) for i, j in itertools.permutations(range(len(a)), 2)])

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def tensor_moments(mean, variance):
    """E x, E x⊗x, E x⊗x⊗x of N(mean, variance I)."""
    eye = np.eye(len(mean))
    second = np.outer(mean, mean) + variance * eye
    third = np.einsum("i,j,k", mean, mean, mean)
    third += variance * sum(np.einsum(f"i,jk->{to}", mean, eye) for to in ("ijk", "jik", "kji"))
    return mean, second, third


def of_gaussians(mean_a, variance_a, mean_b, variance_b):
    """E k is Σ C(3, p)/d^p ⟨E x^⊗p, E y^⊗p⟩, so MMD² is a sum of squared differences of moments."""
    moments = zip(tensor_moments(mean_a, variance_a), tensor_moments(mean_b, variance_b), strict=True)
    d = len(mean_a)
    return sum(binomial / d**p * np.sum((x - y) ** 2) for (p, binomial), (x, y) in zip(
        ((1, 3), (2, 3), (3, 1)), moments, strict=True
    ))  # fmt: skip


def test_is_the_formula():
    a, b = draw(17), draw(9, seed=1, mean=0.5)
    assert kernel_distance(a, b).value == pytest.approx(direct(a, b), rel=1e-12)  # float64, some hundred terms
    assert kernel_distance(b, a).value == pytest.approx(direct(a, b), rel=1e-12)
    # float32 features are taken as they are, and summed in float64.
    coarse = a.astype(np.float32), b.astype(np.float32)
    expected = direct(*(x.astype(np.float64) for x in coarse))
    assert kernel_distance(*coarse).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [(2, 2), (3, 2)])
def test_is_exactly_unbiased(counts):
    """The mean over all samples that two distributions on three points can give is their MMD², to rounding."""
    points = np.array([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]])
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    gram = np.array([[kernel(x, y) for y in points] for x in points])
    truth = (p - q) @ gram @ (p - q)
    mean = 0.0
    for index in itertools.product(range(3), repeat=sum(counts)):
        i, j = list(index[: counts[0]]), list(index[counts[0] :])
        mean += np.prod(p[i]) * np.prod(q[j]) * kernel_distance(points[i], points[j]).value
    assert mean == pytest.approx(truth, rel=1e-12)
    assert truth > 0.5


@pytest.mark.parametrize("count", [2, 3])
def test_is_exactly_unbiased_for_pairs(count):
    """Over all samples of pairs (x, y) that are far from independent; with k of each pair it would be far too low."""
    points = np.array([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]])
    joint = np.array([[0.3, 0.1, 0.0], [0.05, 0.25, 0.0], [0.0, 0.0, 0.3]])
    p, q = joint.sum(axis=1), joint.sum(axis=0)
    gram = np.array([[kernel(x, y) for y in points] for x in points])
    truth = (p - q) @ gram @ (p - q)
    mean = unpaired = 0.0
    for index in itertools.product(range(3), repeat=2 * count):
        i, j = list(index[:count]), list(index[count:])
        if probability := np.prod(joint[i, j]):
            mean += probability * kernel_distance(points[i], points[j], paired=True).value
            unpaired += probability * kernel_distance(points[i], points[j]).value
    assert mean == pytest.approx(truth, rel=1e-12)
    bias = 2 / count * np.sum((joint - np.outer(p, q)) * gram)
    assert unpaired == pytest.approx(truth - bias, rel=1e-12)
    assert bias > 5 * truth


def test_pairs_are_the_formula_and_equal_ones_are_at_no_distance():
    a = draw(9)
    b = a + draw(9, seed=1, scale=0.1, mean=0.1)
    found = kernel_distance(a, b, paired=True)
    assert found.value == pytest.approx(of_pairs(a, b), rel=1e-11)  # a difference of numbers some 50 times larger
    without = [of_pairs(np.delete(a, i, axis=0), np.delete(b, i, axis=0)) for i in range(9)]
    assert found.standard_error == pytest.approx(np.sqrt(8 * np.var(without)), rel=1e-9)
    equal = kernel_distance(a, a, paired=True)
    assert abs(equal.value) < 1e-12
    assert equal.standard_error < 1e-12
    assert kernel_distance(a, a).value < -0.1
    assert np.isnan(kernel_distance(a[:2], b[:2], paired=True).standard_error)


def test_gaussians_in_one_dimension():
    """k = 1 + 3xy + 3x²y² + x³y³: three differences of raw moments."""
    mean, deviation = 0.7, 1.3
    first, second, third = mean, mean**2 + deviation**2 - 1, mean**3 + 3 * mean * deviation**2
    expected = 3 * first**2 + 3 * second**2 + third**2
    assert of_gaussians(np.zeros(1), 1.0, np.array([mean]), deviation**2) == pytest.approx(expected, rel=1e-12)
    found = [
        kernel_distance(draw(200, 1, seed), draw(150, 1, 1000 + seed, mean, deviation)).value for seed in range(300)
    ]
    error = np.std(found, ddof=1) / np.sqrt(300)
    assert abs(np.mean(found) - expected) < 4 * error  # 4 standard errors of 300 replicates
    assert error < 0.03 * expected


def test_isotropic_gaussians_and_the_standard_error():
    mean, scale, count = np.array([0.5, 0.0, -0.5, 0.3, 0.0]), 1.2, 80
    expected = of_gaussians(np.zeros(5), 1.0, mean, scale**2)
    found = [kernel_distance(draw(count, 5, seed), draw(50, 5, 1000 + seed, mean, scale)) for seed in range(400)]
    values = np.array([each.value for each in found])
    spread = values.std(ddof=1)
    assert abs(values.mean() - expected) < 4 * spread / np.sqrt(400)
    assert spread / np.sqrt(400) < 0.03 * expected
    # Right to first order: the rest counts double, and the spread of 400 replicates is itself known to 1/√800.
    variance = np.mean([each.standard_error**2 for each in found])
    assert 0.9 < np.sqrt(variance) / spread < 1.15


def test_equal_distributions():
    found = [kernel_distance(draw(60, 5, seed), draw(40, 5, 1000 + seed)) for seed in range(400)]
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 4 * values.std(ddof=1) / np.sqrt(400)
    assert 0.3 < np.mean(values > 0) < 0.7
    # All is of second order here, where the jackknife's variance is twice too large.
    ratio = np.sqrt(np.mean([each.standard_error**2 for each in found])) / values.std(ddof=1)
    assert 0.85 * np.sqrt(2) < ratio < 1.15 * np.sqrt(2)


def test_the_standard_error_is_that_of_leaving_examples_out():
    a, b = draw(7), draw(5, seed=1, mean=0.3)
    of_a = [direct(np.delete(a, i, axis=0), b) for i in range(7)]
    of_b = [direct(a, np.delete(b, i, axis=0)) for i in range(5)]
    variance = 6 * np.var(of_a) + 4 * np.var(of_b)  # (n − 1)/n · Σ (…)²
    assert kernel_distance(a, b).standard_error == pytest.approx(np.sqrt(variance), rel=1e-10)
    assert np.isnan(kernel_distance(a[:2], b).standard_error)


@pytest.mark.parametrize("rows", [1, 7, 20, 1000])
def test_block_size_does_not_matter(rows):
    a, b = draw(40), draw(23, seed=1, mean=0.3)
    found, expected = kernel_distance(a, b, rows=rows), kernel_distance(a, b)
    assert found.value == pytest.approx(expected.value, rel=1e-11)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-11)
    other = a + draw(40, seed=2, scale=0.5)
    found, expected = kernel_distance(a, other, paired=True, rows=rows), kernel_distance(a, other, paired=True)
    assert found.value == pytest.approx(expected.value, rel=1e-10)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-10)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="features of 3 and of 4 dimensions"):
        kernel_distance(draw(5, 3), draw(5, 4))
    with pytest.raises(ValueError, match="at least two examples on each side, there are 5 and 1"):
        kernel_distance(draw(5), draw(1))
    with pytest.raises(ValueError, match="5 and 4 examples are no pairs"):
        kernel_distance(draw(5), draw(4), paired=True)
    broken = draw(20)
    broken[13, 1] = np.nan
    with pytest.raises(ValueError, match="example 13 are not finite"):
        kernel_distance(draw(5), broken, rows=8)
