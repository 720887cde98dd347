"""The training losses: stage 1 (Alg. 1), stage 2 (§3.3), and a decoder on its own in between (Tab. 5).

They are in the form that `training.make_step` takes.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ulx import diffusion, losses, schedules, weightings
from ulx.config import Config
from ulx.data.pixels import to_float
from ulx.decoders import Decoder, DiffusionDecoder
from ulx.denoiser import Denoiser
from ulx.frames import given_frames, padded
from ulx.models import ModelConfig, UnifiedLatents, base_spec, decoder_spec
from ulx.nn.conditions import Conditions, ConditionSpec, Text
from ulx.nn.uvit import UViT
from ulx.posterior import Posterior
from ulx.rate_control import Control, controlled
from ulx.training import Batch, Draws, Loss, Spread
from ulx.typing import Keys

__all__ = [
    "CollapseWatch",
    "autoencoder_loss",
    "base_loss",
    "base_schedule",
    "collapsed",
    "decoder_loss",
    "dropped_conditions",
    "make_base",
    "make_decoder",
]

GIVEN, TOLD = 7, 8
"""Folded into the keys of a step for what decides whether frames, and the decoder's captions, are given: no other
draw's."""


def autoencoder_loss(config: Config) -> Loss:
    """Stage 1: encoder, prior and decoder on rate + L_x, in bits per pixel.

    The encoder feels `prior_gradient` of its rate, and `kl_weight` times KL[q(z_0|x) ‖ N(0, I)] on top (Tab. 6, A).
    Logged: `loss`, `rate` (L_z, with L_e for an encoder of variance) and `decoder` (weighted L_x), all in bits per
    pixel, and `latent_std`, the standard deviation of z_clean over the batch, averaged over its dimensions: the
    latent's noise has σ = 0.08; of an encoder of variance `encoder_std`, its σ_E in the channel where that is least;
    under rate control `loss_factor`, which is `control` then, too.
    """
    first, last = config.prior_warmup

    def loss(
        model: UnifiedLatents,
        frozen: None,
        batch: Batch,
        draws: Draws,
        step: Int[Array, ""],
        control: Control | None = None,
    ):
        weighting = controlled(config.decoder_weighting, control)
        x = to_float(batch["image"])
        label_keys, keys = diffusion.split_keys(draws.keys, 2)
        bound, posterior = model.bound(
            x,
            weighting,
            key=keys,
            t=(draws.times(0), draws.times(1)),
            conditions=dropped_conditions(batch, label_keys, config.label_dropout, model.prior.conditions),
            decoder_conditions=_decoder_conditions(batch, x, draws.keys, config, model.decoder),
            dropout=True,
            prior_gradient=config.prior_gradient * jnp.clip((step - first) / (last - first), 0.0, 1.0),
        )
        pixels = x[0, ..., 0].size
        nats = bound.total
        if config.kl_weight:
            nats = nats + config.kl_weight * posterior.normal_rate(model.latent_schedule.logsnr_max)
        total = losses.bits_per_pixel(nats, num_pixels=pixels).mean()
        return total, {
            "loss": total,
            "rate": losses.bits_per_pixel(bound.rate, num_pixels=pixels).mean(),
            "decoder": losses.bits_per_pixel(bound.decoder, num_pixels=pixels).mean(),
            "latent_std": Spread.of(posterior.mean),
            **({} if posterior.std is None else {"encoder_std": _least(posterior.std)}),
            **({} if control is None else control.logged),
        }

    return loss


def _least(std: Float[Array, "b *latent k"]) -> Float[Array, ""]:
    """Of the channels' means."""
    return std.mean(axis=tuple(range(std.ndim - 1))).min()


