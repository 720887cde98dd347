"""The networks of Unified Latents composed: encoder, prior and decoder (stage 1), base model (stage 2)."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ulx import diffusion, losses, schedules
from ulx.bound import Bound
from ulx.nn.encoder import Encoder, EncoderConfig
from ulx.nn.uvit import UViT, UViTConfig
from ulx.schedules import Schedule
from ulx.typing import Batch, Denoise, Keys, PerExample
from ulx.weightings import Weighting

__all__ = ["Denoiser", "ModelConfig", "UnifiedLatents"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    encoder: EncoderConfig = EncoderConfig()
    prior: UViTConfig = UViTConfig(patch=1)
    """The stage-1 prior on latents: measures the rate."""
    decoder: UViTConfig = UViTConfig(patch=4)
    """The diffusion decoder on pixels, given z_0."""
    base: UViTConfig = UViTConfig(patch=1)
    """The stage-2 model on latents: generates."""
    logsnr_0: float = 5.0
    """λ_z(0), how precise the latent is: the encoder, the prior, the base model and the decoder all share it."""
    logsnr_1: float = -10.0
    """λ_z(1), where the prior ends at N(0, I). Any value gives a bound; at −10 the terminal KL is next to nothing at
    any size, and on 8×8 latents, whose coarsest structure drowns earlier, at −7 too."""


class Denoiser(eqx.Module):
    """A network and what it predicts: called like the network, it returns x̂ in float32."""

    network: UViT
    prediction: diffusion.Prediction = eqx.field(static=True, default="v")

    def __call__(
        self,
        z_t: Batch,
        logsnr: PerExample,
        *,
        context: Float[Array, "b *latent k"] | None = None,
        label: Int[Array, " b"] | None = None,
        key: Keys | None = None,
    ) -> Batch:
        output = self.network(z_t, logsnr, context=context, label=label, key=key)
        return diffusion.x_from_prediction(self.prediction, output.astype(jnp.float32), z_t, logsnr)

    def given(self, *, context: Array | None = None, label: Int[Array, " b"] | None = None) -> Denoise:
        """The denoiser with its conditioning closed over: what losses and samplers take."""

        def denoise(z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
            return self(z_t, logsnr, context=context, label=label, key=key)

        return denoise


class UnifiedLatents(eqx.Module):
    """Stage 1: x → E → z_clean → (noise) → z_0 → D → x, with a diffusion prior on z_clean (§3.1, Alg. 1)."""

    encoder: Encoder
    prior: Denoiser
    decoder: Denoiser
    latent_schedule: Schedule
    image_schedule: Schedule

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, *, key: Key[Array, ""]):
        """`shape` is that of one image or video, `(h, w, c)` or `(t, h, w, c)`."""
        encoder_key, prior_key, decoder_key = jax.random.split(key, 3)
        self.encoder = Encoder(shape, config.encoder, key=encoder_key)
        latent_shape = self.encoder.latent_shape
        self.prior = Denoiser(UViT(latent_shape, config.prior, key=prior_key))
        self.decoder = Denoiser(UViT(shape, config.decoder, context_shape=latent_shape, key=decoder_key))
        self.latent_schedule = schedules.linear(config.logsnr_0, config.logsnr_1)
        self.image_schedule = schedules.image_schedule(shape[-2])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.encoder.latent_shape

    def z_clean(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *latent k"]:
        """E(x), the deterministic latent, in float32."""
        return self.encoder(x).astype(jnp.float32)

    def encode(self, x: Float[Array, "b *space c"], *, key: Keys) -> Float[Array, "b *latent k"]:
        """z_0 = α E(x) + σ ε at λ_z(0)."""
        return losses.add_noise(self.z_clean(x), self.latent_schedule, key=key)

    def decoder_given(self, z_0: Float[Array, "b *latent k"]) -> Denoise:
        """The decoder as a denoiser of images, given z_0."""
        return self.decoder.given(context=z_0)

    def bound(
        self,
        x: Float[Array, "b *space c"],
        weighting: Weighting,
        *,
        key: Keys,
        t: tuple[PerExample, PerExample] | None = None,
        dropout: bool = False,
        prior_gradient: float | Float[Array, ""] = 1.0,
    ) -> tuple[Bound, Float[Array, "b *latent k"]]:
        """Alg. 1 for a batch of images in [−1, 1]: the terms of the loss in nats per example, and z_clean.

        `t` are the prior's and the decoder's times (needed with one key per example); the two terms and z_0 draw
        their noise independently. `prior_gradient` scales what the encoder feels of the prior's term, nothing else.
        """
        z_key, prior_key, decoder_key = diffusion.split_keys(key, 3)
        prior_t, decoder_t = (None, None) if t is None else t
        z_clean = self.z_clean(x)
        z_0 = losses.add_noise(z_clean, self.latent_schedule, key=z_key)
        prior = losses.prior_loss(
            _with_dropout(self.prior.given(), dropout),
            losses.scale_gradient(z_clean, prior_gradient),
            self.latent_schedule,
            key=prior_key,
            t=prior_t,
        )
        decoder = losses.decoder_loss(
            _with_dropout(self.decoder_given(z_0), dropout),
            x,
            self.image_schedule,
            weighting,
            key=decoder_key,
            t=decoder_t,
        )
        return Bound(prior=prior, decoder=decoder), z_clean


def _with_dropout(denoise: Denoise, dropout: bool) -> Denoise:
    if dropout:
        return denoise
    return lambda z_t, logsnr, *, key=None: denoise(z_t, logsnr)
