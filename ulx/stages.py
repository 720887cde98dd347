"""The two training losses: stage 1 (Alg. 1) and stage 2 (§3.3), in the form that `training.make_step` takes."""

import math
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ulx import diffusion, losses, schedules, weightings
from ulx.config import Config
from ulx.data.pixels import to_float
from ulx.models import Denoiser, UnifiedLatents
from ulx.nn.uvit import UViT
from ulx.training import Batch, Draws, Loss

__all__ = ["CollapseWatch", "autoencoder_loss", "base_loss", "base_schedule", "collapsed", "drop_labels", "make_base"]


def autoencoder_loss(config: Config) -> Loss:
    """Stage 1: encoder, prior and decoder on L_z + L_x, in bits per pixel.

    Logged: `loss`, `rate` (L_z) and `decoder` (weighted L_x), all in bits per pixel, and `latent_std`, the standard
    deviation of z_clean over the batch, averaged over its dimensions: the latent's noise has σ = 0.08.
    """
    weighting = config.decoder_weighting
    first, last = config.prior_warmup

    def loss(model: UnifiedLatents, frozen: None, batch: Batch, draws: Draws, step: Int[Array, ""]):
        x = to_float(batch["image"])
        bound, z_clean = model.bound(
            x,
            weighting,
            key=draws.keys,
            t=(draws.times(0), draws.times(1)),
            dropout=True,
            prior_gradient=jnp.clip((step - first) / (last - first), 0.0, 1.0),
        )
        pixels = x[0, ..., 0].size
        total = losses.bits_per_pixel(bound.total, num_pixels=pixels).mean()
        return total, {
            "loss": total,
            "rate": losses.bits_per_pixel(bound.rate, num_pixels=pixels).mean(),
            "decoder": losses.bits_per_pixel(bound.decoder, num_pixels=pixels).mean(),
            "latent_std": z_clean.std(axis=0).mean(),
        }

    return loss


def make_base(model: UnifiedLatents, config: Config, num_classes: int, *, key: Key[Array, ""]) -> Denoiser:
    """The untrained base model for that autoencoder's latents."""
    return Denoiser(UViT(model.latent_shape, config.model.base, num_classes=num_classes, key=key))


def base_schedule(config: Config) -> schedules.Cosine:
    """Where stage 2 looks: from λ_z(0) to λ_z(1), most often at the levels that its weighting is about.

    A cosine's log-SNRs have the density sech((λ − shift)/2), and w(λ) times a Gaussian latent's ε-error falls off
    at the same rate on both sides of λ ≈ b. The expected loss is any schedule's; its variance is lower here.
    """
    return schedules.cosine(config.model.logsnr_0, config.model.logsnr_1, shift=config.base_bias)


def drop_labels(label: Int[Array, " b"], keys: Key[Array, " b"], rate: float, null: int) -> Int[Array, " b"]:
    """Each label replaced by the null label with probability `rate`."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jnp.where(dropped, null, label)


def base_loss(config: Config) -> Loss:
    """Stage 2: the base model on z_clean of the frozen encoder, with sigmoid weighting, in (weighted) bits per pixel.

    It regresses on z_clean, which has the lower variance, between the prior's end points: it ends at λ_z(0). A batch
    holds latents (`z_clean`, see `ulx.latents`) or images that the frozen encoder turns into them.
    """
    weighting = weightings.sigmoid(bias=config.base_bias)
    schedule = base_schedule(config)

    def loss(base: Denoiser, frozen: UnifiedLatents, batch: Batch, draws: Draws, step: Int[Array, ""]):
        z_clean = batch["z_clean"] if "z_clean" in batch else frozen.z_clean(to_float(batch["image"]))
        z_clean = jax.lax.stop_gradient(z_clean)
        label_keys, loss_keys = diffusion.split_keys(draws.keys, 2)
        num_classes = base.network.num_classes
        label = drop_labels(batch["label"], label_keys, config.label_dropout, num_classes) if num_classes else None
        nats = losses.diffusion_loss(
            base.given(label=label), z_clean, schedule, weighting, key=loss_keys, t=draws.times(0)
        )
        total = losses.bits_per_pixel(nats, num_pixels=math.prod(frozen.encoder.shape[:-1])).mean()
        return total, {"loss": total}

    return loss


class CollapseWatch:
    """Warns loudly, once, when the latent carries nothing: posterior collapse.

    After the prior's warm-up it looks at `latent_std` against the latent's own noise σ_z(0)/α_z(0). At half the noise
    a Gaussian latent could carry ½ log₂(1 + ¼) = 0.16 bits per dimension; below that there is nothing to decode.
    """

    def __init__(self, config: Config):
        self.noise = float(diffusion.edm_sigma(jnp.asarray(config.model.logsnr_0)))
        self.after = config.prior_warmup[1]
        self.config = config
        self.collapsed = False

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        if step < self.after or self.collapsed or metrics["latent_std"] >= 0.5 * self.noise:
            return
        self.collapsed = True
        weighting = self.config.decoder_weighting
        cutoff = weightings.cutoff(float(weighting.bias), float(weighting.factor))
        warnings.warn(
            f"THE LATENT HAS COLLAPSED at step {step}: its standard deviation over images, "
            f"{metrics['latent_std']:.3f}, is below half that of its noise, {self.noise:.3f}, and its rate is "
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
