"""The losses of Unified Latents as pure functions over arrays and a denoiser: nats per example, summed over dimensions.

Nothing here knows a network library. A denoiser is any callable `denoise(z_t, logsnr, key=None) -> x_hat`
over a batch (`ulx.typing.Denoise`); a whole training objective for a latent of 8×8×4 under 32×32 images:

```python
import jax
from ulx import losses, schedules, weightings

latent_schedule = schedules.linear(logsnr_max=5.0, logsnr_min=-10.0)
image_schedule = schedules.image_schedule(32)
weighting = weightings.sigmoid(bias=weightings.sigmoid_bias(32), factor=1.5)


def objective(params, x, key):
    prior_key, noise_key, decoder_key = jax.random.split(key, 3)
    z_clean = encode(params, x)
    z_0 = losses.add_noise(z_clean, latent_schedule, key=noise_key)
    prior = losses.prior_loss(denoise_latent(params), z_clean, latent_schedule, key=prior_key)
    decoder = losses.decoder_loss(denoise_given(params, z_0), x, image_schedule, weighting, key=decoder_key)
    return losses.bits_per_pixel(prior.total + decoder, num_pixels=32 * 32).mean()
```

Losses take one key for the batch or one per example; from the former they derive the latter, and hand the denoiser
its own keys for dropout. Times are stratified over the batch unless given.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx import diffusion
from ulx.schedules import Schedule
from ulx.typing import Batch, Denoise, Keys, PerExample, pytree
from ulx.weightings import Weighting, elbo

__all__ = [
    "PriorTerms",
    "add_noise",
    "bits_per_latent_dim",
    "bits_per_pixel",
    "decoder_loss",
    "diffusion_loss",
    "encoder_loss",
    "prior_loss",
    "sample_t",
    "scale_gradient",
    "sum_squares",
    "terminal_kl",
]


@pytree
@dataclasses.dataclass(frozen=True)
class PriorTerms:
    """L_z of Eq. 3, in nats per example: an upper bound on KL[q(z_0|x) ‖ p(z_0)] and so on the latent's rate."""

    diffusion: PerExample
    """The integral over noise levels."""
    terminal: PerExample
    """KL[q(z_1|x) ‖ N(0, I)]."""

    @property
    def total(self) -> PerExample:
        return self.diffusion + self.terminal


def sum_squares(x: Batch) -> PerExample:
    """‖x‖² per example: a sum over all dimensions. (A mean would rescale latent and image against each other.)"""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def sample_t(key: Key[Array, ""], size: int) -> PerExample:
    """Low-discrepancy times: t_i = (u + i/size) mod 1 with one uniform u (VDM).

    Each t_i is uniform, and together they cover [0, 1) evenly, which lowers the variance of a batch's mean loss.
    """
    return (jax.random.uniform(key) + jnp.arange(size) / size) % 1.0


def add_noise(z_clean: Batch, schedule: Schedule, *, key: Keys, logsnr_0: PerExample | None = None) -> Batch:
    """z_0 = α_z(0) z_clean + σ_z(0) ε: what the decoder sees and what the base model generates.

    `logsnr_0` in the place of the schedule's λ_z(0) is for latents of varying noise (App. B).
    """
    logsnr = jnp.full(z_clean.shape[0], schedule.logsnr_max) if logsnr_0 is None else logsnr_0
    return diffusion.noise(z_clean, logsnr, diffusion.normal(key, z_clean))


def diffusion_loss(
    denoise: Denoise,
    x: Batch,
    schedule: Schedule,
    weighting: Weighting | None = None,
    *,
    key: Keys,
    t: PerExample | None = None,
) -> PerExample:
    """E_t[ −λ'(t) · exp(λ)/2 · w(λ) · ‖x − x̂(x_t)‖² ], one sample of t and ε per example (Eq. 2–4). Nats.

    The minus is there because λ' < 0; the paper's Eq. 4 and Alg. 1 drop it. `weighting=None` is w = 1.
    `t` in [0, 1]; by default drawn by `sample_t` from a single key, so keys given per example need it.

    Raises:
        ValueError: keys were given per example, but no `t`; or x̂ has another shape than x.
    """
    if t is None:
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1:
            raise ValueError("with one key per example pass t=losses.sample_t(key, batch size) too")
        t_key, key = jax.random.split(key)
        t = sample_t(t_key, x.shape[0])
    keys = jax.vmap(lambda k: jax.random.split(k))(diffusion.per_example_keys(key, x.shape[0]))
    logsnr = schedule(t)
    x_t = diffusion.noise(x, logsnr, diffusion.normal(keys[:, 0], x))
    x_hat = denoise(x_t, logsnr, key=keys[:, 1])
    if x_hat.shape != x.shape:
        raise ValueError(f"the denoiser returned shape {x_hat.shape} for an input of shape {x.shape}")
    weight = -schedule.derivative(t) * jnp.exp(logsnr) / 2 * (weighting or elbo())(logsnr)
    return weight * sum_squares(x - x_hat)


