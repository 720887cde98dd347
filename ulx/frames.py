"""The frames at the beginning of a clip that a network is given, as one array beside what it denoises."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["given_frames", "given_shape", "padded"]


def given_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the given frames of a clip of `shape`, `(t, h, w, c)`: one channel more. Raises ValueError for an image."""
    if len(shape) != 4:
        raise ValueError(f"frames can be given of clips `(t, h, w, c)`, not of examples of shape {shape}")
    return (*shape[:-1], shape[-1] + 1)


def given_frames(x: Float[Array, "b t h w c"], count: Int[Array, " b"] | int) -> Float[Array, "b t h w k"]:
    """The first `count` frames of each clip as they are, the others 0, and a last channel that is 1 where they are
    given."""
    time = jnp.arange(x.shape[1]).reshape(1, -1, 1, 1, 1)
    known = (time < jnp.asarray(count).reshape(-1, 1, 1, 1, 1)).astype(x.dtype)
    mask = jnp.broadcast_to(known, (*x.shape[:-1], 1))
    return jnp.concatenate([x * known, mask], axis=-1)


def padded(first: Float[Array, "b f h w c"], frames: int) -> Float[Array, "b t h w c"]:
    """Clips of so many frames that begin with these, the others 0."""
    return jnp.pad(first, [(0, 0), (0, frames - first.shape[1]), (0, 0), (0, 0), (0, 0)])
