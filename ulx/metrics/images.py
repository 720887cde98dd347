"""Errors between images, and the search for an image's nearest neighbour in a reference set."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64, Num

__all__ = ["nearest", "psnr"]


def psnr(
    a: Float[Array, "b *shape"] | Float[np.ndarray, "b *shape"],
    b: Float[Array, "..."] | Float[np.ndarray, "..."],
) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio of each image (or clip) in dB, for values in [-1, 1]: 10 log10(2²/MSE).

    Inputs are used as they are, neither clipped nor rounded. Equal images give +inf: a set that has some has no
    finite mean, and its median still says something. Raises ValueError unless both have the same shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr compares images of one shape, got {a.shape} and {b.shape}")
    difference = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
    mse = jnp.mean(difference**2, axis=tuple(range(1, difference.ndim)))
    return 10.0 * jnp.log10(4.0 / mse)


def nearest(
    queries: Num[Array, "q *shape"] | Num[np.ndarray, "q *shape"],
    references: Num[Array, "r ..."] | Num[np.ndarray, "r ..."],
    chunk: int = 1024,
) -> tuple[Int64[np.ndarray, " q"], Float64[np.ndarray, " q"]]:
    """For each query (pixels or features) the index of the closest reference and the Euclidean distance to it.

    The search takes `chunk` queries against `chunk` references at a time, as one matrix product in float64. Of
    references equally close up to rounding any may win. A copy has distance 0 exactly.
    Raises ValueError if there are no references or shapes differ.
    """
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(f"queries have shape {queries.shape[1:]}, references {references.shape[1:]}")
    if not len(references):
        raise ValueError("nearest needs at least one reference")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    index = np.zeros(len(queries), np.int64)
    distance = np.full(len(queries), np.inf)
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        query = _rows(queries[part])
        best, closest = index[part], np.full(len(query), np.inf)
        for first in range(0, len(references), chunk):
            reference = _rows(references[first : first + chunk])
            # |q − r|² less |q|², which is the same for every r.
            score = np.einsum("rd,rd->r", reference, reference) - 2.0 * (query @ reference.T)
            column = score.argmin(axis=1)
            lowest = score[np.arange(len(query)), column]
            better = lowest < closest
            best[better], closest[better] = first + column[better], lowest[better]
        # Again from the difference: the expansion above cancels badly where it matters, near zero.
        distance[part] = np.linalg.norm(query - _rows(references[best]), axis=1)
    return index, distance


def _rows(x: Num[Array, "n *shape"] | Num[np.ndarray, "n *shape"]) -> Float64[np.ndarray, "n d"]:
    return np.asarray(x).reshape(len(x), -1).astype(np.float64)
