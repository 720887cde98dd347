"""Noise schedules: the log-SNR as a decreasing function of time, λ(t) = log(α²/σ²), t in [0, 1].

t = 0 is the least noise (`logsnr_max`), t = 1 the most (`logsnr_min`). A schedule decides where the training
samples and the sampler's grid go; the expected loss depends on its end points alone (paper, Eq. 2).

Schedules are registered dataclasses without array leaves: hashable constants under `jax.jit`.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Cosine", "Linear", "Schedule", "cosine", "image_schedule", "linear", "resolution_shift"]

REFERENCE_RESOLUTION = 512
IMAGE_LOGSNR_MAX = 5.0 + 2 * math.log(REFERENCE_RESOLUTION / 32)
"""λ_x(0)."""


@runtime_checkable
class Schedule(Protocol):
    @property
    def logsnr_max(self) -> float: ...
    @property
    def logsnr_min(self) -> float: ...
    def __call__(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """λ(t)."""
        ...

    def derivative(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """dλ/dt, negative everywhere."""
        ...

    def inverse(self, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """t(λ)."""
        ...

    def shifted(self, delta: float) -> "Schedule":
        """λ(t) + delta, end points included."""
        ...


def _static(cls):
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=[], meta_fields=names)


def _check_ends(logsnr_max: float, logsnr_min: float) -> None:
    if not (math.isfinite(logsnr_max) and math.isfinite(logsnr_min) and logsnr_min < logsnr_max):
        raise ValueError(
            f"a schedule runs from logsnr_max down to logsnr_min, both finite; got logsnr_max={logsnr_max}, "
            f"logsnr_min={logsnr_min}"
        )


@_static
@dataclasses.dataclass(frozen=True)
class Linear:
    """λ(t) = logsnr_max + (logsnr_min − logsnr_max) t: log-SNR uniform in t."""

    logsnr_max: float
    logsnr_min: float

    def __post_init__(self):
        _check_ends(self.logsnr_max, self.logsnr_min)

    def __call__(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return self.logsnr_max + (self.logsnr_min - self.logsnr_max) * t

    def derivative(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return jnp.full_like(t, self.logsnr_min - self.logsnr_max)

    def inverse(self, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return (logsnr - self.logsnr_max) / (self.logsnr_min - self.logsnr_max)

    def shifted(self, delta: float) -> "Linear":
        return Linear(self.logsnr_max + delta, self.logsnr_min + delta)


@_static
@dataclasses.dataclass(frozen=True)
class Cosine:
    """λ(t) = −2 log tan(a(t)) + shift, a linear in t between the angles of the two end points.

    Truncated at finite ends; with `shift = 0` and infinite ends it is α = cos(πt/2). `shift` moves all of it: the
    middle of the untruncated schedule lies at λ = shift (Hoogeboom et al. 2023, "simple diffusion").
    """

    logsnr_max: float
    logsnr_min: float
    shift: float = 0.0

    def __post_init__(self):
        _check_ends(self.logsnr_max, self.logsnr_min)
        # Near π/2 the angle's float32 rounding is an error in λ of 2e-8 exp((shift − λ)/2): 1e-3 at −20.
        if self.logsnr_min - self.shift < -20:
            raise ValueError(
                f"logsnr_min={self.logsnr_min} lies more than 20 below the cosine's shift of {self.shift}, where "
                "float32 cannot tell its angle from a right one: raise logsnr_min, or use a linear schedule"
            )

    @property
    def _angles(self) -> tuple[float, float]:
        return (
            math.atan(math.exp(-0.5 * (self.logsnr_max - self.shift))),
            math.atan(math.exp(-0.5 * (self.logsnr_min - self.shift))),
        )

    def __call__(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        low, high = self._angles
        return -2 * jnp.log(jnp.tan(low + (high - low) * t)) + self.shift

    def derivative(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        low, high = self._angles
        return -4 * (high - low) / jnp.sin(2 * (low + (high - low) * t))  # d/da of −2 log tan(a)

    def inverse(self, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
        low, high = self._angles
        return (jnp.arctan(jnp.exp(-0.5 * (logsnr - self.shift))) - low) / (high - low)

    def shifted(self, delta: float) -> "Cosine":
        return Cosine(self.logsnr_max + delta, self.logsnr_min + delta, self.shift + delta)


def linear(logsnr_max: float, logsnr_min: float) -> Linear:
    """The schedule that is linear in λ. Raises ValueError unless logsnr_min < logsnr_max, both finite."""
    return Linear(float(logsnr_max), float(logsnr_min))


def cosine(logsnr_max: float, logsnr_min: float, shift: float = 0.0) -> Cosine:
    """The cosine schedule between two end points.

    Raises ValueError unless logsnr_min < logsnr_max, both finite, and neither is so far from the shift that its angle
    is lost in rounding.
    """
    return Cosine(float(logsnr_max), float(logsnr_min), float(shift))


def resolution_shift(resolution: float, reference: float = REFERENCE_RESOLUTION) -> float:
    """2 ln(reference / resolution): how far in λ the informative noise levels of an image move with its resolution.

    At a lower resolution the same structure is spread over fewer pixels, so that it drowns in less noise.
    """
    if resolution <= 0 or reference <= 0:
        raise ValueError(f"resolutions are positive; got {resolution} and {reference}")
    return 2 * math.log(reference / resolution)


def image_schedule(resolution: int) -> Cosine:
    """Our λ_x for images: the shifted cosine of simple diffusion, from 10.55 at every resolution to −15 at 512 pixels,
    which the rule moves.

    The paper does not state its schedule. Samples end at λ_x(0) with what noise there is: σ/α is 0.65 of the 255 levels
    of a pixel's value. The decoder's weighted loss has nothing left there (from 32 pixels up the sigmoid discounts all
    but 3.4e-4), and at λ_x(1) = b − 12 an image of variance 1/4 holds under 1e-5 nats a dimension.
    """
    move = resolution_shift(resolution)
    return cosine(IMAGE_LOGSNR_MAX, logsnr_min=-15.0 + move, shift=2 * math.log(64 / REFERENCE_RESOLUTION) + move)
