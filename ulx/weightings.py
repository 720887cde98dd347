"""Loss weightings w(λ), always relative to the ELBO: the loss is E[−λ' · exp(λ)/2 · w(λ) · ‖x − x̂‖²].

w = 1 gives a bound in nats. The decoder's weighting discounts low noise, detail that is not worth its bits.

Weightings are registered dataclasses whose numbers are pytree leaves, so that a run may adapt them while it trains.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ulx import diffusion
from ulx.schedules import REFERENCE_RESOLUTION, resolution_shift
from ulx.typing import Keys

__all__ = ["Elbo", "Sigmoid", "TruncatedLogistic", "Weighting", "cutoff", "elbo", "sigmoid", "sigmoid_bias"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Elbo:
    """w(λ) = 1: the bound itself, what the prior trains on and what bits are measured with."""

    def __call__(self, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return jnp.ones_like(logsnr)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """w(λ) = factor · sigmoid(bias − λ) (Eq. 4): 1·factor at high noise, falling as exp(bias − λ) at low noise.

    Next to exp(λ)/2 on the x-loss it is sigmoid(**bias − λ**). The paper's §3.2 prints sigmoid(λ − bias), which is
    the same weighting after the factor exp(λ) is taken in: exp(λ) sigmoid(b − λ) = exp(b) sigmoid(λ − b).
    """

    bias: float | Float[Array, ""]
    factor: float | Float[Array, ""] = 1.0

    def __call__(self, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return self.factor * jax.nn.sigmoid(self.bias - logsnr)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["bias", "logsnr_max", "logsnr_min"])
@dataclasses.dataclass(frozen=True)
class TruncatedLogistic:
    """A random λ_z(0) ~ logistic(bias, 1) in [logsnr_min, logsnr_max], and the weighting that it amounts to (App. B).

    Integrating an unweighted loss from a λ_0 drawn so is, on average, weighting it with w(λ) = P(λ_0 ≥ λ): up to the
    truncation sigmoid(bias − λ). The bound stays one, because z_0 is as noisy as the prior's integral begins.
    """

    bias: float
    logsnr_max: float
    logsnr_min: float

    def __call__(self, logsnr: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """P(λ_0 ≥ λ): 1 at logsnr_min, 0 at logsnr_max."""
        low, high = self._tails
        inside = (jax.nn.sigmoid(self.bias - logsnr) - high) / (low - high)
        return jnp.clip(inside, 0.0, 1.0)

    def sample(self, keys: Keys, size: int) -> Float[Array, " b"]:
        """λ_0 for `size` examples, by the inverse of its distribution."""
        low, high = self._tails
        uniform = jax.vmap(jax.random.uniform)(diffusion.per_example_keys(keys, size))
        tail = high + (low - high) * uniform
        # Its ends are met up to rounding; no λ_0 may lie outside the schedule.
        return jnp.clip(self.bias - (jnp.log(tail) - jnp.log1p(-tail)), self.logsnr_min, self.logsnr_max)

    @property
    def _tails(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """P(λ_0 ≥ λ) of the untruncated logistic, at logsnr_min and at logsnr_max."""
        return jax.nn.sigmoid(self.bias - jnp.asarray(self.logsnr_min)), jax.nn.sigmoid(
            self.bias - jnp.asarray(self.logsnr_max)
        )


Weighting = Elbo | Sigmoid | TruncatedLogistic


def elbo() -> Elbo:
    """w = 1."""
    return Elbo()


def sigmoid(bias: float | Float[Array, ""], factor: float | Float[Array, ""] = 1.0) -> Sigmoid:
    """factor · sigmoid(bias − λ). For the decoder `factor` is the loss factor c_lf of Eq. 4."""
    return Sigmoid(bias, factor)


def sigmoid_bias(resolution: float, at_512: float = -3.0) -> float:
    """b(r) = b(512) + 2 ln(512/r): −3 at 512 pixels is +2.5 at 32 (SiD2's b = −3, moved by the resolution rule)."""
    return at_512 + resolution_shift(resolution, REFERENCE_RESOLUTION)


def cutoff(bias: float, factor: float) -> float:
    """λ* = b + ln(c_lf − 1), where the decoder's weight crosses 1.

    Detail that shows only above λ* costs more bits in the latent than it saves the decoder. −inf for
    c_lf ≤ 1: then nothing is worth coding, and the latent collapses.
    """
    return bias + math.log(factor - 1) if factor > 1 else -math.inf
