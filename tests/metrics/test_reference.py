"""Moments of the training set: of all its images, kept, and known by data and network."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from ulx.metrics import reference
from ulx.metrics.frechet import Moments
from ulx.metrics.reference import training_moments


class Corner(eqx.Module):
    """Features of an image: three pixels of it, scaled."""

    scale: float = eqx.field(default=1.0, static=True)
    definition: str = eqx.field(default="the corner", static=True)
    metric: str = eqx.field(default="fd_corner", static=True)
    kernel_metric: str = eqx.field(default="kd_corner", static=True)
    sha256: str = eqx.field(default="c0", static=True)

    def __call__(self, images):
        return self.scale * jnp.asarray(images)[:, 0, 0, :]


def test_moments_of_other_data_are_their_own(small_dataset, tmp_path):
    """Data is known by its fingerprint alone: the same name and number of images may be others."""
    first = training_moments(small_dataset, Corner(), str(tmp_path))
    others = dataclasses.replace(small_dataset, train=small_dataset.validation, fingerprint="another")
    assert training_moments(others, Corner(), str(tmp_path)).count == len(small_dataset.validation)
    np.testing.assert_array_equal(training_moments(small_dataset, Corner(), str(tmp_path)).mean, first.mean)


def test_moments_of_all_images_are_kept_by_data_and_network(small_dataset, tmp_path, monkeypatch):
    train = np.stack([example["image"] for example in small_dataset.train])
    expected = Moments.of(train[:, 0, 0].astype(np.float64) / 127.5 - 1)

    def found(network, batch_size=4):
        return training_moments(small_dataset, network, str(tmp_path), batch_size)

    first = found(Corner())
    assert first.count == len(train) > 4  # more than a batch
    np.testing.assert_allclose(first.mean, expected.mean, atol=1e-6)  # float32 features
    np.testing.assert_allclose(first.covariance, expected.covariance, atol=1e-6)
    # Another network has moments of its own, and those of the first are still there.
    assert found(Corner(2.0, "twice the corner")).mean == pytest.approx(2 * first.mean, rel=1e-6)
    (tmp_path / "moments" / "stray.npz").write_bytes(b"of nobody")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "feature_batches", lambda *_, **__: pytest.fail("computed again"))
        np.testing.assert_array_equal(found(Corner()).mean, first.mean)
    for file in (tmp_path / "moments").glob("*.npz"):
        file.write_bytes(b"damaged")
    np.testing.assert_array_equal(found(Corner()).mean, first.mean)
