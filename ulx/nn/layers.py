"""The smallest parts: linear, convolution, normalisation, dropout, embeddings."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx.typing import PerExample

__all__ = [
    "Conv",
    "Dropout",
    "GroupNorm",
    "Linear",
    "LogSNREmbedding",
    "by_frames",
    "convolve",
    "draw",
    "layer_norm",
    "rms_norm",
]


def draw(key: Key[Array, ""], shape: tuple[int, ...], scale: float) -> Float[Array, "*shape"]:
    """Initial weights: normal with standard deviation `scale`.

    XLA takes half a second to compile a random draw of each new shape, so draws are made in few sizes and cut.
    """
    count = math.prod(shape)
    size = 4096
    while size < count:
        size *= 8
    return _cut(_standard_normal(key, size), shape, scale)


@partial(jax.jit, static_argnums=1)
def _standard_normal(key: Key[Array, ""], size: int) -> Float[Array, " size"]:
    return jax.random.normal(key, (size,))


@partial(jax.jit, static_argnums=1)
def _cut(values: Float[Array, " size"], shape: tuple[int, ...], scale: Float[Array, ""]) -> Float[Array, "*shape"]:
    return scale * values[: math.prod(shape)].reshape(shape)


class Linear(eqx.Module):
    """x @ w + b over the last axis; w is (in, out), drawn with variance `gain²/in`.

    The leading axes are flattened first: XLA on a CPU contracts several axes of a weight gradient about three
    times slower than one.
    """

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"] | None

    def __init__(self, in_size: int, out_size: int, *, bias: bool = True, gain: float = 1.0, key: Key[Array, ""]):
        self.weight = draw(key, (in_size, out_size), gain / math.sqrt(in_size))
        self.bias = jnp.zeros(out_size) if bias else None

    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        y = x.reshape(-1, x.shape[-1]) @ self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


class Conv(eqx.Module):
    """A convolution with an odd kernel that keeps the size (zero padding), over any number of spatial axes."""

    weight: Float[Array, "*kernel in out"]
    bias: Float[Array, " out"]

    def __init__(
        self,
        rank: int,
        in_size: int,
        out_size: int,
        *,
        kernel: int = 3,
        gain: float = 1.0,
        key: Key[Array, ""],
    ):
        if kernel % 2 == 0:
            raise ValueError(f"a kernel that keeps the size is odd, got {kernel}")
        shape = (kernel,) * rank + (in_size, out_size)
        self.weight = draw(key, shape, gain / math.sqrt(in_size * kernel**rank))
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: Float[Array, "b *space in"]) -> Float[Array, "b *space out"]:
        if x.ndim == 5:
            return jax.lax.platform_dependent(x, self.weight, cpu=by_frames, default=convolve) + self.bias
        return convolve(x, self.weight) + self.bias


def convolve(x: Float[Array, "b *space in"], weight: Float[Array, "*kernel in out"]) -> Float[Array, "b *space out"]:
    rank = x.ndim - 2
    space = "".join("thw"[-rank:])
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(x, weight, (1,) * rank, "SAME", dimension_numbers=numbers)


def by_frames(x: Float[Array, "b t h w in"], weight: Float[Array, "k kh kw in out"]) -> Float[Array, "b t h w out"]:
    """The same, as a convolution of images whose channels are those of a frame and its neighbours in time.

    XLA on a CPU takes 1.6 to 3.1 times as long, forward and backward, for one over three axes
    (benchmarks/kernels.py).
    """
    batch, frames, height, width, channels = x.shape
    taps = weight.shape[0]
    padded = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0), (0, 0), (0, 0)))
    windows = jnp.concatenate([padded[:, tap : tap + frames] for tap in range(taps)], axis=-1)
    kernel = weight.transpose(1, 2, 0, 3, 4).reshape(*weight.shape[1:3], taps * channels, -1)
    y = convolve(windows.reshape(batch * frames, height, width, taps * channels), kernel)
    return y.reshape(batch, frames, height, width, -1)


def layer_norm(x: Float[Array, "*n c"], epsilon: float = 1e-6) -> Float[Array, "*n c"]:
    """Layer norm without parameters, statistics in float32. (Scale and shift come from the modulation.)"""
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    # Two moments in one pass over x; activations here are of order one, so the difference is safe in float32.
    variance = jnp.maximum((wide * wide).mean(axis=-1, keepdims=True) - mean * mean, 0.0)
    return ((wide - mean) * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def rms_norm(x: Float[Array, "*n c"], scale: Float[Array, " c"], epsilon: float = 1e-6) -> Float[Array, "*n c"]:
    """x / rms(x) · scale, in float32."""
    wide = x.astype(jnp.float32)
    norm = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (norm * scale).astype(x.dtype)


class GroupNorm(eqx.Module):
    """Group norm over all spatial axes and the channels of a group, with scale and shift; statistics in float32."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, group_size: int = 16):
        if channels % group_size:
            raise ValueError(f"channels={channels} is not a multiple of the group size {group_size}")
        self.scale = jnp.ones(channels)
        self.shift = jnp.zeros(channels)
        self.groups = channels // group_size

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        wide = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        mean = wide.mean(axis=(1, 3), keepdims=True)
        variance = jnp.maximum((wide * wide).mean(axis=(1, 3), keepdims=True) - mean * mean, 0.0)
        wide = (wide - mean) * jax.lax.rsqrt(variance + 1e-6)
        return (wide.reshape(x.shape) * self.scale + self.shift).astype(x.dtype)


class Dropout(eqx.Module):
    """Dropout whose mask belongs to the example (its own key), not to the batch. `key=None` turns it off."""

    rate: float = eqx.field(static=True)

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"a dropout rate is in [0, 1), got {rate}")
        self.rate = rate

    def __call__(self, x: Float[Array, " b *n"], key: Key[Array, " b"] | None) -> Float[Array, " b *n"]:
        if key is None or self.rate == 0:
            return x
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(key)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class LogSNREmbedding(eqx.Module):
    """λ -> conditioning vector: sinusoids of λ at geometric frequencies, then two linear layers.

    λ itself is a good coordinate (EDM feeds ¼ ln σ, which is −λ/8). Periods from 2π·2 to 2π·64 in λ: over the
    range of ±15 the fastest turns a few times and the slowest is monotone.
    """

    frequencies: tuple[float, ...] = eqx.field(static=True)
    first: Linear
    second: Linear

    def __init__(self, channels: int, *, num_frequencies: int = 16, key: Key[Array, ""]):
        ratios = [i / (num_frequencies - 1) for i in range(num_frequencies)]
        self.frequencies = tuple(0.5 * (1 / 32) ** ratio for ratio in ratios)
        first, second = jax.random.split(key)
        self.first = Linear(2 * num_frequencies, channels, key=first)
        self.second = Linear(channels, channels, key=second)

    def __call__(self, logsnr: PerExample) -> Float[Array, "b c"]:
        angles = logsnr[:, None] * jnp.asarray(self.frequencies)
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1) * math.sqrt(2)
        return self.second(jax.nn.silu(self.first(features.astype(self.first.weight.dtype))))
