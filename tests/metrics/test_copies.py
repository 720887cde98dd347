"""Copies: the counts and distances of pictures whose nearest training image is known."""

import numpy as np
import pytest

from ulx.data.source import InMemory, Split
from ulx.metrics.copies import copies_among


def test_copies_by_hand():
    """Everything is off by so many grey levels from a training image of noise, which is far from all others:
    reconstructions by 5 in the median, so that a sample 3 away is a copy, and one 20 away, or 9, is not."""
    images = np.random.default_rng(0).integers(30, 200, (6, 8, 8, 3), dtype=np.uint8)
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
