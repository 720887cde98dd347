"""Weights of which each device holds a part, put together where they are used (inside `jax.shard_map`)."""

from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

__all__ = ["WEIGHTS", "Split", "whole"]

WEIGHTS = "fsdp"
"""The mesh axis over which weights are split."""

Tree = TypeVar("Tree", bound=PyTree)


class Split(eqx.Module):
    """In the place of an array: the part of it that this device holds, cut along an axis.

    The gradient with respect to a part is the sum over the devices that gathered it: gathering turned round.
    """

    part: Float[Array, "..."]
    axis: int = eqx.field(static=True)
    """Counted from the end (−1 is the last), so that it stays the same where a leading axis is scanned over."""

    def whole(self) -> Float[Array, "..."]:
        """The array, gathered from all parts."""
        return _gather(self.part, self.part.ndim + self.axis)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(part: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    return jax.lax.all_gather(part, WEIGHTS, axis=axis, tiled=True)


def _gather_forward(part: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], None]:
    return _gather(part, axis), None


def _gather_backward(axis: int, _: None, cotangent: Float[Array, "..."]) -> tuple[Float[Array, "..."]]:
    # Summed in float32 whatever the network computes in: one rounding, however many devices.
    wide = jax.lax.psum_scatter(cotangent.astype(jnp.float32), WEIGHTS, scatter_dimension=axis, tiled=True)
    return (wide.astype(cotangent.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def whole(tree: Tree, *, leave: tuple[type, ...] = ()) -> Tree:
    """`tree` with every `Split` gathered, but for those in nodes of the types `leave`."""
    gather = lambda node: node.whole() if isinstance(node, Split) else node  # noqa: E731
    return jax.tree.map(gather, tree, is_leaf=lambda node: isinstance(node, (Split, *leave)))
