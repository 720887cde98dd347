"""Unified Latents composed: encoder, prior and decoder (stage 1); and the parts that stand in their places.

Every variant of the paper is the same composition with another part (`ulx.variants` names them):

| part | the paper's | or |
|---|---|---|
| encoder | `Encoder`: z_clean = E(x) | with a variance of its own (Eq. 5); `Pixels`: z_clean = x |
| prior | `Denoiser`: diffusion, L_z | `StandardNormal`: KL[q(z_0|x) ‖ N(0, I)] |
| decoder | `DiffusionDecoder`: L_x | `RegressionDecoder`: one network call, squared error; `PixelDecoder`: none |
| λ_z(0) | one number | `TruncatedLogistic`: drawn anew for each example (App. B) |
"""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx import diffusion, losses, schedules
from ulx.bound import Bound
from ulx.decoders import Decoder, DiffusionDecoder, PixelDecoder, RegressionDecoder
from ulx.denoiser import Denoiser, StandardNormal
from ulx.frames import given_shape
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.encoder import Encoder, EncoderConfig, Pixels
from ulx.nn.uvit import UViT, UViTConfig
from ulx.posterior import Posterior
from ulx.schedules import Schedule
from ulx.typing import Keys, PerExample
from ulx.weightings import TruncatedLogistic, Weighting

