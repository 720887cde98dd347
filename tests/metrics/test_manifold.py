"""Precision and recall against every pair's distance, and where they are known."""

import numpy as np
import pytest

from ulx.metrics.manifold import precision_recall


def draw(count, dims=4, seed=0, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).normal(size=(count, dims))


def direct(real, generated, k):
    def distances(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=-1)

    def within(x, centres):
        own = np.sort(distances(centres, centres), axis=1)[:, k]  # the first is the example itself
        return (distances(x, centres) <= own).any(axis=1)

    return within(generated, real), within(real, generated)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [11, 1000])
def test_is_the_definition(k, rows):
    real, generated = draw(150), draw(120, seed=1, mean=1.2, scale=0.7)
    precise, recalled = direct(real, generated, k)
    found = precision_recall(real, generated, k, rows=rows)
    np.testing.assert_array_equal(found.precise, precise)
    np.testing.assert_array_equal(found.recalled, recalled)
    assert 0.1 < found.recall < found.precision < 0.95  # neither empty nor full, and not the same
    swapped = precision_recall(generated, real, k, rows=rows)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_clouds_apart_and_equal_sets():
    real = draw(50)
    apart = precision_recall(real, draw(40, seed=1, mean=100.0))
    assert (apart.precision, apart.recall) == (0, 0)
    equal = precision_recall(real, real.copy())
    assert (equal.precision, equal.recall) == (1, 1)


def test_a_dropped_mode_costs_its_share_of_recall():
    """Four modes far apart with 40 % of the examples in one; samples of the other three, copies of real ones."""
    counts = (40, 30, 20, 10)
    modes = [draw(count, seed=mode, mean=1000.0 * mode) for mode, count in enumerate(counts)]
    real = np.concatenate(modes)
    found = precision_recall(real, np.concatenate(modes[1:]))
    assert found.precision == 1
    assert found.recall == pytest.approx(0.6)
    np.testing.assert_array_equal(found.recalled, np.arange(100) >= 40)


def test_the_ball_is_closed_and_reaches_the_third_neighbour():
    """On a line with gaps 1: the third neighbour of an end is 3 away, of the middle 2."""
    real = np.arange(7.0)[:, None]
    generated = np.array([[-3.0], [-3.001], [9.0], [9.001], [3.5]])
    np.testing.assert_array_equal(precision_recall(real, generated).precise, [True, False, True, False, True])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_copies_of_copies_far_from_the_origin(kind):
    """Four copies of an example have balls of radius 0. A fifth is within, whatever its distance rounds to."""
    copies = np.repeat(draw(30, dims=300, mean=1e4), 4, axis=0).astype(kind)
    found = precision_recall(copies, copies[:0:-1].copy(), rows=7)
    assert (found.precision, found.recall) == (1, 1)
    moved = copies + np.array(0.01, kind)
    found = precision_recall(copies, moved)
    assert (found.precision, found.recall) == (0, 0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="features of 4 and of 3 dimensions"):
        precision_recall(draw(5), draw(5, 3))
    with pytest.raises(ValueError, match=r"neighbour 3 needs .* there are 5 and 3"):
        precision_recall(draw(5), draw(3))
    with pytest.raises(ValueError, match="neighbour 0"):
        precision_recall(draw(5), draw(5), neighbours=0)
