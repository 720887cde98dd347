"""Decoders, z_0 → x: by diffusion (the paper's), as one regression (Tab. 5, the KL autoencoder), or not at all."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx import diffusion, losses
from ulx.denoiser import Denoiser, with_dropout
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.uvit import UViT
from ulx.samplers import Sample
from ulx.schedules import Schedule
from ulx.typing import Batch, Denoise, Keys, PerExample
from ulx.weightings import Sigmoid, Weighting

__all__ = ["Decoder", "DiffusionDecoder", "PixelDecoder", "RegressionDecoder", "Solve"]

Solve = Callable[[Denoise, Batch, Schedule, Keys], Sample]
"""From noise at the schedule's end to its beginning: a solver with its settings."""


class DiffusionDecoder(eqx.Module):
    """p(x | z_0) by a denoiser of images that knows z_0 (§3.2)."""

    denoiser: Denoiser
    schedule: Schedule
    """λ_x."""

    @property
    def conditions(self) -> ConditionSpec:
        return self.denoiser.conditions

    def given(
        self,
        z_0: Float[Array, "b *latent k"],
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
    ) -> Denoise:
        """The denoiser of images, given z_0 (and how noisy it is, where the decoder was built to know)."""
        return self.denoiser.given(conditions, context=z_0, context_logsnr=logsnr_0)

    def nats(
        self,
        x: Batch,
        z_0: Float[Array, "b *latent k"],
        weighting: Weighting,
        *,
        key: Keys,
        t: PerExample | None = None,
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
        dropout: bool = False,
    ) -> PerExample:
        """L_x (Eq. 4), in (weighted) nats per example."""
        denoise = with_dropout(self.given(z_0, logsnr_0, conditions), dropout)
        return losses.decoder_loss(denoise, x, self.schedule, weighting, key=key, t=t)

    def sample(
        self,
        z_0: Float[Array, "b *latent k"],
        solve: Solve,
        *,
        keys: Key[Array, " b"],
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
    ) -> Sample:
        """x from x_1 ~ N(0, I) (Alg. 2, second half), not clipped."""
        noise_keys, solver_keys = diffusion.split_keys(keys, 2)
        noise = diffusion.normal(noise_keys, jnp.zeros((len(keys), *self.denoiser.shape)))
        return solve(self.given(z_0, logsnr_0, conditions), noise, self.schedule, solver_keys)


class RegressionDecoder(eqx.Module):
    """x̂(z_0), one call of a network: it is fed zeros at the noisiest level in place of a noised image."""

    network: UViT
    schedule: Schedule
    """λ_x, which only says between which levels `given` is measured."""

    @property
    def conditions(self) -> ConditionSpec:
        return self.network.conditions

    def __call__(
        self,
        z_0: Float[Array, "b *latent k"],
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
        *,
        key: Keys | None = None,
    ) -> Batch:
        size = z_0.shape[0]
        nothing = jnp.zeros((size, *self.network.shape))
        level = jnp.full(size, self.schedule.logsnr_min)
        x_hat = self.network(nothing, level, conditions, context=z_0, context_logsnr=logsnr_0, key=key)
        return x_hat.astype(jnp.float32)

    def given(
        self,
        z_0: Float[Array, "b *latent k"],
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
    ) -> Denoise:
        """As a denoiser that ignores its input."""
        x_hat = self(z_0, logsnr_0, conditions)
        return lambda x_t, logsnr, *, key=None: x_hat

    def nats(
        self,
        x: Batch,
        z_0: Float[Array, "b *latent k"],
        weighting: Weighting,
        *,
        key: Keys,
        t: PerExample | None = None,
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
        dropout: bool = False,
    ) -> PerExample:
        """½ exp(λ*) ‖x − x̂‖²: −log N(x; x̂, exp(−λ*) I) up to a constant. Nats per example.

        λ* = b + ln(c_lf − 1) is the cut-off of the diffusion decoder's weighting, so that c_lf and b mean the same
        here: detail is worth its bits down to it.

        Raises:
            ValueError: a weighting without a cut-off.
        """
        if not isinstance(weighting, Sigmoid):
            raise ValueError(f"the regression decoder takes its weight from a sigmoid's cut-off, got {weighting}")
        x_hat = self(z_0, logsnr_0, conditions, key=key if dropout else None)
        precision = jnp.exp(weighting.bias) * jnp.maximum(weighting.factor - 1, 0)
        return 0.5 * precision * losses.sum_squares(x - x_hat)

    def sample(
        self,
        z_0: Float[Array, "b *latent k"],
        solve: Solve,
        *,
        keys: Key[Array, " b"],
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
    ) -> Sample:
        """x̂, in one call whatever the solver."""
        return Sample(z=self(z_0, logsnr_0, conditions), nfe=jnp.asarray(1))


class PixelDecoder(eqx.Module):
    """No decoder: z_0 is the image itself under next to no noise, and x̂ = z_0/α (pixel diffusion)."""

    schedule: Schedule
    conditions: ConditionSpec = eqx.field(static=True, default=ConditionSpec())
    """Nothing can be told to it."""

    def given(self, z_0: Batch, logsnr_0: PerExample | None = None, conditions: Conditions = Conditions()) -> Denoise:
        x_hat = z_0 / diffusion.alpha(jnp.asarray(self.schedule.logsnr_max))
        return lambda x_t, logsnr, *, key=None: x_hat

    def nats(
        self,
        x: Batch,
        z_0: Batch,
        weighting: Weighting,
        *,
        key: Keys,
        t: PerExample | None = None,
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
        dropout: bool = False,
    ) -> PerExample:
        """Nothing: there is nothing to train."""
        return jnp.zeros(x.shape[0])

    def sample(
        self,
        z_0: Batch,
        solve: Solve,
        *,
        keys: Key[Array, " b"],
        logsnr_0: PerExample | None = None,
        conditions: Conditions = Conditions(),
    ) -> Sample:
        return Sample(z=z_0 / diffusion.alpha(jnp.asarray(self.schedule.logsnr_max)), nfe=jnp.asarray(0))


Decoder = DiffusionDecoder | RegressionDecoder | PixelDecoder
