"""Guidance: wrappers that make one denoiser of several, and say how many networks a call of it runs."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ulx.diffusion import expand
from ulx.typing import Batch, Denoise, Keys, PerExample

__all__ = ["Guided", "autoguidance", "check_interval", "classifier_free", "network_calls", "within"]

Scale = float | Float[Array, ""] | PerExample
EDGE = 1e-3
"""A λ this far outside an interval counts as inside: samplers compute λ from σ/α, in float32."""


@runtime_checkable
class Guided(Denoise, Protocol):
    """A denoiser that runs other denoisers."""

    def network_calls(self, logsnr: Float[Array, ""]) -> Int[Array, ""]: ...


def network_calls(denoise: Denoise, logsnr: Float[Array, ""]) -> Int[Array, ""]:
    """Network calls per sample in one call of `denoise` at this λ: 1, or what a guided denoiser says."""
    return denoise.network_calls(logsnr) if isinstance(denoise, Guided) else jnp.ones((), jnp.int32)


def classifier_free(denoise_both: Denoise, scale: Scale) -> Guided:
    """Classifier-free guidance: x̂ = x̂_null + scale · (x̂_cond − x̂_null); `scale = 1` is no guidance.

    `denoise_both` takes a batch of 2b, of which it conditions the first half and not the second, so that both go
    through the network at once. It counts as two network calls per sample. `scale`: one number or one per example.
    Ho & Salimans 2022.
    """
    return _ClassifierFree(denoise_both, scale)


def autoguidance(denoise: Denoise, weaker: Denoise, scale: Scale) -> Guided:
    """Guidance by a worse model: x̂ = x̂_weaker + scale · (x̂ − x̂_weaker); `scale = 1` is no guidance.

    `weaker` has the same task and condition, but less capacity or training. A call counts as one of either network,
    though the weaker one's may cost less. `scale`: one number or one per example. Karras et al. 2024.
    """
    return _Autoguidance(denoise, weaker, scale)


def within(interval: tuple[float, float], guided: Denoise, otherwise: Denoise) -> Guided:
    """`guided` where `interval[0] ≤ λ ≤ interval[1]`, `otherwise` elsewhere (Kynkäänniemi et al. 2024).

    Where no example of the batch is inside, `guided` is not called and costs nothing; where one is, `otherwise` is
    called only if another one is not. λ may differ by example. Raises ValueError for an empty interval.
    """
    check_interval(interval)
    return _Within(interval, guided, otherwise)


def check_interval(interval: tuple[float, float]) -> None:
    """Raises ValueError unless the interval of log-SNRs begins before it ends. Infinite ends are allowed."""
    if not interval[0] < interval[1] or any(map(math.isnan, interval)):
        raise ValueError(f"a guidance interval is (lowest λ, highest λ), lowest < highest; got {interval}")


@dataclasses.dataclass(frozen=True)
class _ClassifierFree:
    denoise_both: Denoise
    scale: Scale

    def __call__(self, z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
        if key is not None and key.ndim == 1:
            key = jnp.concatenate([key, key])
        both = self.denoise_both(jnp.concatenate([z_t, z_t]), jnp.concatenate([logsnr, logsnr]), key=key)
        cond, null = jnp.split(both, 2)
        return _extrapolate(null, cond, self.scale)

    def network_calls(self, logsnr: Float[Array, ""]) -> Int[Array, ""]:
        return 2 * network_calls(self.denoise_both, logsnr)


@dataclasses.dataclass(frozen=True)
class _Autoguidance:
    denoise: Denoise
    weaker: Denoise
    scale: Scale

    def __call__(self, z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
        return _extrapolate(self.weaker(z_t, logsnr, key=key), self.denoise(z_t, logsnr, key=key), self.scale)

    def network_calls(self, logsnr: Float[Array, ""]) -> Int[Array, ""]:
        return network_calls(self.denoise, logsnr) + network_calls(self.weaker, logsnr)


@dataclasses.dataclass(frozen=True)
class _Within:
    interval: tuple[float, float]
    guided: Denoise
    otherwise: Denoise

    def __call__(self, z_t: Batch, logsnr: PerExample, *, key: Keys | None = None) -> Batch:
        inside = self._inside(logsnr)
        guided = lambda: self.guided(z_t, logsnr, key=key)  # noqa: E731
        otherwise = lambda: self.otherwise(z_t, logsnr, key=key)  # noqa: E731
        mixed = lambda: jax.vmap(jnp.where)(inside, guided(), otherwise())  # noqa: E731
        # A sampler's batch has one λ, so that one of the two runs.
        case = jnp.where(inside.all(), 2, jnp.where(inside.any(), 1, 0))
        return jax.lax.switch(case, [otherwise, mixed, guided])

    def network_calls(self, logsnr: Float[Array, ""]) -> Int[Array, ""]:
        calls = network_calls(self.guided, logsnr), network_calls(self.otherwise, logsnr)
        return jnp.where(self._inside(logsnr), *calls)

    def _inside(self, logsnr: Float[Array, "*s"]) -> Bool[Array, "*s"]:
        return (logsnr >= self.interval[0] - EDGE) & (logsnr <= self.interval[1] + EDGE)


def _extrapolate(worse: Batch, better: Batch, scale: Scale) -> Batch:
    weight = expand(jnp.broadcast_to(jnp.asarray(scale, better.dtype), better.shape[:1]), better)
    return worse + weight * (better - worse)