def make_decoder(
    model: UnifiedLatents, config: ModelConfig, spec: ConditionSpec, *, key: Key[Array, ""]
) -> DiffusionDecoder:
    """An untrained diffusion decoder for that autoencoder's latents, in the place of its own."""
    conditions = decoder_spec(model.shape, config, spec)
    network = UViT(
        model.shape,
        config.decoder,
        context_shape=model.latent_shape,
        context_logsnr=model.logsnr_0 is not None,
        conditions=conditions,
        key=key,
    )
    return DiffusionDecoder(Denoiser(network), schedules.image_schedule(model.shape[-2]))


def decoder_loss(config: Config) -> Loss:
    """A diffusion decoder on the latents of a frozen encoder, at λ_z(0): L_x alone, in bits per pixel (Tab. 5)."""
    weighting = config.decoder_weighting

    def loss(
        decoder: DiffusionDecoder,
        frozen: UnifiedLatents,
        batch: Batch,
        draws: Draws,
        step: Int[Array, ""],
        control: None = None,
    ):
        x = to_float(batch["image"])
        z_keys, decoder_keys = diffusion.split_keys(draws.keys, 2)
        z_0 = jax.lax.stop_gradient(frozen.encode(x, key=z_keys))
        conditions = _decoder_conditions(batch, x, draws.keys, config, decoder)
        nats = decoder.nats(
            x,
            z_0,
            weighting,
            key=decoder_keys,
            t=draws.times(0),
            logsnr_0=frozen.decoder_logsnr_0(len(x)),
            conditions=conditions,
            dropout=True,
        )
        total = losses.bits_per_pixel(nats, num_pixels=x[0, ..., 0].size).mean()
        return total, {"loss": total}

    return loss


def make_base(model: UnifiedLatents, config: ModelConfig, spec: ConditionSpec, *, key: Key[Array, ""]) -> Denoiser:
    """The untrained base model for that autoencoder's latents, of data that have that much to tell."""
    conditions = base_spec(model.shape, config, spec)
    return Denoiser(UViT(model.latent_shape, config.base, conditions=conditions, key=key))


def base_schedule(config: Config) -> schedules.Cosine:
    """Where stage 2 looks: from λ_z(0) to λ_z(1), most often at the levels that its weighting is about.

    A cosine's log-SNRs have the density sech((λ − shift)/2), and w(λ) times a Gaussian latent's ε-error falls off
    at the same rate on both sides of λ ≈ b. The expected loss is any schedule's; its variance is lower here.
    """
    return schedules.cosine(config.model.logsnr_0, config.model.logsnr_1, shift=config.base_bias)


def given_or_dropped(x: Float[Array, " b *clip"], keys: Keys, count: int, rate: float) -> Array | None:
    """The first `count` frames of clips, or, with probability `rate`, none of them; None for a count of 0."""
    if not count:
        return None
    dropped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, GIVEN), rate))(keys)
    return given_frames(x, jnp.where(dropped, 0, count))


def dropped_conditions(batch: Batch, keys: Keys, rate: float, spec: ConditionSpec) -> Conditions:
    """The labels and captions of a batch, as far as a network of that spec is given them; with probability `rate` an
    example's are taken away, both at once: that is what guidance moves away from."""
    told = Conditions(label=batch["label"] if spec.num_classes else None, text=_text(batch, spec))
    return told.without(jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)) if told.guides else told


def _text(batch: Batch, spec: ConditionSpec) -> Text | None:
    return Text(batch["text"], batch["text_mask"]) if spec.text_channels else None


def _decoder_conditions(
    batch: Batch, x: Float[Array, " b *dims"], keys: Keys, config: Config, decoder: Decoder
) -> Conditions:
    """Frames and captions, each taken away now and then."""
    caption_keys = jax.vmap(lambda key: jax.random.fold_in(key, TOLD))(keys)
    told = dropped_conditions(batch, caption_keys, config.label_dropout, decoder.conditions)
    frames = given_or_dropped(x, keys, config.model.given_frames, config.frames_dropout)
    return dataclasses.replace(told, frames=frames)


