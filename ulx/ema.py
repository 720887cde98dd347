"""Averages of the weights whose length is chosen after training: power functions of time, combined by least squares.

Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion Models* (EDM2, arXiv 2312.02696), §3.1,
§3.2 and App. C. An average over steps 1 to t has the profile

    p_{γ,t}(τ) = (γ + 1) τ^γ / t^(γ+1)   for 0 < τ ≤ t,

which unlike an exponential's is 0 at the start and stretches with t. Its width, the standard deviation over t, is
σ_rel, which falls as γ grows: 0.05 and 0.10 are γ = 16.97 and 6.94. Training tracks a few such averages and stores
snapshots of them; a sum of snapshots whose profiles add up to another profile is, to that accuracy, its average.

The weights of the average after step τ stand for the interval (τ − 1, τ]. Of a trajectory constant between steps the
recursion of `power_average` is exactly the integral with p: Π_{s=τ+1…t} β(s) = (τ/t)^(γ+1). So the inner products of
the profiles, which are in closed form, hold for discrete steps too.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

__all__ = [
    "LARGEST_SIGMA_REL",
    "Synthesis",
    "average_decay",
    "combined",
    "gamma_of",
    "inner_product",
    "power_average",
    "sigma_rel_of",
    "synthesis",
]

LARGEST_SIGMA_REL = 12**-0.5
"""σ_rel of the plain mean of all steps, γ = 0: about 0.289."""

Floats = float | Float[np.ndarray, "..."]


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of p_γ over its length t: √(γ + 1) / ((γ + 2) √(γ + 3)) (App. C)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def average_decay(limit: float, step: Int[Array, "..."] | Int[np.ndarray, "..."]) -> Float[Array, "..."]:
    """What a training step leaves of the moving average of the weights, after so many steps before it: few at first, so
    that the initial weights are soon forgotten, and no more than `limit`."""
    return jnp.minimum(limit, (1.0 + step) / (10.0 + step))


def gamma_of(sigma_rel: float) -> float:
    """The γ > 0 of the profile with this σ_rel: the largest root of (γ + 2)² (γ + 3) = (γ + 1) / σ_rel² (App. C).

    Raises ValueError outside 0 < σ_rel < 12^(−1/2), where there is no such γ.
    """
    if not 0 < sigma_rel < LARGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel, the width of an average over the length of training, must be above 0 and below "
            f"{LARGEST_SIGMA_REL:.3f} (the mean of all steps), got {sigma_rel}"
        )
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_average(average: PyTree, params: PyTree, step: Int[Array, ""], gamma: float) -> PyTree:
    """The average after update number `step`, counted from 1: β θ̂ + (1 − β) θ with β = (1 − 1/step)^(γ+1) (§3.1).

    At step 1 it is `params`, whatever `average` holds.
    """
    # 1 − β itself, to float32's precision however late the step; and a constant stays exactly what it is, which
    # β·old + (1 − β)·new does not promise: its two factors are rounded apart.
    share = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / step))
    return jax.tree.map(lambda old, new: old + share * (new - old), average, params)


def inner_product(gamma_a: Floats, step_a: Floats, gamma_b: Floats, step_b: Floats) -> Floats:
    """∫ p_a p_b dτ of two profiles that end at `step_a` and `step_b`, in 1/steps (App. C). Arrays broadcast."""
    end = np.minimum(step_a, step_b)
    shape = (end / step_a) ** (gamma_a + 1) * (end / step_b) ** (gamma_b + 1)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shape / end


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """How to sum snapshots to the average of another profile p."""

    weights: Float[np.ndarray, " snapshots"]
    """w: 1 in sum; some are negative."""
    error: float
    """‖p − Σ w_i p_i‖ / ‖p‖, which is 0 for a profile among the snapshots.

    The sum is off by at most error · ‖p‖ · √Σ_τ (θ(τ) − θ̄)², for any θ̄ (Cauchy–Schwarz).
    """


def synthesis(
    sigma_rels: Float[np.ndarray, " snapshots"],
    steps: Int[np.ndarray, " snapshots"],
    *,
    sigma_rel: float,
    step: int,
) -> Synthesis:
    """The least-squares weights of snapshots (of width `sigma_rels[i]` after step `steps[i]`) for another average.

    What is least is ∫ (p − Σ w_i p_i)² dτ (§3.2, App. C): the normal equations hold inner products of profiles. Beyond
    the paper the weights must sum to 1. Where they only nearly do, the whole network is scaled, and at the end of
    training its parameters move so little that, with few snapshots, this can outweigh what is averaged.

    Args:
        sigma_rel: width of the average that is wanted, after step `step`, in 0 < σ_rel < 12^(−1/2).

    Raises:
        ValueError: no snapshots, a σ_rel out of range, or a step below 1.
    """
    if not len(steps) or min(step, *steps) < 1:
        raise ValueError(f"an average needs snapshots and steps from 1, got step {step} from snapshots at {steps}")
    gammas, gamma = np.array([gamma_of(float(value)) for value in sigma_rels]), gamma_of(sigma_rel)
    ends, end = steps.astype(float), float(step)
    # Profiles of norm 1: the early ones, which are short and high, would spoil the matrix's condition.
    norms = np.sqrt(inner_product(gammas, ends, gammas, ends))
    norm = math.sqrt(float(inner_product(gamma, end, gamma, end)))
    matrix = inner_product(gammas[:, None], ends[:, None], gammas, ends) / (norms[:, None] * norms)
    wanted = inner_product(gammas, ends, gamma, end) / (norms * norm)
    scale = norm / norms  # of the weights, and so the constraint's gradient
    found, pull = np.linalg.lstsq(matrix, np.stack([wanted, scale], axis=1), rcond=None)[0].T
    found = found + pull * (1 - scale @ found) / (scale @ pull)  # Lagrange's multiplier
    square = 1 - 2 * wanted @ found + found @ matrix @ found
    return Synthesis(weights=scale * found, error=math.sqrt(max(0.0, float(square))))


def combined(snapshots: Iterable[PyTree], weights: Float[np.ndarray, " snapshots"]) -> PyTree:
    """Σ w_i θ̂_i, added in float64 and returned in float32. Snapshots are taken one at a time.

    Raises ValueError if there are none, or not as many as weights.
    """
    total = None
    for weight, snapshot in zip(weights, snapshots, strict=True):
        term = jax.tree.map(lambda leaf, weight=weight: weight * np.asarray(leaf, np.float64), snapshot)
        total = term if total is None else jax.tree.map(np.add, total, term)
    if total is None:
        raise ValueError("no snapshots to combine")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), total)
