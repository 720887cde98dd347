"""What happens when training goes wrong: a loss or a gradient that stops being a number, or a loss that leaps.

It is named, and a step left out, or the run goes back to its last good checkpoint, or ends.
"""

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ulx.config import TrainConfig
from ulx.nn.transformer import Stack

__all__ = ["NORMS", "DivergedError", "Guard", "NonFiniteError", "SpikeError", "layer_names", "layer_norms"]

NORMS = "gradient_norms"
"""Of a step's metrics, the one that is no number but `layer_norms`."""
NAMED = 3
"""Layers that a message names."""


REMEMBERED, FEWEST = 200, 50
"""Steps whose losses a new one is compared with, and how many there must be."""
IN_A_ROW = 5
"""Steps that a leap lasts: single batches are hard now and then."""
_REMEMBERED = ("high", "in_a_row", "skipped", "rolled_back")
TO_DEVIATION = 1.4826
"""Of a normal distribution, the standard deviation over the median deviation from the median."""


class DivergedError(RuntimeError):
    """Training went wrong at a step."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        """The first one that went wrong: what was saved before it is good."""


class NonFiniteError(DivergedError):
    """A loss or gradient stopped being a number."""


class SpikeError(DivergedError):
    """The loss leapt, and stayed up."""


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
    """Looks at every step's metrics. Up to `skip` bad steps in a row are let pass: the step has left itself out.

    A loss that lies more than `spike` robust standard deviations above the median of the last ones, for several steps
    in a row, is a spike; 0: it does not look for them. `rollbacks` is how often the run may go back, in all.

    What it remembers goes into checkpoints: a run that is resumed judges as one that was not interrupted.
    """

    def __init__(self, names: list[str], skip: int, spike: float = 0, rollbacks: int = 0):
        self.names, self.skip, self.spike, self.rollbacks = names, skip, spike, rollbacks
        self.in_a_row = 0
        self.skipped = 0
        """In all."""
        self.rolled_back = 0
        """How often the run has gone back."""
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.high: list[float] = []

    @classmethod
    def of(cls, model: PyTree, train: TrainConfig) -> "Guard":
        return cls(layer_names(model), train.skip_nonfinite, train.spike, train.rollbacks)

    def get_state(self) -> dict[str, Any]:
        """What it remembers, as JSON values."""
        return {"losses": list(self.losses)} | {name: getattr(self, name) for name in _REMEMBERED}

    def set_state(self, state: dict[str, Any], /) -> None:
        self.losses = deque(state["losses"], maxlen=REMEMBERED)
        for name in _REMEMBERED:
            setattr(self, name, state.get(name, getattr(self, name)))

    @property
    def may_go_back(self) -> bool:
        return self.rolled_back < self.rollbacks

    def passes(self, step: int, metrics: Mapping[str, float], norms: Float[np.ndarray, " layers"]) -> bool:
        """Whether all is finite. Warns of a step that was left out.

        Raises:
            NonFiniteError: no more steps may be left out; it names the step, the terms and the layers.
            SpikeError: the loss leapt; it names the first step of that.
        """
        bad = sorted((name for name, value in metrics.items() if not np.isfinite(value)), key=_cause_first)
        if not bad:
            self.in_a_row = 0
            self._look_for_spikes(step, metrics["loss"])
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
            "bfloat16",
            step - self.in_a_row + 1,
        )

    def _look_for_spikes(self, step: int, loss: float) -> None:
        if self.spike == 0:
            return
        if len(self.losses) >= FEWEST:
            median = float(np.median(self.losses))
            deviation = TO_DEVIATION * float(np.median(np.abs(np.array(self.losses) - median)))
            if loss > median + self.spike * deviation:
                self.high.append(loss)
                if len(self.high) < IN_A_ROW:
                    return
                first = step - len(self.high) + 1
                usual, reached = f"{median:.4g} ± {deviation:.2g}", f"{self.high[0]:.4g} to {loss:.4g}"
                # Where the run goes on regardless, this is what is usual from now on.
                self.forget()
                raise SpikeError(f"the loss leapt at step {first}: {reached}, after {usual} before", first)
        self.losses.extend([*self.high, loss])
        self.high = []

    def forget(self) -> None:
        """What came before says nothing of what comes now."""
        self.losses.clear()
        self.high = []
        self.in_a_row = 0
