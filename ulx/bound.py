"""The bound as a typed result, and its estimate on held-out data: how many nats, where, and how surely."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx import diffusion
from ulx.losses import PriorTerms, diffusion_loss, terminal_kl
from ulx.schedules import Schedule
from ulx.typing import Batch, Denoise, PerExample, pytree

__all__ = ["Bound", "RateEstimate", "estimate_rate"]


@pytree
@dataclasses.dataclass(frozen=True)
class Bound:
    """The terms of L = L_z + L_x (Alg. 1), in nats per example."""

    prior: PriorTerms
    decoder: PerExample
    """L_x as weighted in training; a bound on the decoder's own nats only for w = 1."""

    @property
    def rate(self) -> PerExample:
        """The latent's rate: L_z, always unweighted."""
        return self.prior.total

    @property
    def total(self) -> PerExample:
        return self.prior.total + self.decoder


@pytree
@dataclasses.dataclass(frozen=True)
class RateEstimate:
    """L_z of a batch by stratified sampling of the noise level. Nats per example."""

    by_level: Float[Array, "b levels"]
    """The diffusion term's share of each of `levels` equal slices of t, least noise first. They sum to that term."""
    terminal: PerExample
    logsnr_edges: Float[Array, " edges"]
    """The λ at which the slices begin and end (levels + 1 of them, decreasing)."""

    @property
    def rate(self) -> PerExample:
        return self.by_level.sum(axis=1) + self.terminal


def estimate_rate(
    denoise: Denoise,
    z_clean: Batch,
    schedule: Schedule,
    *,
    key: Key[Array, ""] | Key[Array, " b"],
    levels: int = 16,
) -> RateEstimate:
    """L_z with one draw of t in each of `levels` equal slices of [0, 1], for every example (w = 1).

    Unbiased for any number of levels; the variance left is that within a slice. `key`: one per batch or per example.
    Raises ValueError if levels < 1.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    keys = diffusion.per_example_keys(key, z_clean.shape[0])

    def one_level(level: Array) -> PerExample:
        level_keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, level)))(keys)
        t = (level + jax.vmap(jax.random.uniform)(level_keys[:, 0])) / levels
        without_dropout: Denoise = lambda z_t, logsnr, *, key=None: denoise(z_t, logsnr)  # noqa: E731
        return diffusion_loss(without_dropout, z_clean, schedule, key=level_keys[:, 1], t=t) / levels

    return RateEstimate(
        by_level=jax.lax.map(one_level, jnp.arange(levels)).T,
        terminal=terminal_kl(z_clean, schedule.logsnr_min),
        logsnr_edges=schedule(jnp.linspace(0.0, 1.0, levels + 1)),
    )
