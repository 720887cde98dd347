"""Batching: every image once, in order, at one compiled shape; wrong input named before it becomes a number."""

import jax.numpy as jnp
import numpy as np
import pytest

from ulx.metrics.features import feature_batches, features


class Network:
    """Mean and first pixel of each image; remembers the shapes it was traced with."""

    def __init__(self):
        self.traced = []

    def __call__(self, images):
        self.traced.append(images.shape)
        return jnp.stack([images.mean(axis=(1, 2, 3)), images[:, 0, 0, 0]], axis=-1)


def uniform(n, size=4):
    return np.random.default_rng(n).uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


def expected(images):
    return np.stack([images.mean(axis=(1, 2, 3)), images[:, 0, 0, 0]], axis=-1)


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_all_images_in_order(count):
    network, images = Network(), uniform(count)
    found = features(network, images, 4)
    np.testing.assert_allclose(found, expected(images), atol=1e-6)  # float32 mean of 48
    np.testing.assert_array_equal(found, features(network, jnp.asarray(images), 4))
    assert network.traced == [(4, 4, 4, 3)]  # one compilation for all batches of both calls


def test_parts_of_any_length_are_the_same_images():
    network, images = Network(), uniform(11)
    cuts = [images[:1], images[1:1], images[1:8], images[8:9], images[9:]]
    found = features(network, iter(cuts), 3, total=11)
    np.testing.assert_array_equal(found, features(network, images, 3))
    assert [len(part) for part in feature_batches(network, images, 4)] == [4, 4, 3]
    assert set(network.traced) == {(3, 4, 4, 3), (4, 4, 4, 3)}


def test_videos_as_well_as_images(capsys):
    videos = uniform(7 * 3).reshape(7, 3, 4, 4, 3)

    def first_and_last_frame(videos):
        return jnp.stack([videos[:, 0].mean(axis=(1, 2, 3)), videos[:, -1, 0, 0, 0]], axis=-1)

    found = features(first_and_last_frame, videos, 4, unit="videos")
    np.testing.assert_allclose(found[:, 0], videos[:, 0].mean(axis=(1, 2, 3)), atol=1e-6)
    np.testing.assert_array_equal(found[:, 1], videos[:, -1, 0, 0, 0])
    assert "7/7 videos" in capsys.readouterr().err


def test_bytes_are_minus_one_to_one():
    levels = np.array([0, 127, 128, 255], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (4, 2, 2, 3))
    found = features(Network(), images, 4)
    np.testing.assert_allclose(found[:, 1], [-1, -1 / 255, 1 / 255, 1], atol=1e-7)  # float32 near 1


def test_progress_counts_images(capsys):
    features(Network(), uniform(10), 4, description="features of samples")
    assert "features of samples  10/10 images" in capsys.readouterr().err


def test_wrong_images_are_named():
    images = uniform(9)
    images[6, 1, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"image 6 has \|value\| up to nan"):
        features(Network(), images, 4)
    with pytest.raises(ValueError, match=r"image 5 has \|value\| up to 255"):
        features(Network(), np.concatenate([uniform(5), np.full((1, 4, 4, 3), 255, np.float32)]), 4)
    with pytest.raises(ValueError, match=r"floats in .* got int64"):
        features(Network(), np.zeros((2, 4, 4, 3), np.int64), 4)
    with pytest.raises(ValueError, match=r"image 2 has shape \(6, 6, 3\) after images of \(4, 4, 3\)"):
        features(Network(), [uniform(2), uniform(2, size=6)], 4, total=4)
    with pytest.raises(ValueError, match="no images"):
        features(Network(), uniform(0), 4)
    with pytest.raises(ValueError, match="needs total="):
        features(Network(), iter([uniform(2)]), 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        features(Network(), uniform(2), 0)
