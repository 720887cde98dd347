"""A network over a few images at a time, where its activations are too large for the caches of a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = ["in_chunks"]


def in_chunks(
    network: Callable[[Float[Array, "_b *shape"]], Float[Array, "_b d"]],
    images: Float[Array, "n *shape"],
    cpu_chunk: int,
) -> Float[Array, "n d"]:
    """`network(images)`, on a CPU in a loop over `cpu_chunk` images at a time (the last ones padded)."""
    count = len(images)
    chunk = min(cpu_chunk, count) if jax.default_backend() == "cpu" else count
    if chunk == count:
        return network(images)
    chunks = jnp.pad(images, ((0, -count % chunk), *((0, 0),) * (images.ndim - 1)))
    found = lax.map(network, chunks.reshape(-1, chunk, *images.shape[1:]))
    return found.reshape(-1, found.shape[-1])[:count]
