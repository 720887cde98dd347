"""Copies: the counts and distances of pictures whose nearest training image is known."""

import numpy as np
import pytest

from ulx.data.source import InMemory, Split
from ulx.metrics.copies import _thumbnails, copies_among


@pytest.mark.parametrize("times", [1, 6, 8, 25])
def test_copies_by_hand(times):
    """At 8, 48, 64 and 200 pixels, in whose blocks nothing changes. Everything is off by so many grey levels from a
    training image of noise, which is far from all others: reconstructions by 5 in the median, so that a sample 3 away
    is a copy, and one 20 away, or 9, is not."""
    images = np.random.default_rng(0).integers(30, 200, (6, 8, 8, 3), dtype=np.uint8)
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    labels = np.zeros(6, np.int32)
    train = Split(InMemory({"image": images, "label": labels}), tuple("abcdef"), labels)
    off = np.array([1, 1, 5, 5, 5, 50], np.uint8).reshape(-1, 1, 1, 1)
    samples = np.stack([images[2] + 3, images[4] + 20])
    found, index = copies_among(train, samples, images[:4] + 9, images, images + off)
    assert index.tolist() == [2, 4]
    assert found["threshold"] == pytest.approx(5)
    assert (found["share_of_samples"], found["share_of_held_out_images"]) == (0.5, 0.0)
    assert found["median_distance_of_samples"] == pytest.approx(11.5)
    assert found["median_distance_of_held_out_images"] == pytest.approx(9)
    # As near as that is a copy.
    found, _ = copies_among(train, images[:1] + 5, images[:1], images, images + 5)
    assert (found["share_of_samples"], found["share_of_held_out_images"]) == (1.0, 1.0)


@pytest.mark.parametrize("size", [8, 32, 33, 48, 100, 512])
def test_thumbnails_are_averages_of_32_pixels_at_most(size):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    side = min(size, 32)
    edges = [i * size // side for i in range(side + 1)]
    found = _thumbnails(images)
    assert found.shape == (2, side, side, 3)
    for i, j in ((0, 0), (3, 5), (side - 1, side - 2)):
        block = images[:, edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
        np.testing.assert_allclose(found[:, i, j], block.mean(axis=(1, 2)), rtol=1e-5)  # float32