def terminal_kl(z_clean: Batch, logsnr: float) -> PerExample:
    """KL[N(α z_clean, σ² I) ‖ N(0, I)] = ½ Σ (α² z² + σ² − 1 − log σ²) at λ_z(1), the last term of Eq. 3. Nats."""
    dims = math.prod(z_clean.shape[1:])
    level = jnp.asarray(logsnr, jnp.float32)
    # σ² − 1 = −sigmoid(λ) and −log σ² = softplus(λ): no logarithm of a number rounded to 1.
    return 0.5 * (
        jax.nn.sigmoid(level) * sum_squares(z_clean) + dims * (jax.nn.softplus(level) - jax.nn.sigmoid(level))
    )


def prior_loss(
    denoise: Denoise,
    z_clean: Batch,
    schedule: Schedule,
    weighting: Weighting | None = None,
    *,
    key: Keys,
    t: PerExample | None = None,
) -> PriorTerms:
    """L_z (Eq. 3): the unweighted diffusion loss of z_clean plus the terminal KL, in nats per example.

    Unweighted, because an encoder hides its information at whichever noise level is discounted. The one weighting that
    leaves a bound is `weightings.TruncatedLogistic`, where z_0's own noise is drawn accordingly (App. B).
    """
    return PriorTerms(
        diffusion=diffusion_loss(denoise, z_clean, schedule, weighting, key=key, t=t),
        terminal=terminal_kl(z_clean, schedule.logsnr_min),
    )


def encoder_loss(std: Batch, logsnr_0: PerExample | float) -> PerExample:
    """L_e = −½ Σ log(1 + σ_E² exp(λ_z(0))) (Eq. 5), in nats per example; rate = L_z + L_e. Never positive.

    For an encoder of mean and variance, z_clean = μ + σ_E ε: L_z of that sample counts N(α z_clean, σ² I) where z_0
    given x has the wider N(α μ, α² σ_E² + σ²), whose entropy is larger by −L_e.
    """
    level = jnp.broadcast_to(jnp.asarray(logsnr_0, jnp.float32), std.shape[:1])
    level = level.reshape(-1, *(1,) * (std.ndim - 1))
    variance_ratio = jnp.square(std.astype(jnp.float32)) * jnp.exp(level)
    return -0.5 * jnp.sum(jnp.log1p(variance_ratio), axis=tuple(range(1, std.ndim)))


def decoder_loss(
    denoise: Denoise,
    x: Batch,
    schedule: Schedule,
    weighting: Weighting,
    *,
    key: Keys,
    t: PerExample | None = None,
) -> PerExample:
    """L_x (Eq. 4): the weighted diffusion loss of x by a denoiser that knows z_0, in (weighted) nats per example.

    With w = 1 it bounds −log p(x | z_0) up to x's own terminal KL and −log p(x | x_0), which it leaves out.
    """
    return diffusion_loss(denoise, x, schedule, weighting, key=key, t=t)


def scale_gradient(x: Batch, scale: float | Float[Array, ""]) -> Batch:
    """x itself, with its gradient multiplied by `scale`: the prior's warm-up, which leaves its own loss alone."""
    return jax.lax.stop_gradient(x) + scale * (x - jax.lax.stop_gradient(x))


def _bits(nats: Float[Array, "*s"], count: int) -> Float[Array, "*s"]:
    if count < 1:
        raise ValueError(f"bits are per pixel or per dimension, of which there is at least one; got {count}")
    return nats / (count * math.log(2))


def bits_per_pixel(nats: Float[Array, "*s"], *, num_pixels: int) -> Float[Array, "*s"]:
    """nats / (pixels · ln 2), pixels = H·W (T·H·W for video), whatever the number of channels."""
    return _bits(nats, num_pixels)


def bits_per_latent_dim(nats: Float[Array, "*s"], *, num_dims: int) -> Float[Array, "*s"]:
    """nats / (latent dimensions · ln 2). At most 3.61 for unit-variance Gaussian latents at λ_z(0) = 5."""
    return _bits(nats, num_dims)
