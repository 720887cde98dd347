"""Where an estimate of the bound draws its times: a placement of uniform points, and a proposal that bends them.

A diffusion loss is an integral over t in [0, 1]. A **placement** says how an example's points u are spread over [0, 1);
a random one of them is uniform, so that every placement is unbiased. A **proposal** then maps u to t, so that more
points go where the loss is large, and gives every point the weight that undoes it. Without one t = u.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ulx.diffusion import per_example_keys
from ulx.losses import sample_t
from ulx.schedules import Schedule
from ulx.typing import Keys

__all__ = [
    "Placement",
    "Proposal",
    "antithetic",
    "independent",
    "low_discrepancy",
    "proposal_from_levels",
    "stratified",
]

Points = Float[Array, "b draws"]
Values = Sequence[float] | Float[Array | np.ndarray, " _n"]


@runtime_checkable
class Placement(Protocol):
    """`placement(key, size, draws) -> u` in [0, 1): `draws` points for each of `size` examples, together uniform."""

    def __call__(self, key: Keys, size: int, draws: int) -> Points: ...


def independent(key: Keys, size: int, draws: int) -> Points:
    """Independent points: the baseline."""
    return jax.vmap(lambda k: jax.random.uniform(k, (draws,)))(per_example_keys(key, size))


def stratified(key: Keys, size: int, draws: int) -> Points:
    """One point in each of `draws` equal slices of [0, 1), independently: the variance left is that within a slice."""
    return (jnp.arange(draws) + independent(key, size, draws)) / draws


def antithetic(key: Keys, size: int, draws: int) -> Points:
    """Independent pairs u, 1 − u: exact for a loss that is linear in u. Raises ValueError for an odd `draws`."""
    if draws % 2:
        raise ValueError(f"antithetic points come in pairs: draws must be even, got {draws}")
    u = independent(key, size, draws // 2)
    return jnp.concatenate([u, 1 - u], axis=1)


def low_discrepancy(key: Keys, size: int, draws: int) -> Points:
    """One evenly spaced grid with one random shift for the whole batch (VDM), as `losses.sample_t` has it in training.

    An example's own points are evenly spaced too. All examples hang on one shift: the spread over examples says nothing
    about the error of their mean, and only replicates do.

    Raises:
        ValueError: a key per example, which cannot share a shift.
    """
    if key.ndim:
        raise ValueError("low_discrepancy shifts a whole batch by one number: pass one key, not one per example")
    return sample_t(key, size * draws).reshape(draws, size).T


@dataclass(frozen=True)
class Proposal:
    """Importance sampling: a density over t that is constant between the times of given λ, by `proposal_from_levels`.

    What it knows is λ, so that it serves every schedule with its end points. Being constant in t, within a piece it is
    the uniform sampling that it was learned from: on that schedule the right masses cannot make the variance larger.
    """

    logsnr_edges: tuple[float, ...]
    """Where its pieces begin and end, decreasing from the schedule's logsnr_max to its logsnr_min."""
    mass: Float[Array, " levels"]
    """The share of the points that each piece gets; positive, summing to 1."""

    def __call__(self, u: Points, schedule: Schedule) -> tuple[Points, Points]:
        """t of uniform u by the inverse of the distribution function, and weights 1/q(t): E[weight · f(t)] = ∫ f dt.

        Raises:
            ValueError: the schedule has other end points than the proposal: part of the integral would be missed.
        """
        ends, wanted = (self.logsnr_edges[0], self.logsnr_edges[-1]), (schedule.logsnr_max, schedule.logsnr_min)
        if not np.allclose(ends, wanted, rtol=0, atol=1e-4):
            raise ValueError(
                f"the proposal covers log-SNRs from {ends[0]:g} to {ends[1]:g}, the schedule {wanted[0]:g} to "
                f"{wanted[1]:g}: learn the proposal from an estimate between the schedule's end points"
            )
        inner = schedule.inverse(jnp.asarray(self.logsnr_edges[1:-1], jnp.float32))
        edges = jnp.concatenate([jnp.zeros(1), inner, jnp.ones(1)])
        upper, width = jnp.cumsum(self.mass), jnp.diff(edges)
        # The last u below 1 may lie above a sum of masses that was rounded down.
        piece = jnp.minimum(jnp.searchsorted(upper, u, side="right"), len(self.mass) - 1)
        fraction = jnp.clip((u - (upper - self.mass)[piece]) / self.mass[piece], 0, 1)
        return edges[piece] + width[piece] * fraction, (width / self.mass)[piece]


# Put together again by transformations, so the checks are not in the constructor.
jax.tree_util.register_dataclass(Proposal, data_fields=["mass"], meta_fields=["logsnr_edges"])


def proposal_from_levels(logsnr_edges: Values, root_mean_square: Values, *, uniform_share: float = 0.1) -> Proposal:
    """The proposal learned from a loss that was measured level by level, in an earlier estimate or in a run's results.

    The variance of f/q is smallest for q ∝ sqrt(E f²), so that a piece gets a mass in proportion to the root mean
    square of its nats (or bits: the unit does not matter). Of the points, `uniform_share` goes in equal parts to all
    pieces, whatever was measured: where a small sample saw nothing, the weights stay bounded.

    Args:
        logsnr_edges: λ at which the levels begin and end, decreasing; one more than levels.
        root_mean_square: sqrt(mean over examples of the level's nats²).

    Raises:
        ValueError: edges that do not decrease, another number of levels, a negative or non-finite root mean square,
            nothing but zeros, or `uniform_share` outside (0, 1].
    """
    edges = tuple(float(edge) for edge in np.asarray(logsnr_edges, np.float64))
    size = np.asarray(root_mean_square, np.float64)
    if len(edges) < 2 or any(not later < now for now, later in itertools.pairwise(edges)):
        raise ValueError(f"logsnr_edges must decrease, from the least noise to the most; got {edges}")
    if size.shape != (len(edges) - 1,):
        raise ValueError(f"{len(edges)} edges bound {len(edges) - 1} levels, got values of shape {size.shape}")
    if not (np.all(np.isfinite(size)) and np.all(size >= 0) and size.sum() > 0):
        raise ValueError(f"root mean squares are finite, not negative and not all 0; got {size.tolist()}")
    if not (math.isfinite(uniform_share) and 0 < uniform_share <= 1):
        raise ValueError(f"uniform_share must be in (0, 1], got {uniform_share}")
    mass = (1 - uniform_share) * size / size.sum() + uniform_share / len(size)
    return Proposal(edges, jnp.asarray(mass, jnp.float32))
