"""Rate control: the loss factor adapted while stage 1 trains, until the held-out rate is what was asked for.

    python experiments/openmoji.py --rate.target-bits-per-pixel 0.3 --name r030

The rate follows the cut-off λ* = b + ln(c_lf − 1), the log-SNR up to which detail is worth its bits, so that is what is
moved, from where `loss_factor` and `sigmoid_bias` put it. It follows late: the encoder takes its time, and the averaged
weights, whose rate counts, take theirs. So the controller keeps a model of it,

    log rate = a + SENSITIVITY · λ*_felt,    λ*_felt: λ* through both lags,

reads a off the rate of some held-out images, and goes part of the way to the λ* at which this model meets the target at
the end of training, until when a falls by DRIFT times the part of training that is left. It begins after the prior's
warm-up, before which the rate says nothing, and ends before the training does, which is then much like that of a run
with this c_lf throughout.
"""

import dataclasses
import math
from collections.abc import Callable

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
from ulx.typing import pytree
from ulx.weightings import Sigmoid

__all__ = ["Control", "RateConfig", "RateController", "controlled", "held_out_images", "log_excess"]

SENSITIVITY = 0.4
"""d log(rate)/dλ*, about. The loop closes also if it is off by half."""
ENCODER_LAG = 60
"""Steps, about, after which the rate has followed a new λ* by 1 − 1/e."""
DRIFT = 0.25
"""How much log(rate) falls at one λ*, about, in a time as long as the training: the prior learns, and the learning rate
decays. By 0.22 to 0.30 in the second halves of runs of 400 and 1000 steps on OpenMoji."""
LARGEST_MOVE = 1.0
"""How far the λ* to go to may lie from where it is: far away the linear model is too bold."""
LEVELS = 8
"""Noise levels per image at which the rate is measured."""


@dataclasses.dataclass(frozen=True)
class RateConfig:
    target_bits_per_pixel: float | None = None
    """Adapt the loss factor so that the held-out rate lands here; by default it stays as it is."""
    window: tuple[float, float] = (0.15, 0.9)
    """When it is adapted, in parts of what of stage 1 is left after the prior's warm-up."""
    time_constant: float = 0.1
    """How soon it goes to where the model meets the target, in parts of stage 1."""
    every: int = 10
    """Steps between two adaptations."""
    images: int = 128
    """Held-out images whose rate is measured for each."""

    def __post_init__(self):
        target = self.target_bits_per_pixel
        if target is not None and not (target > 0 and math.isfinite(target)):
            raise ValueError(f"target_bits_per_pixel must be positive, got {target}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window is (first, last) part, 0 to 1 with first < last, got {self.window}")
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


@pytree
@dataclasses.dataclass(frozen=True)
class Control:
    """What is adapted, and how much of it has arrived: λ* − b = ln(c_lf − 1)."""

    excess: Float[Array, ""]
    """As it is."""
    followed: Float[Array, ""]
    """As the encoder has followed it."""
    averaged: Float[Array, ""]
    """As the averaged weights have."""

    @classmethod
    def start(cls, factor: float) -> "Control":
        """Raises ValueError for a loss factor of 1 or below."""
        # Three arrays of their own: a training step donates its state, and no buffer may be donated twice.
        return cls(*(jnp.asarray(log_excess(factor), jnp.float32) for _ in range(3)))

    @property
    def loss_factor(self) -> Float[Array, ""]:
        """c_lf = 1 + exp(λ* − b)."""
        return 1 + jnp.exp(self.excess)


@dataclasses.dataclass(frozen=True)
class RateController:
    """`controller(step, model, control) -> control`, to be called after every step with the averaged weights."""

    config: RateConfig
    steps: int
    """Of stage 1."""
    ema_decay: float
    """Of the averaged weights."""
    warmup_end: int
    """The last step of the prior's warm-up."""
    images: UInt8[np.ndarray, "n h w c"]
    """Held-out ones."""
    key: Key[Array, ""]

    def acts(self, step: int) -> bool:
        left = self.steps - self.warmup_end
        first, last = (self.warmup_end + part * left for part in self.config.window)
        return step % self.config.every == 0 and first < step <= last

    def __call__(self, step: int, model: Callable[[], UnifiedLatents], control: Control) -> Control:
        control = self.lagged(control)
        if not self.acts(step):
            return control
        x = jnp.asarray(to_float(self.images))
        return self.moved(step, control, _held_out_bits(model(), x, jax.random.fold_in(self.key, step)))

    def lagged(self, control: Control) -> Control:
        """One training step later."""
        followed = control.followed + (control.excess - control.followed) / ENCODER_LAG
        averaged = control.averaged + (followed - control.averaged) * (1 - self.ema_decay)
        return dataclasses.replace(control, followed=followed, averaged=averaged)

    def moved(self, step: int, control: Control, bits_per_pixel: Float[Array, ""]) -> Control:
        """After one adaptation to the rate measured at `step`."""
        assert self.config.target_bits_per_pixel is not None
        error = jnp.log(bits_per_pixel / self.config.target_bits_per_pixel) - DRIFT * (1 - step / self.steps)
        wanted = control.averaged - error / SENSITIVITY
        part = min(1.0, self.config.every / (self.config.time_constant * self.steps))
        move = part * jnp.clip(wanted - control.excess, -LARGEST_MOVE, LARGEST_MOVE)
        return dataclasses.replace(control, excess=control.excess + move)


def held_out_images(dataset: Dataset, count: int) -> UInt8[np.ndarray, "n h w c"]:
    """`count` images (or all there are), spread over the held-out split."""
    chosen = np.linspace(0, len(dataset.validation) - 1, min(count, len(dataset.validation))).astype(int)
    return np.stack([dataset.validation[int(i)]["image"] for i in chosen])


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


def controlled(weighting: Sigmoid, control: Control | None) -> Sigmoid:
    """The decoder's weighting with the loss factor as it is now; None: as it was set."""
    return weighting if control is None else dataclasses.replace(weighting, factor=control.loss_factor)
