"""Rotary position embedding over the axes of a grid (RoPE): attention sees how tokens lie to each other.

Each pair of channels of a query and of a key is turned by an angle proportional to the token's place along one axis, so
that their product depends on the difference of the places alone. A head then learns "what was there one frame ago, two
positions to the left" once, and not for every place anew.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["angles", "rotate"]

SHORTEST = 3.0
"""Positions in a turn of the fastest pair of each axis: from one to the next by less than half a turn."""
LONGEST = 4.0
"""Sides of the grid in a turn of the slowest."""


def angles(grid: tuple[int, ...], head_size: int) -> Float[np.ndarray, "n pairs"]:
    """In radians, of the tokens of a grid in row-major order. The pairs of channels are divided among the axes, the
    last ones getting one more where they do not divide evenly; within an axis the turns' lengths are geometric.

    Raises ValueError for a head whose channels are no pairs, or fewer pairs than axes.
    """
    pairs = head_size // 2
    if head_size % 2 or pairs < len(grid):
        raise ValueError(f"head_size={head_size} is to be a pair of channels or more for each axis of {grid}")
    places = np.meshgrid(*map(np.arange, grid), indexing="ij")
    found = []
    for axis, place in enumerate(places):
        count = (pairs + axis) // len(grid)
        turn = np.geomspace(SHORTEST, max(SHORTEST, LONGEST * max(grid)), count)
        found.append(place.reshape(-1, 1) * (2 * np.pi / turn))
    return np.concatenate(found, axis=1).astype(np.float32)


def rotate(x: Float[Array, "b n h d"], by: Float[np.ndarray, "n pairs"]) -> Float[Array, "b n h d"]:
    """Channel i turned with channel i + d/2, in float32."""
    cosine, sine = jnp.cos(by)[:, None], jnp.sin(by)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.astype(x.dtype)
