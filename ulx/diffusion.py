"""Variance-preserving noising: α² = sigmoid(λ), σ² = sigmoid(−λ), and conversions between x, ε and v.

All in float32: at λ = −15 the difference between α z_t and x is lost in bfloat16.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx.typing import Batch, Keys, PerExample

__all__ = [
    "Prediction",
    "alpha",
    "edm_sigma",
    "eps_from_x",
    "expand",
    "noise",
    "normal",
    "per_example_keys",
    "sigma",
    "split_keys",
    "v_from_x",
    "x_from_prediction",
]

Prediction = Literal["x", "eps", "v"]


def alpha(logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """α = sqrt(sigmoid(λ))."""
    return jnp.exp(-0.5 * jax.nn.softplus(-logsnr))


def sigma(logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """σ = sqrt(sigmoid(−λ))."""
    return jnp.exp(-0.5 * jax.nn.softplus(logsnr))


def edm_sigma(logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """σ/α = exp(−λ/2), the noise level of the variance-exploding variable u = z/α."""
    return jnp.exp(-0.5 * logsnr)


def expand(per_example: PerExample, like: Batch) -> Float[Array, "b ..."]:
    """(b,) -> (b, 1, …, 1), to multiply a batch."""
    return per_example.reshape(per_example.shape[0], *(1,) * (like.ndim - 1))


def noise(x: Batch, logsnr: PerExample, eps: Batch) -> Batch:
    """z_t = α x + σ ε."""
    logsnr = expand(logsnr, x)
    return alpha(logsnr) * x + sigma(logsnr) * eps


def eps_from_x(x_hat: Batch, z_t: Batch, logsnr: PerExample) -> Batch:
    """ε̂ = (z_t − α x̂)/σ."""
    logsnr = expand(logsnr, z_t)
    return (z_t - alpha(logsnr) * x_hat) / sigma(logsnr)


def v_from_x(x_hat: Batch, z_t: Batch, logsnr: PerExample) -> Batch:
    """v̂ = α ε̂ − σ x̂ = (α z_t − x̂)/σ."""
    logsnr = expand(logsnr, z_t)
    return (alpha(logsnr) * z_t - x_hat) / sigma(logsnr)


def x_from_prediction(prediction: Prediction, output: Batch, z_t: Batch, logsnr: PerExample) -> Batch:
    """x̂ from a network's output: itself ("x"), (z_t − σ ε̂)/α ("eps"), or α z_t − σ v̂ ("v")."""
    logsnr = expand(logsnr, z_t)
    match prediction:
        case "x":
            return output
        case "eps":
            return (z_t - sigma(logsnr) * output) / alpha(logsnr)
        case "v":
            return alpha(logsnr) * z_t - sigma(logsnr) * output
        case _:
            raise ValueError(f"unknown prediction {prediction!r}: use 'x', 'eps' or 'v'")


def per_example_keys(key: Keys, size: int) -> Key[Array, " b"]:
    """One key per example; a single key is folded with the positions 0 … size − 1.

    An example's noise then depends on its own key alone, whatever the batch around it or the mesh below it.

    Raises:
        TypeError: an old-style `jax.random.PRNGKey`.
        ValueError: as many keys as examples were expected, but another number came.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError("expected a typed key: use jax.random.key(seed), or jax.random.wrap_key_data(old_key)")
    if key.ndim == 1:
        if key.shape[0] != size:
            raise ValueError(f"{key.shape[0]} keys for a batch of {size}: pass one key, or one per example")
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(size))


def split_keys(key: Keys, num: int) -> tuple[Keys, ...]:
    """`num` independent keys from one; from one per example, `num` times one per example."""
    if key.ndim == 0:
        return tuple(jax.random.split(key, num))
    return tuple(jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, num))(key), 1, 0))


def normal(key: Keys, like: Batch) -> Batch:
    """Standard normal noise in the shape and dtype of `like`, drawn example by example."""
    keys = per_example_keys(key, like.shape[0])
    return jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(keys)
