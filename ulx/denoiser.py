"""Denoisers of latents and images: a network and what it predicts, and the one that needs no network."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ulx import diffusion, losses
from ulx.losses import PriorTerms
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.uvit import UViT
from ulx.schedules import Schedule
from ulx.typing import Batch, Denoise, Keys, PerExample
from ulx.weightings import Weighting

__all__ = ["Denoiser", "StandardNormal", "with_dropout"]


class Denoiser(eqx.Module):
    """A network and what it predicts: called like the network, it returns x̂ in float32."""

    network: UViT
    prediction: diffusion.Prediction = eqx.field(static=True, default="v")

    def __call__(
        self,
        z_t: Batch,
        logsnr: PerExample,
        conditions: Conditions = Conditions(),
        *,
        context: Float[Array, "b *latent k"] | None = None,
        context_logsnr: PerExample | None = None,
        key: Keys | None = None,
    ) -> Batch:
        output = self.network(z_t, logsnr, conditions, context=context, context_logsnr=context_logsnr, key=key)
        return diffusion.x_from_prediction(self.prediction, output.astype(jnp.float32), z_t, logsnr)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one z_t."""
        return self.network.shape

    @property
    def conditions(self) -> ConditionSpec:
        """What it can be given."""
        return self.network.conditions

    def given(
        self,
        conditions: Conditions = Conditions(),
        *,
        context: Array | None = None,
        context_logsnr: PerExample | None = None,
    ) -> Denoise:
        """The denoiser with its conditioning closed over: what losses and samplers take."""

        def denoise(z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
            return self(z_t, logsnr, conditions, context=context, context_logsnr=context_logsnr, key=key)

        return denoise

    def prior_terms(
        self,
        z_clean: Batch,
        schedule: Schedule,
        weighting: Weighting | None = None,
        *,
        key: Keys,
        t: PerExample | None = None,
        conditions: Conditions = Conditions(),
        dropout: bool = False,
    ) -> PriorTerms:
        """L_z (Eq. 3) with this denoiser as the prior, one draw of t and ε per example. Nats."""
        denoise = with_dropout(self.given(conditions), dropout)
        return losses.prior_loss(denoise, z_clean, schedule, weighting, key=key, t=t)


class StandardNormal(eqx.Module):
    """The prior N(0, I), in the place of a diffusion prior (Tab. 5): its exact denoiser is ẑ = α z_t."""

    shape: tuple[int, ...] = eqx.field(static=True)
    conditions: ConditionSpec = eqx.field(static=True, default=ConditionSpec())
    """Nothing can be told to it."""

    def given(self, conditions: Conditions = Conditions()) -> Denoise:
        """ẑ = α z_t. Its diffusion loss with the terminal KL is KL[q(z_0|x) ‖ N(0, I)] exactly. Knows no conditions."""
        conditions.check(self.conditions)

        def denoise(z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
            return diffusion.alpha(diffusion.expand(logsnr, z_t)) * z_t

        return denoise

    def prior_terms(
        self,
        z_clean: Batch,
        schedule: Schedule,
        weighting: Weighting | None = None,
        *,
        key: Keys,
        t: PerExample | None = None,
        conditions: Conditions = Conditions(),
        dropout: bool = False,
    ) -> PriorTerms:
        """KL[N(α z_clean, σ² I) ‖ N(0, I)] at λ_z(0), with no noise drawn. Nats per example.

        It is split as for a diffusion prior: the terminal part is the same KL at λ_z(1).

        Raises:
            ValueError: a weighting or conditions, of which a rate in closed form knows nothing.
        """
        conditions.check(self.conditions)
        if weighting is not None:
            raise ValueError("the standard normal prior takes no weighting: use a diffusion prior")
        rate = losses.terminal_kl(z_clean, schedule.logsnr_max)
        terminal = losses.terminal_kl(z_clean, schedule.logsnr_min)
        return PriorTerms(diffusion=rate - terminal, terminal=terminal)


def with_dropout(denoise: Denoise, dropout: bool) -> Denoise:
    """`denoise` itself, or without its key."""
    if dropout:
        return denoise
    without: Callable[..., jax.Array] = lambda z_t, logsnr, *, key=None: denoise(z_t, logsnr)  # noqa: E731
    return without
