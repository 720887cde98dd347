"""How a grid shrinks and grows: patches to channels and back, steps down and up, one grid brought to another.

A factor is one number for all axes or one per axis: `(1, 2, 2)` halves a video's height and width and keeps its frames.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx.nn.layers import Linear

__all__ = [
    "Down",
    "PerAxis",
    "PerStep",
    "Up",
    "check_factors",
    "factors",
    "fit_grid",
    "patchify",
    "per_axis",
    "per_step",
    "reduction",
    "shrunk",
    "unpatchify",
]

PerAxis = int | tuple[int, ...]
"""One number for all spatial axes, or one per axis."""

PerStep = int | tuple[int | tuple[int, ...], ...]
"""One number for all axes of all steps, or one `PerAxis` per step."""


def per_axis(value: PerAxis, rank: int) -> tuple[int, ...]:
    """2 -> (2, 2) for images; a tuple must have one entry per spatial axis."""
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"expected one number per spatial axis ({rank}), got {values}")
    return values


def per_step(value: PerStep, steps: int) -> tuple[PerAxis, ...]:
    """2 -> (2, 2, 2) for three steps; a tuple must have one entry per step, `((1, 2, 2), 2)` for two."""
    values = (value,) * steps if isinstance(value, int) else tuple(value)
    if len(values) != steps:
        raise ValueError(f"expected one entry per step between two stages ({steps}), got down={value}")
    return values


def check_factors(patch: PerAxis, down: PerStep, steps: int) -> None:
    """What can be known before the number of axes is: raises ValueError for a missing step or a factor below 1."""
    for factor in (patch, *per_step(down, steps)):
        if min((factor,) if isinstance(factor, int) else factor) < 1:
            raise ValueError(f"a grid is reduced by factors of at least 1, got patch={patch}, down={down}")


def factors(patch: PerAxis, down: PerStep, steps: int, rank: int) -> list[tuple[int, ...]]:
    """The patch and then each step, all with one number per axis."""
    return [per_axis(factor, rank) for factor in (patch, *per_step(down, steps))]


def reduction(patch: PerAxis, down: PerStep, steps: int, rank: int) -> tuple[int, ...]:
    """Positions of the finest grid, per axis, under one of the coarsest: the patch times all steps."""
    return tuple(math.prod(along) for along in zip(*factors(patch, down, steps, rank), strict=True))


def shrunk(grid: tuple[int, ...], factor: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // f for size, f in zip(grid, factor, strict=True))


class Down(eqx.Module):
    """Shrink the grid: each block of `factor` positions into channels, then linear."""

    project: Linear
    factor: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, factor: tuple[int, ...], in_size: int, out_size: int, *, key: Key[Array, ""]):
        self.project = Linear(math.prod(factor) * in_size, out_size, key=key)
        self.factor = factor

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *coarse d"]:
        return self.project(patchify(x, self.factor))


class Up(eqx.Module):
    """Grow the grid: linear, then channels into a block of `factor` positions."""

    project: Linear
    factor: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, factor: tuple[int, ...], in_size: int, out_size: int, *, key: Key[Array, ""]):
        self.project = Linear(in_size, math.prod(factor) * out_size, key=key)
        self.factor = factor

    def __call__(self, x: Float[Array, "b *coarse c"]) -> Float[Array, "b *space d"]:
        return unpatchify(self.project(x), self.factor)


def patchify(x: Float[Array, "b *space c"], patch: PerAxis) -> Float[Array, "b *grid p"]:
    """Space to channels: each patch of p₁ × … × p_r positions becomes one position with p₁⋯p_r·c channels.

    Raises ValueError if an axis is not a multiple of its patch.
    """
    *space, channels = x.shape[1:]
    patches = per_axis(patch, len(space))
    if any(size % p for size, p in zip(space, patches, strict=True)):
        raise ValueError(f"a grid of {tuple(space)} does not divide into patches of {patches}")
    if all(p == 1 for p in patches):
        return x
    split = [n for size, p in zip(space, patches, strict=True) for n in (size // p, p)]
    rank = len(space)
    x = x.reshape(x.shape[0], *split, channels)
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.transpose(order).reshape(x.shape[0], *shrunk(tuple(space), patches), math.prod(patches) * channels)


def unpatchify(x: Float[Array, "b *grid p"], patch: PerAxis) -> Float[Array, "b *space c"]:
    """The inverse of `patchify`."""
    *grid, packed = x.shape[1:]
    patches = per_axis(patch, len(grid))
    if all(p == 1 for p in patches):
        return x
    channels, rest = divmod(packed, math.prod(patches))
    if rest:
        raise ValueError(f"{packed} channels are not patches of {patches}")
    rank = len(grid)
    x = x.reshape(x.shape[0], *grid, *patches, channels)
    order = (0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank)
    space = [size * p for size, p in zip(grid, patches, strict=True)]
    return x.transpose(order).reshape(x.shape[0], *space, channels)


def fit_grid(x: Float[Array, "b *space c"], grid: tuple[int, ...]) -> Float[Array, "b *grid d"]:
    """Bring a latent to another grid: finer axes are patched into channels, coarser ones repeated.

    Raises ValueError where neither size is a multiple of the other.
    """
    space = x.shape[1:-1]
    if any(max(a, b) % min(a, b) for a, b in zip(space, grid, strict=True)):
        raise ValueError(
            f"a latent grid of {space} does not fit a token grid of {grid}: "
            "per axis one must be a multiple of the other; change the decoder's patch or stages"
        )
    x = patchify(x, tuple(max(a // b, 1) for a, b in zip(space, grid, strict=True)))
    for axis, size in enumerate(grid, start=1):
        x = jnp.repeat(x, size // x.shape[axis], axis=axis)
    return x
