"""The bound as a typed result, and its estimate on held-out data: how many nats, where, and how surely.

Every estimate is one sum over drawn noise levels. What differs is where they are drawn (`ulx.time_sampling`):

```python
pilot = bound.estimate_rate(denoise, z_clean, schedule, key=key)  # one draw in each of 16 slices
proposal = pilot.diffusion.proposal()  # learned from it
rate = bound.estimate_rate(denoise, z_clean, schedule, key=key, proposal=proposal, replicates=8)
rate.mean  # nats: value, standard_error, estimator_error
```

The bound is one on the denoiser's ancestral model. With another denoiser, such as the base model, it is that model's
rate, and as valid, whatever weighting that one was trained with: here w = 1 always.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ulx import diffusion
from ulx.losses import PriorTerms, diffusion_loss, terminal_kl
from ulx.schedules import Schedule
from ulx.time_sampling import Placement, Proposal, proposal_from_levels, stratified
from ulx.typing import Batch, Denoise, Keys, PerExample, pytree

__all__ = ["Bound", "DiffusionEstimate", "Mean", "RateEstimate", "estimate_decoder", "estimate_rate"]


@pytree
@dataclasses.dataclass(frozen=True)
class Bound:
    """The terms of L = L_z + L_x (Alg. 1), with an encoder of variance L_z + L_e + L_x, in nats per example."""

    prior: PriorTerms
    encoder: PerExample
    """L_e (Eq. 5); 0 for an encoder without variance."""
    decoder: PerExample
    """L_x as weighted in training; a bound on the decoder's own nats only for w = 1."""

    @property
    def rate(self) -> PerExample:
        """The latent's rate, L_z + L_e."""
        return self.prior.total + self.encoder

    @property
    def total(self) -> PerExample:
        return self.rate + self.decoder


