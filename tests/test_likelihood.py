import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from oracles import Mixture, alpha_sigma, assert_mean, gaussian, mixture_1d

from ulx import schedules
from ulx.likelihood import flow_rate, log_likelihood

KEY = jax.random.key(0)
GAUSSIAN = gaussian(np.array([[0.5, -1.0], [0.0, 2.0]]), np.array([[0.3, 1.0], [4.0, 0.05]]))
# Three components that overlap: posterior means whose Jacobian is not diagonal.
_rng = np.random.default_rng(0)
MIXTURE = Mixture(np.array([0.2, 0.5, 0.3]), _rng.normal(size=(3, 4)), _rng.uniform(0.02, 0.6, (3, 4)))
# At λ = −20 the N(0, I) that the model starts from is the data's own z_1 to 1e-4 nats.
FAR = schedules.linear(5.0, -20.0)


@functools.partial(jax.jit, static_argnames=("data", "schedule", "probes", "distribution", "tolerance"))
def likelihood(data, z_0, key, schedule, probes=None, distribution: Any = "rademacher", tolerance=1e-5):
    return log_likelihood(
        data.denoise, z_0, schedule, probes=probes, distribution=distribution, key=key, tolerance=tolerance
    )


def noised(data, size=64, logsnr=5.0):
    """z_0 of that many samples, float32."""
    alpha, sigma = alpha_sigma(logsnr)
    z_clean = np.asarray(data.draw(0, size))
    return jnp.asarray(alpha * z_clean + sigma * np.random.default_rng(1).standard_normal(z_clean.shape), jnp.float32)


def flow_of_gaussian(z_0, logsnr_max, logsnr_min):
    """z_1 and log p(z_0) of the model that starts from N(0, I), not from the data's z_1; float64."""
    (mean,), (variance,) = GAUSSIAN.means, GAUSSIAN.variances
    (alpha_0, sigma_0), (alpha_1, sigma_1) = alpha_sigma(logsnr_max), alpha_sigma(logsnr_min)
    ratio = np.sqrt((alpha_1**2 * variance + sigma_1**2) / (alpha_0**2 * variance + sigma_0**2))
    z_1 = alpha_1 * mean + ratio * (np.asarray(z_0, np.float64) - alpha_0 * mean)
    return z_1, np.sum(-0.5 * z_1**2 - 0.5 * math.log(2 * math.pi) + np.log(ratio), axis=(1, 2))


class TestExactTrace:
    @pytest.mark.parametrize("logsnr_min", [-10.0, 0.0])
    def test_gaussian_closed_form(self, logsnr_min):
        """At λ_z(1) = 0 the model is far from the data: it is its own density that counts. Float32."""
        z_0 = noised(GAUSSIAN)
        found = likelihood(GAUSSIAN, z_0, None, schedules.linear(5.0, logsnr_min))
        z_1, log_density = flow_of_gaussian(z_0, 5.0, logsnr_min)
        # 1e-4 nats a dimension: some ten times the tolerance of a step, over two dozen steps.
        np.testing.assert_allclose(found.log_density / 4, log_density / 4, atol=1e-4)
        np.testing.assert_allclose(found.z_1, z_1, atol=1e-3)
        np.testing.assert_array_equal(found.standard_error, 0)
        assert 5 < int(found.num_steps) < 100

    def test_mixture_by_its_exact_density(self):
        z_0 = noised(MIXTURE)
        found = likelihood(MIXTURE, z_0, None, FAR)
        # Float32, measured 8e-5 at most; the requirement is 1e-3 nats a dimension.
        np.testing.assert_allclose(found.log_density / 4, MIXTURE.log_density(z_0, 5.0) / 4, atol=3e-4)

    def test_float64(self):
        """Nothing but the solver's error is left, and it follows the tolerance."""
        with jax.enable_x64(True):
            z_0 = jnp.asarray(np.asarray(noised(GAUSSIAN), np.float64))
            _, exact = flow_of_gaussian(z_0, 5.0, -10.0)
            found = likelihood(GAUSSIAN, z_0, None, schedules.cosine(5.0, -10.0), tolerance=1e-8)
            assert found.log_density.dtype == jnp.float64
            np.testing.assert_allclose(found.log_density, exact, atol=1e-6)  # a few dozen steps of 1e-8

    def test_more_steps_than_allowed(self):
        with pytest.raises(RuntimeError, match="max_steps"):
            jax.jit(
                lambda z_0: log_likelihood(GAUSSIAN.denoise, z_0, schedules.linear(5.0, -10.0), max_steps=3),
            )(noised(GAUSSIAN))


