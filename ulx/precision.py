"""Mixed precision: networks may run in bfloat16, everything around them stays in float32."""

from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

__all__ = ["Dtype", "cast"]

Dtype = Literal["float32", "bfloat16"]

Tree = TypeVar("Tree", bound=PyTree)


def cast(tree: Tree, dtype: Dtype) -> Tree:
    """The floating-point leaves of `tree` in `dtype`. Inside a loss: gradients come back in the leaves' own dtype."""
    wanted = jnp.dtype(dtype)
    return jax.tree.map(lambda leaf: leaf.astype(wanted) if eqx.is_inexact_array(leaf) else leaf, tree)