def base_loss(config: Config, num_pixels: int) -> Loss:
    """Stage 2: the base model on z_clean of the frozen encoder, with sigmoid weighting, in (weighted) bits per pixel.

    It regresses on z_clean, which has the lower variance, between the prior's end points: it ends at λ_z(0). A batch
    holds posteriors (`mean` and maybe `std`, see `ulx.latents`) or images that the frozen encoder turns into them.
    `num_pixels` are those of one image.
    """
    weighting = weightings.sigmoid(bias=config.base_bias)
    schedule = base_schedule(config)
    given = config.model.given_frames

    def loss(
        base: Denoiser,
        frozen: UnifiedLatents | None,
        batch: Batch,
        draws: Draws,
        step: Int[Array, ""],
        control: None = None,
    ):
        if "mean" in batch:
            posterior = Posterior(batch["mean"], batch.get("std"))
        else:
            assert frozen is not None, "images need an encoder"
            posterior = frozen.posterior(to_float(batch["image"]))
        label_keys, loss_keys, clean_keys = diffusion.split_keys(draws.keys, 3)
        z_clean = jax.lax.stop_gradient(posterior.sample(key=clean_keys))
        conditions = dropped_conditions(batch, label_keys, config.label_dropout, base.conditions)
        if given:
            clip = (
                to_float(batch["image"]) if "image" in batch else padded(to_float(batch["first"]), config.data.frames)
            )
            frames = given_or_dropped(clip, draws.keys, given, config.base_frames_dropout)
            conditions = dataclasses.replace(conditions, frames=frames)
        nats = losses.diffusion_loss(
            base.given(conditions), z_clean, schedule, weighting, key=loss_keys, t=draws.times(0)
        )
        total = losses.bits_per_pixel(nats, num_pixels=num_pixels).mean()
        return total, {"loss": total}

    return loss


def latent_noise(config: Config, metrics: Mapping[str, float]) -> float:
    """Of z_clean, by what stage 1 logged: σ_z(0)/α_z(0), and what an encoder of variance adds where it adds least, for
    it switches off the channels that it has no use for."""
    own = math.exp(-config.model.logsnr_0 / 2)  # on the host: on a device it would wait for the steps under way
    return math.hypot(own, metrics.get("encoder_std", 0.0))


class CollapseWatch:
    """Warns loudly, once, when the latent carries nothing: posterior collapse.

    After the prior's warm-up it looks at `latent_std` against the latent's own noise (`latent_noise`). At half the
    noise a Gaussian latent could carry ½ log₂(1 + ¼) = 0.16 bits per dimension; below that there is nothing to decode.
    """

    def __init__(self, config: Config):
        self.after = config.prior_warmup[1]
        self.config = config
        self.collapsed = False

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        noise = latent_noise(self.config, metrics)
        if step < self.after or self.collapsed or metrics["latent_std"] >= 0.5 * noise:
            return
        self.collapsed = True
        weighting = self.config.decoder_weighting
        cutoff = weightings.cutoff(float(weighting.bias), float(weighting.factor))
        warnings.warn(
            f"THE LATENT HAS COLLAPSED at step {step}: its standard deviation over images, "
            f"{metrics['latent_std']:.3f}, is below half that of its noise, {noise:.3f}, and its rate is "
            f"{metrics['rate']:.4f} bits/pixel. The decoder ignores it. Raise --loss-factor (now "
            f"{weighting.factor}) or --sigmoid-bias (now {weighting.bias:.2f}; together they value detail up to a "
            f"log-SNR of {cutoff:.2f}), lengthen --prior-warmup, or use a decoder that learns faster.",
            stacklevel=2,
        )


def collapsed(config: Config, log: Sequence[Mapping[str, float]]) -> bool:
    """Whether the latent collapsed at any time, from the whole stage-1 log: a resumed process saw only its own part."""
    watch = CollapseWatch(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line in log:
            watch(int(line["step"]), line)
    return watch.collapsed
