"""Rate control: the loss factor adapted while stage 1 trains, until the held-out rate is what was asked for.

    python experiments/openmoji.py --rate.target-bits-per-pixel 0.3 --name r030

The rate follows the cut-off λ* = b + ln(c_lf − 1), the log-SNR up to which detail is worth its bits, so that is what is
moved, from where `loss_factor` and `sigmoid_bias` put it. Every few steps the rate of some held-out images is measured,
and λ* moves by

    Δλ* = −(Δt/τ) · log(rate/target)/SENSITIVITY

dual ascent on the constraint rate = target, in logarithms. Before the window it waits, because a rate that is still
falling as the prior learns says little about where it will end; after it c_lf is left alone, so that the end of the
training is that of a run with this c_lf from the start.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from ulx import losses
from ulx.bound import estimate_rate
from ulx.data.pixels import to_float
from ulx.data.source import Dataset
from ulx.diffusion import split_keys
from ulx.models import UnifiedLatents
from ulx.weightings import Sigmoid

__all__ = ["RateConfig", "RateController", "controlled", "log_excess", "loss_factor"]

SENSITIVITY = 0.3
"""d log(rate)/dλ*, about: the step's size follows from it, not where it ends."""
LARGEST_ERROR = 0.5
"""|log(rate/target)| beyond this counts as this: far away the linear picture is too bold."""
LEVELS = 16
"""Noise levels per image at which the rate is measured."""


@dataclasses.dataclass(frozen=True)
class RateConfig:
    target_bits_per_pixel: float | None = None
    """Adapt the loss factor so that the held-out rate lands here; by default it stays as it is."""
    window: tuple[float, float] = (0.3, 0.9)
    """When it is adapted, in parts of stage 1."""
    time_constant: float = 0.1
    """τ, in parts of stage 1: how soon an error is to be gone."""
    every: int = 10
    """Steps between two adaptations."""
    images: int = 128
    """Held-out images whose rate is measured for each."""

    def __post_init__(self):
        target = self.target_bits_per_pixel
        if target is not None and not (target > 0 and math.isfinite(target)):
            raise ValueError(f"target_bits_per_pixel must be positive, got {target}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window is (first, last) part of stage 1, 0 to 1 with first < last, got {self.window}")
        if not self.time_constant > 0:
            raise ValueError(f"time_constant must be positive, got {self.time_constant}")
        for name in ("every", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def log_excess(factor: float) -> float:
    """ln(c_lf − 1) = λ* − b, which is what is adapted. Raises ValueError for c_lf ≤ 1, whose cut-off is −∞."""
    if not factor > 1:
        raise ValueError(
            f"rate control starts from the cut-off b + ln(c_lf - 1): it needs loss_factor > 1, got {factor}"
        )
    return math.log(factor - 1)


def loss_factor(excess: Float[Array, ""] | float) -> Float[Array, ""]:
    """c_lf = 1 + exp(λ* − b)."""
    return 1 + jnp.exp(jnp.asarray(excess, jnp.float32))


@dataclasses.dataclass(frozen=True)
class RateController:
    """`controller(step, model, excess) -> excess`, to be called after every step with the weights as they are."""

    config: RateConfig
    steps: int
    """Of stage 1."""
    images: UInt8[np.ndarray, "n h w c"]
    """Held-out ones."""
    key: Key[Array, ""]

    @classmethod
    def on(cls, dataset: Dataset, config: RateConfig, steps: int, *, key: Key[Array, ""]) -> "RateController":
        """With the images that it measures, spread over the held-out split."""
        count = min(config.images, len(dataset.validation))
        chosen = np.linspace(0, len(dataset.validation) - 1, count).astype(int)
        images = np.stack([dataset.validation[int(i)]["image"] for i in chosen])
        return cls(config, steps, images, key)

    def acts(self, step: int) -> bool:
        first, last = (part * self.steps for part in self.config.window)
        return step % self.config.every == 0 and first < step <= last

    def __call__(self, step: int, model: UnifiedLatents, excess: Float[Array, ""]) -> Float[Array, ""]:
        if not self.acts(step):
            return excess
        bits = _held_out_bits(model, jnp.asarray(to_float(self.images)), jax.random.fold_in(self.key, step))
        return self.moved(excess, bits)

    def moved(self, excess: Float[Array, ""], bits_per_pixel: Float[Array, ""]) -> Float[Array, ""]:
        """ln(c_lf − 1) after one adaptation to a measured rate."""
        assert self.config.target_bits_per_pixel is not None
        error = jnp.log(bits_per_pixel / self.config.target_bits_per_pixel)
        part = self.config.every / (self.config.time_constant * self.steps)
        return excess - part * jnp.clip(error, -LARGEST_ERROR, LARGEST_ERROR) / SENSITIVITY


@eqx.filter_jit
def _held_out_bits(model: UnifiedLatents, x: Float[Array, "b *space c"], key: Key[Array, ""]) -> Float[Array, ""]:
    """The rate in bits per pixel, one draw of each level."""
    clean_key, rate_key = split_keys(key, 2)
    posterior, schedule = model.posterior(x), model.latent_schedule
    rate = estimate_rate(
        model.prior.given(),
        posterior.sample(key=clean_key),
        schedule,
        key=rate_key,
        levels=LEVELS,
        encoder=posterior.nats(schedule.logsnr_max),
    ).rate
    return losses.bits_per_pixel(rate, num_pixels=math.prod(model.shape[:-1])).mean()


def controlled(weighting: Sigmoid, excess: Float[Array, ""] | None) -> Sigmoid:
    """The decoder's weighting with the loss factor as it is now; None: as it was set."""
    return weighting if excess is None else dataclasses.replace(weighting, factor=loss_factor(excess))