class TestHutchinson:
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_unbiased_and_honest(self, distribution):
        z_0 = noised(MIXTURE)
        exact = likelihood(MIXTURE, z_0, None, FAR)
        found = likelihood(MIXTURE, z_0, KEY, FAR, probes=64, distribution=distribution)
        error = np.asarray(found.standard_error)
        off = (np.asarray(found.log_density) - np.asarray(exact.log_density)) / error
        assert abs(off.sum()) / 8 < 3  # 64 examples, independent probes: their sum has standard deviation 8
        assert 0.75 < np.sqrt(np.mean(off**2)) < 1.3  # known to 9 %, and a little above 1 with 64 probes
        assert error.mean() > 0.05  # so that there was something to estimate
        np.testing.assert_allclose(found.z_1, exact.z_1, atol=1e-2)

    def test_gaussian_probes_have_a_known_error(self):
        """A unit-variance Gaussian: x̂ = α z_t, tr = D α², so log p varies by ∫ α² dτ = ½ ln(σ_1²/σ_0²) × (‖ε‖² − D)."""
        data = gaussian(np.zeros(8), np.ones(8))
        found = likelihood(data, noised(data), KEY, schedules.linear(5.0, -10.0), probes=64, distribution="gaussian")
        integral = 0.5 * math.log(alpha_sigma(-10.0)[1] ** 2 / alpha_sigma(5.0)[1] ** 2)
        expected = integral * math.sqrt(2 * 8 / 64)
        assert np.sqrt(np.mean(np.asarray(found.standard_error) ** 2)) == pytest.approx(expected, rel=0.1)

    def test_rademacher_is_exact_for_a_diagonal_jacobian(self):
        z_0, schedule = noised(GAUSSIAN), schedules.linear(5.0, -10.0)
        found = likelihood(GAUSSIAN, z_0, KEY, schedule, probes=1)
        np.testing.assert_allclose(found.log_density, flow_of_gaussian(z_0, 5.0, -10.0)[1], atol=4e-4)
        assert np.all(np.isnan(found.standard_error))  # one probe knows no error

    @pytest.mark.parametrize(
        ("probes", "key", "distribution", "message"),
        [
            (0, KEY, "gaussian", "at least 1, or None for the exact trace; got 0"),
            (2, None, "gaussian", "pass a key"),
            (2, KEY, "uniform", "unknown distribution 'uniform'"),
        ],
    )
    def test_refuses(self, monkeypatch, probes, key, distribution: Any, message):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        with pytest.raises(ValueError, match=message):
            log_likelihood(MIXTURE.denoise, noised(MIXTURE), FAR, probes=probes, key=key, distribution=distribution)


def test_rate_of_the_flow_is_the_bound_for_an_exact_denoiser():
    """I(x; z_0) + KL[q(z_1) ‖ N(0, I)], by quadrature: at λ_z(1) = 0 the second part is 0.06 nats."""
    data = mixture_1d([0.3, 0.7], [-1.0, 0.8], [0.05, 0.2])
    schedule = schedules.linear(5.0, 0.0)
    found = jax.jit(lambda z: flow_rate(data.denoise, z, schedule, key=KEY))(data.draw(0, 4096))
    assert_mean(found.rate, data.information(5.0) + data.kl_to_standard(0.0))
