"""Guidance: wrappers that make one denoiser of several."""

import jax.numpy as jnp

from ulx.diffusion import expand
from ulx.typing import Batch, Denoise, Keys, PerExample

__all__ = ["classifier_free"]


def classifier_free(denoise_both: Denoise, scale: float | PerExample) -> Denoise:
    """Classifier-free guidance: x̂ = x̂_null + scale · (x̂_cond − x̂_null); `scale = 1` is no guidance.

    `denoise_both` takes a batch of 2b, of which it conditions the first half and not the second, so that both go
    through the network at once. It counts as two network calls per sample. `scale`: one number or one per example.
    """

    def guided(z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
        if key is not None and key.ndim == 1:
            key = jnp.concatenate([key, key])
        both = denoise_both(jnp.concatenate([z_t, z_t]), jnp.concatenate([logsnr, logsnr]), key=key)
        cond, null = jnp.split(both, 2)
        weight = expand(jnp.broadcast_to(jnp.asarray(scale, cond.dtype), logsnr.shape), cond)
        return null + weight * (cond - null)

    return guided