@pytree
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over examples with its errors. Nats per example."""

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    """As an estimate of the mean over all data: the examples' own spread and the estimator's noise together. Few
    replicates hide a small spread in the noise; it counts as 0 at least, so that the error is rather too large."""
    estimator_error: Float[Array, ""]
    """As an estimate of these examples' own mean: the standard error from independent replicates. With r replicates it
    has r − 1 degrees of freedom."""

    @classmethod
    def of(cls, samples: Float[Array, "b replicates"]) -> "Mean":
        """From replicates that are independent of each other; within one, examples may share their draws.

        Raises:
            ValueError: fewer than two examples or two replicates.
        """
        examples, replicates = samples.shape
        if examples < 2 or replicates < 2:
            raise ValueError(
                f"an error needs at least two examples and two independent replicates, got {examples} and {replicates}"
            )
        by_example, by_replicate = samples.mean(axis=1, keepdims=True), samples.mean(axis=0, keepdims=True)
        noise = jnp.var(by_replicate, ddof=1) / replicates
        # An analysis of variance, examples × replicates: the scatter of the examples' means, less what noise of their
        # own adds to it, is the spread of their expectations. Noise that examples share has left with the replicates.
        rest = jnp.sum((samples - by_example - by_replicate + samples.mean()) ** 2)
        spread = jnp.var(by_example, ddof=1) - rest / ((examples - 1) * (replicates - 1) * replicates)
        return cls(samples.mean(), jnp.sqrt(jnp.maximum(spread, 0) / examples + noise), jnp.sqrt(noise))


@pytree
@dataclasses.dataclass(frozen=True)
class DiffusionEstimate:
    """An unweighted diffusion term E_t[ −λ'(t) · exp(λ)/2 · ‖x − x̂‖² ], estimated. Nats per example."""

    samples: Float[Array, "b replicates levels"]
    """Of independent replicates, the share of each of `levels` equal slices of t, least noise first."""
    schedule: Schedule

    @property
    def logsnr_edges(self) -> Float[Array, " edges"]:
        """The λ at which the slices begin and end (levels + 1 of them, decreasing)."""
        return self.schedule(jnp.linspace(0.0, 1.0, self.samples.shape[-1] + 1))

    @property
    def by_level(self) -> Float[Array, "b levels"]:
        """The mean over replicates. The slices sum to `total`."""
        return self.samples.mean(axis=1)

    @property
    def total(self) -> PerExample:
        return self.by_level.sum(axis=1)

    @property
    def mean(self) -> Mean:
        """Over the examples; raises ValueError without two replicates."""
        return Mean.of(self.samples.sum(axis=2))

    def proposal(self, *, uniform_share: float = 0.1) -> Proposal:
        """Where the next estimate should draw its noise levels, learned from this one's second moments.

        For an estimate with one uniform draw in each slice, the default of `estimate_rate`. It may use other examples,
        and must at least use other keys: an estimate that had shaped its own proposal would be biased.
        """
        edges = np.array(self.logsnr_edges, np.float64)
        edges[[0, -1]] = self.schedule.logsnr_max, self.schedule.logsnr_min  # not rounded to float32
        root_mean_square = jnp.sqrt(jnp.mean(jnp.square(self.samples), axis=(0, 1)))
        return proposal_from_levels(edges, root_mean_square, uniform_share=uniform_share)


@pytree
@dataclasses.dataclass(frozen=True)
class RateEstimate:
    """L_z of a batch (Eq. 3), estimated; with an encoder of variance L_z + L_e (Eq. 5). Nats per example."""

    diffusion: DiffusionEstimate
    terminal: PerExample
    """KL[q(z_1|x) ‖ N(0, I)], which needs no estimate."""
    encoder: PerExample
    """L_e; 0 for an encoder without variance."""

    @property
    def by_level(self) -> Float[Array, "b levels"]:
        """The diffusion term's share of each of `levels` equal slices of t, least noise first."""
        return self.diffusion.by_level

    @property
    def logsnr_edges(self) -> Float[Array, " edges"]:
        """The λ at which the slices begin and end (levels + 1 of them, decreasing)."""
        return self.diffusion.logsnr_edges

    @property
    def rate(self) -> PerExample:
        return self.diffusion.total + self.terminal + self.encoder

    @property
    def mean(self) -> Mean:
        """The rate over the examples; raises ValueError without two replicates."""
        return Mean.of(self.diffusion.samples.sum(axis=2) + (self.terminal + self.encoder)[:, None])


def estimate_rate(
    denoise: Denoise,
    z_clean: Batch,
    schedule: Schedule,
    *,
    key: Keys,
    levels: int = 16,
    draws: int | None = None,
    replicates: int = 1,
    placement: Placement = stratified,
    proposal: Proposal | None = None,
    encoder: PerExample | None = None,
) -> RateEstimate:
    """L_z under any denoiser of z_clean (Eq. 3, w = 1): the prior that it was trained with, or a base model (Tab. 5).

    Unbiased for every placement and proposal. By default one draw of t in each of `levels` equal slices of [0, 1].

    Args:
        key: one per batch or per example.
        levels: equal slices of t into which the nats are sorted.
        draws: denoiser calls per example and replicate; by default as many as levels.
        replicates: independent repetitions, from which `mean` takes its errors.
        placement: how an example's draws are spread (`ulx.time_sampling`).
        proposal: importance sampling of λ, from `DiffusionEstimate.proposal`; None draws t uniformly.
        encoder: L_e of the posterior that z_clean was drawn from (`Posterior.nats`), none by default.

    Raises:
        ValueError: levels, draws or replicates below 1, a proposal for other end points than the schedule's, or what
            the placement refuses.
    """
    return RateEstimate(
        _estimate(denoise, z_clean, schedule, key, levels, draws, replicates, placement, proposal),
        terminal=terminal_kl(z_clean, schedule.logsnr_min),
        encoder=jnp.zeros(z_clean.shape[0]) if encoder is None else encoder,
    )


def estimate_decoder(
    denoise: Denoise,
    x: Batch,
    schedule: Schedule,
    *,
    key: Keys,
    levels: int = 16,
    draws: int | None = None,
    replicates: int = 1,
    placement: Placement = stratified,
    proposal: Proposal | None = None,
) -> DiffusionEstimate:
    """The decoder's own nats: L_x with w = 1, whatever it was trained with. `denoise` knows z_0.

    **Not all of −log p(x | z_0)**: a bound on that adds x's terminal KL and −log p(x | x_0), which are left out here,
    so that with the rate it adds up to no codelength of x. Arguments and errors as in `estimate_rate`.
    """
    return _estimate(denoise, x, schedule, key, levels, draws, replicates, placement, proposal)


def _estimate(
    denoise: Denoise,
    x: Batch,
    schedule: Schedule,
    key: Keys,
    levels: int,
    draws: int | None,
    replicates: int,
    placement: Placement,
    proposal: Proposal | None,
) -> DiffusionEstimate:
    draws = levels if draws is None else draws
    for name, value in (("levels", levels), ("draws", draws), ("replicates", replicates)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    size = x.shape[0]
    without_dropout: Denoise = lambda z_t, logsnr, *, key=None: denoise(z_t, logsnr)  # noqa: E731

    def replicate(index: Array) -> Float[Array, "b levels"]:
        time_key, noise_key = diffusion.split_keys(_fold_in(key, index), 2)
        u = placement(time_key, size, draws)
        t, weight = (u, jnp.ones_like(u)) if proposal is None else proposal(u, schedule)
        noise_keys = diffusion.per_example_keys(noise_key, size)

        def one_draw(draw: Array) -> PerExample:
            loss = diffusion_loss(without_dropout, x, schedule, key=_fold_in(noise_keys, draw), t=t[:, draw])
            return weight[:, draw] * loss / draws

        nats = jax.lax.map(one_draw, jnp.arange(draws)).T
        slices = jnp.clip(jnp.floor(t * levels).astype(int), 0, levels - 1)
        return jnp.zeros((size, levels), nats.dtype).at[jnp.arange(size)[:, None], slices].add(nats)

    samples = jax.lax.map(replicate, jnp.arange(replicates))
    return DiffusionEstimate(jnp.moveaxis(samples, 0, 1), schedule)


def _fold_in(key: Keys, index: Array) -> Keys:
    """Another key, or keys, for each index."""
    return jax.random.fold_in(key, index) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, index))(key)
