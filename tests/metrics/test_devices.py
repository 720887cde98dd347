"""Neither the batch size nor the number of devices changes a distance: from images to d², on virtual devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

SMALL = """
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax


class Network(eqx.Module):
    '''16 features; three images at a time, as networks do that mind the caches.'''

    weight: jax.Array

    def __call__(self, images):
        count = len(images)
        traced.append(count)
        parts = jnp.pad(images, ((0, -count % 3), (0, 0), (0, 0), (0, 0))).reshape(-1, 3, *images.shape[1:])
        return lax.map(self.features, parts).reshape(-1, 16)[:count]

    def features(self, images):
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(images, self.weight, (2, 2), "SAME", dimension_numbers=dims)
        return jax.nn.relu(y).mean(axis=(1, 2))


traced = []
network = Network(jax.random.normal(jax.random.key(0), (3, 3, 3, 16)))
"""

PACKAGED = """
from ulx.metrics import efficientnet

traced = []
network = efficientnet.load()
"""

MEASURE = """
import json

import jax
import numpy as np

from ulx.metrics.features import feature_batches, features
from ulx.metrics.frechet import Moments, frechet_distance

rng = np.random.default_rng(0)


def images(count, spread):
    '''Random colours in the four quarters, and noise.'''
    quarters = rng.uniform(-spread, spread, (count, 2, 2, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return np.clip(quarters + rng.normal(0, 0.2, quarters.shape), -1, 1).astype(np.float32)


real, generated = images({count} + 30, 1.0), images({count}, 0.7)
distances = {{}}
reference = Moments.of(features(network, real, 50))
for batch_size in (1, 7, 64):
    moments = Moments.empty(reference.dims)
    for found in feature_batches(network, generated, batch_size):
        moments = moments.update(found)
    assert moments.count == {count} > reference.dims
    distances[batch_size] = frechet_distance(moments, reference)
print(json.dumps({{"devices": jax.local_device_count(), "distances": distances, "traced": traced}}))
"""


def measured(network: str, count: int, devices: int) -> tuple[list[float], list[int]]:
    """A distance by batches of 1, 7 and 64, and how many images at a time the network was compiled for."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = network + MEASURE.format(count=count)
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == devices
    return list(result["distances"].values()), result["traced"]


def agree(distances: list[float]):
    print([f"{value / distances[0] - 1:.1e}" for value in distances])
    # Features are float32 sums, whose order a batch size may change: 1e-7 of them, seen against differences of means.
    assert distances[0] > 0.01
    np.testing.assert_allclose(distances, distances[0], rtol=1e-5)


def test_batch_size_and_devices_do_not_change_a_distance():
    (alone, whole_batches), (together, shares) = measured(SMALL, 100, 1), measured(SMALL, 100, 4)
    assert whole_batches == [50, 1, 7, 64]
    assert shares == [13, 1, 2, 16]  # of four devices, a padded batch in equal parts
    agree([*alone, *together])


@pytest.mark.slow
def test_nor_that_of_the_packaged_network():
    agree([value for devices in (1, 4) for value in measured(PACKAGED, 1400, devices)[0]])
