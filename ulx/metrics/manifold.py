"""Precision and recall of generated features (Kynkäänniemi et al. 2019), from balls around the examples of a set.

A set's manifold is the union of balls, one around each example, that reach its k-th nearest neighbour in the set.
Precision is the share of generated examples within the real manifold: are they like real ones? Recall is the share
of real examples within the generated manifold: are all kinds of them generated? Both depend on N and k.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

__all__ = ["NEIGHBOURS", "PrecisionRecall", "precision_recall"]

NEIGHBOURS = 3
"""k of the paper."""
# A squared distance is a difference of products whose rounding is some 1e-16 of them: closer than this is a tie, and
# a tie is within the ball. Without it a copy of an example that has k more copies would fall out of its ball.
_TIE = 1e-12


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of examples, 0 to 1, and whether each one counts: their means are the shares."""

    precise: Bool[np.ndarray, " m"]
    """Of each generated example, whether it lies within the real manifold."""
    recalled: Bool[np.ndarray, " n"]
    """Of each real example, whether it lies within the generated manifold."""

    @property
    def precision(self) -> float:
        return float(self.precise.mean())

    @property
    def recall(self) -> float:
        return float(self.recalled.mean())


def precision_recall(
    real: Float[np.ndarray, "n d"],
    generated: Float[np.ndarray, "m _"],
    neighbours: int = NEIGHBOURS,
    rows: int = 2048,
) -> PrecisionRecall:
    """Precision and recall with Euclidean distances. Balls are closed.

    `rows` examples against as many are held at a time, in float64 (50,000 × 2,048 features on each side take the
    features and 200 MB); changes no result. Raises ValueError for different numbers of features, `neighbours` below
    1, or no more examples than that on a side.
    """
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and of {generated.shape[1]} dimensions cannot be compared")
    if not 1 <= neighbours < min(len(real), len(generated)):
        raise ValueError(
            f"a ball around an example that reaches its neighbour {neighbours} needs neighbours >= 1 and more examples "
            f"than that on each side, there are {len(real)} and {len(generated)}"
        )
    centre = real.mean(axis=0, dtype=np.float64)  # distances from small coordinates round less
    real_radii, generated_radii = (_radii(x, centre, neighbours, rows) for x in (real, generated))
    precise, recalled = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    for i, left in _blocks(generated, centre, rows):
        for j, right in _blocks(real, centre, rows):
            squared, tie = _squared_distances(left, right)
            precise[i] |= (squared <= real_radii[j] + tie).any(axis=1)
            recalled[j] |= (squared <= generated_radii[i, None] + tie).any(axis=0)
    return PrecisionRecall(precise, recalled)


def _radii(
    x: Float[np.ndarray, "n d"], centre: Float64[np.ndarray, " d"], neighbours: int, rows: int
) -> Float64[np.ndarray, " n"]:
    """Of each example the squared distance to its k-th nearest neighbour, itself left out."""
    radii = np.zeros(len(x))
    for i, left in _blocks(x, centre, rows):
        closest = np.full((len(left), neighbours), np.inf)
        for j, right in _blocks(x, centre, rows):
            squared, _ = _squared_distances(left, right)
            if i == j:
                np.fill_diagonal(squared, np.inf)
            both = np.concatenate([closest, squared], axis=1)
            closest = np.partition(both, neighbours - 1, axis=1)[:, :neighbours]
        radii[i] = closest[:, -1]
    return radii


def _squared_distances(
    x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "m d"]
) -> tuple[Float64[np.ndarray, "n m"], Float64[np.ndarray, "n m"]]:
    """|x − y|², and how far apart two of them may be by rounding."""
    sizes = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("md,md->m", y, y)
    return sizes - 2.0 * (x @ y.T), _TIE * sizes


def _blocks(
    x: Float[np.ndarray, "n d"], centre: Float64[np.ndarray, " d"], rows: int
) -> Iterator[tuple[slice, Float64[np.ndarray, "_b d"]]]:
    for start in range(0, len(x), rows):
        part = x[start : start + rows] - centre
        yield slice(start, start + len(part)), part
