"""Data whose best denoiser, rate and probability flow are known, and the check of a mean against its standard error.

A Gaussian, K points and a 1-D mixture are one family: mixtures of Gaussians with diagonal covariances, where a point
is a Gaussian of variance 0. `denoise` follows the precision of z_t; reference values are float64, in numpy. Nothing
here uses `ulx`: α and σ are written out again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr


def alpha_sigma(logsnr) -> tuple[Any, Any]:
    """α and σ in float64."""
    logsnr = np.asarray(logsnr, np.float64)
    return np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))


@jax.jit
def posterior_mean(weights, means, variances, z_t, logsnr):
    """E[x | z_t] in a mixture of Gaussians; in the precision of its arguments."""
    logsnr = logsnr.reshape(-1, 1, *(1,) * (z_t.ndim - 1))  # (b, k, *dims)
    alpha, noise = jnp.sqrt(jax.nn.sigmoid(logsnr)), jax.nn.sigmoid(-logsnr)
    marginal = alpha**2 * variances + noise
    distance = z_t[:, None] - alpha * means
    axes = tuple(range(2, distance.ndim))
    log_likelihood = -0.5 * jnp.sum(distance**2 / marginal + jnp.log(marginal), axis=axes)
    posterior = jax.nn.softmax(jnp.log(weights) + log_likelihood, axis=1)
    per_component = means + alpha * variances * distance / marginal
    return jnp.sum(posterior.reshape(*posterior.shape, *(1,) * len(axes)) * per_component, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Σ_k weights_k N(means_k, diag variances_k). Hashed by identity: a constant under `jit`."""

    weights: np.ndarray  # (k,)
    means: np.ndarray  # (k, *dims)
    variances: np.ndarray  # (k, *dims)

    def draw(self, seed, size):
        """`size` samples, `b *dims`, in float32. (By numpy: nothing to compile.)"""
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), size, p=self.weights)
        eps = rng.standard_normal((size, *self.means.shape[1:]))
        return jnp.asarray(self.means[k] + np.sqrt(self.variances[k]) * eps, jnp.float32)

    def denoise(self, z_t, logsnr, *, key=None):
        """E[x | z_t], the minimiser of every x-loss."""
        del key
        parameters = [jnp.asarray(array, z_t.dtype) for array in (self.weights, self.means, self.variances)]
        return posterior_mean(*parameters, z_t, logsnr)

    def log_density(self, z, logsnr):
        """log of the density of z = α x + σ ε at one log-SNR, z `b *dims`: exact."""
        alpha, sigma = alpha_sigma(logsnr)
        variances = alpha**2 * self.variances + sigma**2
        distance = np.asarray(z, np.float64)[:, None] - alpha * self.means
        axes = tuple(range(2, distance.ndim))
        exponent = -0.5 * np.sum(distance**2 / variances + np.log(2 * np.pi * variances), axis=axes)
        return np.logaddexp.reduce(np.log(self.weights) + exponent, axis=1)

    # The rest is for one dimension, means and variances (k, 1).

    def _components(self, z, logsnr):
        """log(w_k N(z; k)) and the posterior mean and variance of x in component k, each (k, z)."""
        alpha, sigma = alpha_sigma(logsnr)
        marginal = alpha**2 * self.variances + sigma**2
        distance = z - alpha * self.means
        log_joint = np.log(self.weights)[:, None] - 0.5 * (distance**2 / marginal + np.log(2 * np.pi * marginal))
        return (
            log_joint,
            self.means + alpha * self.variances * distance / marginal,
            self.variances * sigma**2 / marginal,
        )

    def _line(self, logsnr):
        """A grid of z wide and fine enough that the trapezoid rule is exact to float64 for these smooth densities."""
        alpha, sigma = alpha_sigma(logsnr)
        reach = 12 * np.sqrt(alpha**2 * self.variances.max() + sigma**2)
        return np.linspace((alpha * self.means).min() - reach, (alpha * self.means).max() + reach, 8001)

    def information(self, logsnr):
        """I(x; z) in nats at one log-SNR, h(z) − ½ log(2πe σ²): the latent's exact rate at λ_z(0)."""
        return self._entropy(logsnr) - 0.5 * np.log(2 * np.pi * np.e * alpha_sigma(logsnr)[1] ** 2)

    def _entropy(self, logsnr):
        z = self._line(logsnr)
        log_density = np.logaddexp.reduce(self._components(z, logsnr)[0], axis=0)
        return np.trapezoid(-np.exp(log_density) * log_density, z)

    def second_moment(self):
        return np.sum(self.weights[:, None] * (self.means**2 + self.variances))

    def kl_to_standard(self, logsnr):
        """KL[q(z) ‖ N(0, 1)] of the marginal of z at one log-SNR."""
        alpha, sigma = alpha_sigma(logsnr)
        return 0.5 * (np.log(2 * np.pi) + alpha**2 * self.second_moment() + sigma**2) - self._entropy(logsnr)

    def mmse(self, logsnr):
        """E‖x − E[x|z]‖² at one log-SNR."""
        z = self._line(logsnr)
        log_joint, mean, variance = self._components(z, logsnr)
        log_density = np.logaddexp.reduce(log_joint, axis=0)
        posterior = np.exp(log_joint - log_density)
        spread = np.sum(posterior * (variance + mean**2), axis=0) - np.sum(posterior * mean, axis=0) ** 2
        return np.trapezoid(np.exp(log_density) * spread, z)

    def flow(self, z, logsnr_from, logsnr_to):
        """Where the probability flow carries z, an array (n,): in one dimension it keeps each sample's quantile."""
        target = self._cdf(z, logsnr_from)
        line = self._line(logsnr_to)
        low, high = np.full_like(z, line[0]), np.full_like(z, line[-1])
        for _ in range(60):  # bisection to float64
            middle = 0.5 * (low + high)
            below = self._cdf(middle, logsnr_to) < target
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return 0.5 * (low + high)

    def _cdf(self, z, logsnr):
        alpha, sigma = alpha_sigma(logsnr)
        scaled = (z - alpha * self.means) / np.sqrt(alpha**2 * self.variances + sigma**2)
        return np.sum(self.weights[:, None] * ndtr(scaled), axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """`dims` independent coordinates, each distributed as a 1-D mixture: samples are `b dims`, and nats add up."""

    coordinate: Mixture
    dims: int

    def draw(self, seed, size):
        return self.coordinate.draw(seed, size * self.dims).reshape(size, self.dims)

    def parameters(self, components):
        """(weights, means, variances) of a coordinate; the last component split so that there are `components`."""
        mixture = self.coordinate
        parts = components - len(mixture.weights) + 1
        index = [*range(len(mixture.weights) - 1), *[len(mixture.weights) - 1] * parts]
        weights = mixture.weights[index] * np.array([1.0] * (components - parts) + [1 / parts] * parts)
        return tuple(
            jnp.asarray(part, jnp.float32) for part in (weights, mixture.means[index], mixture.variances[index])
        )

    def bound(self, logsnr_max, logsnr_min):
        """L_z with the exact denoiser: the rate and KL[q(z_1) ‖ N(0, I)]."""
        return self.dims * (self.coordinate.information(logsnr_max) + self.coordinate.kl_to_standard(logsnr_min))


def denoise_coordinates(parameters):
    """The denoiser of a `Product` as a function of its parameters, which may be traced: one program for all data."""

    def denoise(z_t, logsnr, *, key=None):
        one = posterior_mean(*parameters, z_t.reshape(-1, 1), jnp.repeat(logsnr, z_t.shape[1]))
        return one.reshape(z_t.shape)

    return denoise


def gaussian(mean, variance) -> Mixture:
    """N(mean, diag variance); `mean` and `variance` broadcast to `*dims`."""
    mean, variance = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(variance, np.float64))
    return Mixture(np.ones(1), mean[None], variance[None])


def points(points) -> Mixture:
    """K equally likely points, `k *dims`."""
    points = np.asarray(points, np.float64)
    return Mixture(np.full(len(points), 1 / len(points)), points, np.zeros_like(points))


def mixture_1d(weights, means, variances) -> Mixture:
    """A 1-D mixture: samples are `b 1`."""
    column = [np.asarray(values, np.float64)[:, None] for values in (means, variances)]
    return Mixture(np.asarray(weights, np.float64), *column)


def gaussian_nats(variance, logsnr_max, logsnr_min):
    """∫ ½ e^λ mmse(λ) dλ = ½ Σ log((1 + s² e^{λ max})/(1 + s² e^{λ min})) over the dimensions of `variance`."""
    return 0.5 * np.sum(np.log1p(variance * np.exp(logsnr_max)) - np.log1p(variance * np.exp(logsnr_min)))


def assert_mean(samples, expected, standard_errors=3.0):
    """The mean of independent `samples` is `expected` within that many standard errors (seeds are fixed)."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(ddof=1) / np.sqrt(samples.size)
    off = abs(samples.mean() - expected) / error
    assert off <= standard_errors, f"mean {samples.mean():.6g} against {expected:.6g}: {off:.1f} standard errors"