__all__ = ["ModelConfig", "UnifiedLatents", "base_spec", "decoder_spec"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    latent: Literal["encoder", "pixels"] = "encoder"
    """What the base model generates: the encoder's latents, or "pixels" themselves, with nothing to train before."""
    encoder: EncoderConfig = EncoderConfig()
    latent_prior: Literal["diffusion", "normal"] = "diffusion"
    """What measures the rate in stage 1: the diffusion prior, or N(0, I), which has no weights (Tab. 5)."""
    prior: UViTConfig = UViTConfig(patch=1)
    """The stage-1 prior on latents: measures the rate."""
    reconstruction: Literal["diffusion", "mse", "mse-then-diffusion"] = "diffusion"
    """The decoder: diffusion; "mse", one network call trained on squared error; or the encoder trained with the
    latter, and then a diffusion decoder on its latents (Tab. 5)."""
    decoder: UViTConfig = UViTConfig(patch=4)
    """The decoder's network on pixels, given z_0."""
    base: UViTConfig = UViTConfig(patch=1)
    """The stage-2 model on latents: generates."""
    logsnr_0: float = 5.0
    """λ_z(0), how precise the latent is: the encoder, the prior, the base model and the decoder all share it."""
    logsnr_1: float = -10.0
    """λ_z(1), where the prior ends at N(0, I). Any value gives a bound; at −10 the terminal KL is next to nothing at
    any size, and on 8×8 latents, whose coarsest structure drowns earlier, at −7 too."""
    given_frames: int = 0
    """Frames at the beginning of a clip that the decoder and the base model can be given (Kinetics-600: 5)."""
    decoder_text: bool = False
    """Tell the decoder the caption too, of a run that has captions. The paper's is not told."""
    logsnr_0_bias: float | None = None
    """Draw λ_z(0) for each training example from a logistic around this value, truncated to [logsnr_1, logsnr_0], and
    tell it to the decoder (App. B, 2). Samples and measurements are at logsnr_0. By default always logsnr_0."""

    def __post_init__(self):
        if self.logsnr_0_bias is not None and self.latent_prior == "normal":
            raise ValueError(
                "logsnr_0_bias draws the latent's noise level, of which the rate under latent_prior='normal' knows "
                "nothing: use the diffusion prior"
            )


def base_spec(shape: tuple[int, ...], config: ModelConfig, spec: ConditionSpec) -> ConditionSpec:
    """What the base model of examples of `shape` can be given, where the data have that much to tell."""
    frames_shape = given_shape(shape) if config.given_frames else None
    return dataclasses.replace(spec, frames_shape=frames_shape)


def decoder_spec(shape: tuple[int, ...], config: ModelConfig, spec: ConditionSpec) -> ConditionSpec:
    """What the decoder can be given: frames as the base model, captions if it is to know them, and no classes."""
    captions = spec.text_channels if config.decoder_text else 0
    return dataclasses.replace(base_spec(shape, config, spec), num_classes=0, text_channels=captions)


class UnifiedLatents(eqx.Module):
    """Stage 1: x → E → z_clean → (noise) → z_0 → D → x, with a prior on z_clean (§3.1, Alg. 1)."""

    encoder: Encoder | Pixels
    prior: Denoiser | StandardNormal
    decoder: Decoder
    latent_schedule: Schedule
    logsnr_0: TruncatedLogistic | None
    """The distribution of λ_z(0) in training; None: always the schedule's."""

    def __init__(
        self,
        shape: tuple[int, ...],
        config: ModelConfig,
        *,
        spec: ConditionSpec = ConditionSpec(),
        prior_conditioned: bool = False,
        key: Key[Array, ""],
    ):
        """`shape` is that of one image or video, `(h, w, c)` or `(t, h, w, c)`; `spec` what the data have to tell of
        it. The prior is told only if `prior_conditioned`: where no base model comes after it.
        """
        encoder_key, prior_key, decoder_key = jax.random.split(key, 3)
        self.latent_schedule = schedules.linear(config.logsnr_0, config.logsnr_1)
        self.logsnr_0 = None
        if config.latent == "pixels":
            self.encoder, self.prior = Pixels(shape), StandardNormal(shape)
            self.decoder = PixelDecoder(self.latent_schedule)
            return
        self.encoder = Encoder(shape, config.encoder, key=encoder_key)
        latent_shape = self.encoder.latent_shape
        if config.latent_prior == "normal":
            self.prior = StandardNormal(latent_shape)
        else:
            conditions = spec if prior_conditioned else ConditionSpec()
            self.prior = Denoiser(UViT(latent_shape, config.prior, conditions=conditions, key=prior_key))
        if config.logsnr_0_bias is not None:
            self.logsnr_0 = TruncatedLogistic(config.logsnr_0_bias, config.logsnr_0, config.logsnr_1)
        network = UViT(
            shape,
            config.decoder,
            context_shape=latent_shape,
            context_logsnr=self.logsnr_0 is not None,
            conditions=decoder_spec(shape, config, spec),
            key=decoder_key,
        )
        image_schedule = schedules.image_schedule(shape[-2])
        if config.reconstruction == "diffusion":
            self.decoder = DiffusionDecoder(Denoiser(network), image_schedule)
        else:
            self.decoder = RegressionDecoder(network, image_schedule)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image or video."""
        return self.encoder.shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.encoder.latent_shape

    def posterior(self, x: Float[Array, "b *space c"]) -> Posterior:
        """What the encoder makes of x, in float32: z_clean, or its mean and standard deviation."""
        return self.encoder.posterior(x)

    def encode(self, x: Float[Array, "b *space c"], *, key: Keys) -> Float[Array, "b *latent k"]:
        """z_0 = α z_clean + σ ε at λ_z(0)."""
        return self.posterior(x).z_0(self.latent_schedule, key=key)

    def bound(
        self,
        x: Float[Array, "b *space c"],
        weighting: Weighting,
        *,
        key: Keys,
        t: tuple[PerExample, PerExample] | None = None,
        conditions: Conditions = Conditions(),
        decoder_conditions: Conditions = Conditions(),
        dropout: bool = False,
        prior_gradient: float | Float[Array, ""] = 1.0,
    ) -> tuple[Bound, Posterior]:
        """Alg. 1 for a batch of images in [−1, 1]: the terms of the loss in nats per example, and the posterior.

        `t` are the prior's and the decoder's times (needed with one key per example); the two terms and z_0 draw
        their noise independently. `conditions` are the prior's. `prior_gradient` scales what the encoder feels of the
        rate, nothing else.
        """
        clean_key, z_key, prior_key, decoder_key, level_key = diffusion.split_keys(key, 5)
        prior_t, decoder_t = (None, None) if t is None else t
        posterior = self.posterior(x)
        z_clean = posterior.sample(key=clean_key)
        logsnr_0 = None if self.logsnr_0 is None else self.logsnr_0.sample(level_key, x.shape[0])
        z_0 = losses.add_noise(z_clean, self.latent_schedule, key=z_key, logsnr_0=logsnr_0)
        prior = self.prior.prior_terms(
            losses.scale_gradient(z_clean, prior_gradient),
            self.latent_schedule,
            self.logsnr_0,
            key=prior_key,
            t=prior_t,
            conditions=conditions,
            dropout=dropout,
        )
        decoder = self.decoder.nats(
            x,
            z_0,
            weighting,
            key=decoder_key,
            t=decoder_t,
            logsnr_0=logsnr_0,
            conditions=decoder_conditions,
            dropout=dropout,
        )
        level = self.latent_schedule.logsnr_max if logsnr_0 is None else logsnr_0
        encoder = losses.scale_gradient(posterior.nats(level), prior_gradient)
        return Bound(prior=prior, encoder=encoder, decoder=decoder), posterior

    def decoder_logsnr_0(self, size: int) -> Float[Array, " b"] | None:
        """What the decoder is told of the noise of `size` latents at λ_z(0); None where it was not built to know."""
        return None if self.logsnr_0 is None else jnp.full(size, self.latent_schedule.logsnr_max)
