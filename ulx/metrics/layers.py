"""What the packaged networks share: the 1×1 convolution, the precision of products, and batches cut up for a CPU."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = ["PRECISION", "Pointwise", "in_chunks"]

# Full float32 products on accelerators too, whose default rounds inputs to TF32 or bfloat16.
PRECISION = lax.Precision.HIGHEST


class Pointwise(eqx.Module):
    """A 1×1 convolution, which is one matrix product over all pixels."""

    weight: Float[Array, "c_in c_out"]
    bias: Float[Array, " c_out"]

    def __call__(self, x: Float[Array, "*shape c_in"]) -> Float[Array, "*shape c_out"]:
        y = jnp.dot(x.reshape(-1, x.shape[-1]), self.weight, precision=PRECISION) + self.bias
        return y.reshape(*x.shape[:-1], -1)


def in_chunks(function: Callable[..., Array], size: int, *batches: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """`function(*batches)`, on a CPU `size` examples at a time; the function must treat each example by itself.

    A CPU streams the early activations of a whole batch through main memory, and those of a few examples stay near its
    caches. Changes no result beyond rounding.
    """
    count = len(batches[0])
    size = min(size, count) if jax.default_backend() == "cpu" else count
    if size == count:
        return function(*batches)

    def chunked(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    found = lax.map(lambda parts: function(*parts), tuple(map(chunked, batches)))
    return found.reshape(-1, *found.shape[2:])[:count]
