"""What happens when a loss or a gradient stops being a number: it is named, left out or the end of the run."""

import warnings
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ulx.nn.transformer import Stack

__all__ = ["NORMS", "Guard", "NonFiniteError", "layer_names", "layer_norms"]

NORMS = "gradient_norms"
"""Of a step's metrics, the one that is no number but `layer_norms`."""
NAMED = 3
"""Layers that a message names."""


class NonFiniteError(RuntimeError):
    """A loss or gradient stopped being a number."""


def layer_norms(gradients: PyTree) -> Float[Array, " layers"]:
    """The norm of every array of a model's gradient, of stacked ones that of each layer."""
    found = []
    for _, array, stacked in _arrays(gradients):
        squares = jnp.square(array.astype(jnp.float32))
        found.append(squares.sum(tuple(range(1, array.ndim))) if stacked else squares.sum().reshape(1))
    return jnp.sqrt(jnp.concatenate(found))


def layer_names(model: PyTree) -> list[str]:
    """What the entries of `layer_norms` belong to: `decoder.network.middle.blocks.up.weight, layer 2`."""
    names = []
    for name, array, stacked in _arrays(model):
        names += [f"{name}, layer {layer}" for layer in range(len(array))] if stacked else [name]
    return names


def _arrays(tree: PyTree) -> Iterator[tuple[str, Array, bool]]:
    """Path, array and whether it is a stack's, of all arrays of floating-point numbers."""
    is_stack = lambda node: isinstance(node, Stack)  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stack):
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact):
                name = jax.tree_util.keystr((*path, *inner), simple=True, separator=".")
                yield name, leaf, is_stack(node)


def _cause_first(name: str) -> tuple[bool, str]:
    """Terms of the loss before the gradients, which follow from them."""
    return name.startswith("gradient"), name


class Guard:
    """Looks at every step's metrics. Up to `skip` bad steps in a row are let pass: the step has left itself out."""

    def __init__(self, names: list[str], skip: int):
        self.names, self.skip = names, skip
        self.in_a_row = 0
        self.skipped = 0
        """In all, since this process began."""

    def passes(self, step: int, metrics: Mapping[str, float], norms: Float[np.ndarray, " layers"]) -> bool:
        """Whether all is finite. Warns of a step that was left out; where no more may be, raises NonFiniteError, naming
        the step, the terms and the layers."""
        bad = sorted((name for name, value in metrics.items() if not np.isfinite(value)), key=_cause_first)
        if not bad:
            self.in_a_row = 0
            return True
        layers = [self.names[i] for i in np.flatnonzero(~np.isfinite(norms))]
        said = f"not finite at step {step}: {', '.join(bad)}"
        if layers:
            said += f"; the gradient of {'; '.join(layers[:NAMED])}"
            said += f" and {len(layers) - NAMED} more of {len(self.names)}" * (len(layers) > NAMED)
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row <= self.skip:
            warnings.warn(f"{said}. This step was left out", stacklevel=2)
            return False
        raise NonFiniteError(
            f"{said}. "
            + (f"{self.skip} steps before it were left out. " if self.skip else "")
            + "Nothing was saved after the last checkpoint; try a lower learning rate, or float32 if this ran in "
            "bfloat16"
        )
