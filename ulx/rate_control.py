"""Rate control: the loss factor adapted while stage 1 trains, until the held-out rate is what was asked for.

    python experiments/openmoji.py --rate.target-bits-per-pixel 0.3 --name r030

The rate follows the cut-off λ* = b + ln(c_lf − 1), the log-SNR up to which detail is worth its bits, so that is what is
moved, from where `loss_factor` and `sigmoid_bias` put it. It follows late: the latent remembers its path through a good
part of the training, and the averaged weights, whose rate counts, lag again. So the controller keeps a model,

    log rate = a + SENSITIVITY · λ*_felt + DRIFT · left,

in which time is the sum of the learning rates, from 0 to 1 over the training, `left` the part of it that is to come,
averaged as the weights are, and λ*_felt is λ* through both lags. It reads a off the rate of some held-out images, from
that the λ* to be felt at the end for the rate to meet the target, and goes as far beyond it as makes it felt by then.
It begins after the prior's warm-up, before which the rate says little, and goes fast, for late moves are hardly felt.

A run with one c_lf throughout needs for the same rate what was felt in the end, not what was set last, so that is
reported.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property

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
from ulx.ema import average_decay
from ulx.models import UnifiedLatents
from ulx.typing import pytree
from ulx.weightings import Sigmoid

__all__ = ["Control", "RateConfig", "RateController", "controlled", "held_out_images", "log_excess"]

SENSITIVITY = 0.45
"""d log(rate)/dλ*, about. Stage 1 of the tiny preset with c_lf 2.27, 4 and 9.1 throughout: 0.28, 0.46, 0.67 bits/pixel,
so 0.58 and 0.37 (2 cores of an AMD EPYC, 2026-11-25, by benchmarks/rate_control.py). The loop closes with either."""
ENCODER_LAG = 0.2
"""Time, about, after which the rate has followed a new λ* by 1 − 1/e. Fitted to that benchmark's runs: 0.14 to 0.2 for
those of 400 steps, 0.18 to 0.25 for those of 1000."""
DRIFT = 0.6
"""How much log(rate) falls at one λ*, about, in the time of the whole training: the prior learns."""
LARGEST_GAIN = 2.5
"""How many times as far as what is to be felt it goes, when little time is left to feel it."""
LARGEST_MOVE = 1.0
"""How far the λ* to go to may lie from where it is: far away the linear model is too bold."""
LOWEST = 1e-3
"""Of the target, what a measured rate counts as at least: an estimate of next to no rate may be below 0."""
LEVELS = 8
"""Noise levels per image at which the rate is measured."""


@dataclasses.dataclass(frozen=True)
class RateConfig:
    target_bits_per_pixel: float | None = None
    """Adapt the loss factor so that the held-out rate lands here; by default it stays as it is."""
    window: tuple[float, float] = (0.05, 0.9)
    """When it is adapted, in parts of what of stage 1 is left after the prior's warm-up."""
    time_constant: float = 0.02
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

    @property
    def felt_loss_factor(self) -> Float[Array, ""]:
        """The c_lf which, throughout, is to give the averaged weights the same rate."""
        return 1 + jnp.exp(self.averaged)

    @property
    def logged(self) -> dict[str, Float[Array, ""]]:
        """What a training step logs of it."""
        return {"loss_factor": self.loss_factor, "felt_loss_factor": self.felt_loss_factor}


@dataclasses.dataclass(frozen=True)
class RateController:
    """`controller(step, model, control) -> control`, to be called after every step with the averaged weights."""

    config: RateConfig
    pace: Float[np.ndarray, " steps"]
    """Learning rates of stage 1's steps, as parts of the peak."""
    ema_decay: float
    """Of the averaged weights."""
    warmup_end: int
    """The last step of the prior's warm-up."""
    images: UInt8[np.ndarray, "n h w c"]
    """Held-out ones."""
    key: Key[Array, ""]

    def acts(self, step: int) -> bool:
        left = len(self.pace) - self.warmup_end
        first, last = (self.warmup_end + part * left for part in self.config.window)
        return step % self.config.every == 0 and first < step <= last

    def __call__(self, step: int, model: Callable[[], UnifiedLatents], control: Control) -> Control:
        control = self.lagged(step, control)
        if not self.acts(step):
            return control
        x = jnp.asarray(to_float(self.images))
        return self.moved(step, control, _held_out_bits(model(), x, jax.random.fold_in(self.key, step)))

    @cached_property
    def left(self) -> Float[np.ndarray, " steps"]:
        """The time that is left after each step."""
        return 1 - np.cumsum(self.pace) / self.pace.sum()

    @cached_property
    def decays(self) -> Float[np.ndarray, " steps"]:
        """Of the averaged weights, at each step."""
        return np.asarray(average_decay(self.ema_decay, np.arange(len(self.pace))), np.float64)

    @cached_property
    def averaged_left(self) -> Float[np.ndarray, " steps"]:
        """The same averaged as the weights are."""
        found, average = np.empty_like(self.left), 1.0
        for i, (left, decay) in enumerate(zip(self.left, self.decays, strict=True)):
            average += (left - average) * (1 - decay)
            found[i] = average
        return found

    def lagged(self, step: int, control: Control) -> Control:
        """After the training step that is number `step`."""
        part = min(1.0, float(self.pace[step - 1] / self.pace.sum()) / ENCODER_LAG)
        followed = control.followed + part * (control.excess - control.followed)
        averaged = control.averaged + (followed - control.averaged) * (1 - float(self.decays[step - 1]))
        return dataclasses.replace(control, followed=followed, averaged=averaged)

    def moved(self, step: int, control: Control, bits_per_pixel: Float[Array, ""]) -> Control:
        """After one adaptation to the rate measured at `step`."""
        assert self.config.target_bits_per_pixel is not None
        times = jnp.maximum(bits_per_pixel / self.config.target_bits_per_pixel, LOWEST)
        error = jnp.log(times) - DRIFT * self.averaged_left[step - 1]
        to_be_felt = control.averaged - error / SENSITIVITY
        will_follow = max(1 - math.exp(-self.left[step - 1] / ENCODER_LAG), 1 / LARGEST_GAIN)
        wanted = control.followed + (to_be_felt - control.followed) / will_follow
        part = min(1.0, self.config.every / (self.config.time_constant * len(self.pace)))
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
