"""What an encoder says about its input: a latent, or a Gaussian over latents (Eq. 5)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from ulx import diffusion, losses
from ulx.schedules import Schedule
from ulx.typing import Batch, Keys, PerExample, pytree

__all__ = ["Posterior"]


@pytree
@dataclasses.dataclass(frozen=True)
class Posterior:
    """z_clean = mean, or z_clean ~ N(mean, std² I) for an encoder with a variance of its own (Tab. 6, D)."""

    mean: Float[Array, "b *latent k"]
    std: Float[Array, "b *latent k"] | None = None
    """σ_E."""

    def sample(self, *, key: Keys) -> Batch:
        """z_clean = μ + σ_E ε."""
        return self.mean if self.std is None else self.mean + self.std * diffusion.normal(key, self.mean)

    def z_0(self, schedule: Schedule, *, key: Keys) -> Batch:
        """α z_clean + σ ε at λ_z(0), with the noise of both."""
        if self.std is None:
            return losses.add_noise(self.mean, schedule, key=key)
        clean_key, noise_key = diffusion.split_keys(key, 2)
        return losses.add_noise(self.sample(key=clean_key), schedule, key=noise_key)

    def nats(self, logsnr_0: PerExample | float) -> PerExample:
        """L_e (Eq. 5), which a rate adds to L_z of the sample: 0 for an encoder without variance. Per example."""
        if self.std is None:
            return jnp.zeros(self.mean.shape[0])
        return losses.encoder_loss(self.std, logsnr_0)

    def normal_rate(self, logsnr_0: float) -> PerExample:
        """KL[q(z_0|x) ‖ N(0, I)], in nats per example: the rate under a standard normal prior, in closed form.

        q(z_0|x) = N(α μ, α² σ_E² + σ²). A sum of α² σ_E² to the mean's terminal KL, and L_e for its wider entropy.
        """
        rate = losses.terminal_kl(self.mean, logsnr_0)
        if self.std is None:
            return rate
        level = jnp.asarray(logsnr_0, jnp.float32)
        return rate + 0.5 * diffusion.alpha(level) ** 2 * losses.sum_squares(self.std) + self.nats(logsnr_0)
