"""Encoders of variance, the standard normal prior and the random λ_z(0), against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_mean, gaussian
from scipy import stats

from ulx import diffusion, losses, schedules
from ulx.bound import estimate_rate
from ulx.denoiser import StandardNormal
from ulx.nn.conditions import Conditions
from ulx.posterior import Posterior
from ulx.weightings import TruncatedLogistic

SCHEDULE = schedules.linear(5.0, -10.0)
KEY = jax.random.key(0)


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class TestEncoderOfVariance:
    """Eq. 5: z_clean = μ + σ_E ε and rate = L_z + L_e."""

    def test_rate_of_gaussian_latents_is_exact(self):
        """μ ~ N(0, s² − σ_E²), so that z_clean ~ N(0, s²) and its best denoiser is known. The rate is then the mutual
        information of x and z_0, ½ log of the variances' ratio: ½ log((α² s² + σ²)/(α² σ_E² + σ²)) per dimension."""
        variance, std = np.array([0.3, 1.0, 4.0, 0.05]), np.array([0.1, 0.5, 1.0, 0.2])
        data = gaussian(np.zeros(4), variance)
        mean = jnp.asarray(np.sqrt(variance - std**2), jnp.float32) * drawn(1, 4096, 4)
        posterior = Posterior(mean, jnp.broadcast_to(jnp.asarray(std, jnp.float32), mean.shape))
        z_clean = posterior.sample(key=jax.random.key(1))
        found = jax.jit(
            lambda z, encoder: estimate_rate(data.denoise, z, SCHEDULE, key=KEY, levels=8, encoder=encoder)
        )(z_clean, posterior.nats(5.0))
        exact = 0.5 * np.log((1 + variance * np.exp(5)) / (1 + std**2 * np.exp(5))).sum()
        # The terminal KL measures z_1 against N(0, I), which it is but for its variance: α² s² + σ² at λ = −10.
        alpha_2 = 1 / (1 + np.exp(10))
        marginal = alpha_2 * variance + 1 - alpha_2
        aggregate = 0.5 * np.sum(marginal - 1 - np.log(marginal))
        assert_mean(found.rate, exact + aggregate)
        without = estimate_rate(data.denoise, z_clean[:2], SCHEDULE, key=KEY, levels=2)
        np.testing.assert_array_equal(without.encoder, [0, 0])

    def test_loss_is_a_sum_over_dimensions_and_never_positive(self):
        std = jnp.asarray([[[0.0, 0.1], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
        expected = -0.5 * np.log1p(np.array([0.0, 0.01, 1.0, 4.0]) * np.exp(5.0)).sum()
        np.testing.assert_allclose(losses.encoder_loss(std, 5.0), [expected, 0.0], rtol=1e-6)
        levels = jnp.asarray([5.0, 1.0])
        both = losses.encoder_loss(jnp.stack([std[0], std[0]]), levels)
        lower = -0.5 * np.log1p(np.array([0.0, 0.01, 1.0, 4.0]) * np.exp(1.0)).sum()
        np.testing.assert_allclose(both, [expected, lower], rtol=1e-6)

    def test_sample_and_noise_have_their_moments(self):
        """64 × 1024 values: the standard error of a mean is std/256, of a standard deviation std/362."""
        posterior = Posterior(jnp.full((64, 1024), 2.0), jnp.full((64, 1024), 0.5))
        z_clean = posterior.sample(key=KEY)
        z_0 = posterior.z_0(SCHEDULE, key=KEY)
        assert float(z_clean.mean()) == pytest.approx(2.0, abs=4 * 0.5 / 256)
        assert float(z_clean.std()) == pytest.approx(0.5, abs=4 * 0.5 / 362)
        alpha_2 = 1 / (1 + np.exp(-5))
        std = np.sqrt(alpha_2 * 0.25 + 1 - alpha_2)
        assert float(z_0.mean()) == pytest.approx(2 * np.sqrt(alpha_2), abs=4 * std / 256)
        assert float(z_0.std()) == pytest.approx(std, abs=4 * std / 362)
        np.testing.assert_array_equal(dataclasses.replace(posterior, std=None).sample(key=KEY), posterior.mean)


class TestStandardNormal:
    prior = StandardNormal((3, 2))

    @pytest.mark.parametrize("schedule", [SCHEDULE, schedules.cosine(10.0, -7.0)], ids=str)
    def test_closed_form_is_what_its_denoiser_measures(self, schedule):
        """ẑ = α z_t is exact for N(0, I), so L_z is KL[q(z_0|x) ‖ N(0, I)] itself, for every single example."""
        z_clean = drawn(1, 4, 3, 2) * jnp.asarray([0.1, 1.0, 3.0, 0.5])[:, None, None]
        closed = self.prior.prior_terms(z_clean, schedule, key=KEY)
        alpha_2 = 1 / (1 + np.exp(-schedule.logsnr_max))
        z = np.asarray(z_clean, np.float64)
        kl = 0.5 * np.sum(alpha_2 * z**2 + (1 - alpha_2) - 1 - np.log(1 - alpha_2), axis=(1, 2))
        np.testing.assert_allclose(closed.total, kl, rtol=1e-5)
        np.testing.assert_allclose(closed.terminal, losses.terminal_kl(z_clean, schedule.logsnr_min))
        estimate = jax.jit(
            lambda z: estimate_rate(self.prior.given(), z, schedule, key=KEY, levels=16, replicates=256)
        )(z_clean)
        nats = estimate.diffusion.samples.sum(axis=2) + estimate.terminal[:, None]
        for example, exact in zip(np.asarray(nats), kl, strict=True):
            assert_mean(example, exact)

    def test_refuses_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="without classes"):
            self.prior.given(Conditions(jnp.zeros(2, jnp.int32)))
        with pytest.raises(ValueError, match="no weighting"):
            self.prior.prior_terms(drawn(0, 2, 3, 2), SCHEDULE, TruncatedLogistic(0.0, 5.0, -10.0), key=KEY)

    @pytest.mark.parametrize("std", [None, 0.3])
    def test_normal_rate_is_the_kl_of_two_gaussians(self, std):
        mean = drawn(2, 2, 5)
        posterior = Posterior(mean, None if std is None else jnp.full(mean.shape, std))
        alpha_2 = 1 / (1 + np.exp(-5))
        variance = alpha_2 * (std or 0.0) ** 2 + 1 - alpha_2
        mu = np.sqrt(alpha_2) * np.asarray(mean, np.float64)
        expected = 0.5 * np.sum(mu**2 + variance - 1 - np.log(variance), axis=1)
        np.testing.assert_allclose(posterior.normal_rate(5.0), expected, rtol=1e-5)


class TestTruncatedLogistic:
    """App. B, 2: drawing the base model's maximum log-SNR is weighting its ELBO."""

    law = TruncatedLogistic(1.0, 5.0, -7.0)

    def test_is_the_logistic_s_survival_function_between_its_ends(self):
        logsnr = np.linspace(-7, 5, 25)
        sf = stats.logistic(loc=1.0).sf
        expected = (sf(logsnr) - sf(5)) / (sf(-7) - sf(5))
        np.testing.assert_allclose(self.law(jnp.asarray(logsnr, jnp.float32)), expected, atol=1e-6)
        wide = TruncatedLogistic(1.0, 40.0, -40.0)
        np.testing.assert_allclose(wide(jnp.asarray(logsnr, jnp.float32)), sf(logsnr), atol=1e-6)

    def test_samples_follow_it(self):
        """Kolmogorov–Smirnov against the truncated law, at a level of 1 in 1000 for this one seed."""
        found = np.asarray(self.law.sample(KEY, 4000))
        assert found.min() >= -7
        assert found.max() <= 5
        cdf = lambda logsnr: 1 - np.asarray(self.law(jnp.asarray(logsnr, jnp.float32)))  # noqa: E731
        assert stats.kstest(found, cdf).pvalue > 1e-3

    def test_drawn_ends_and_weights_are_one_loss(self):
        """Unweighted nats of the levels below a drawn λ_0, on average, against the weighted nats of them all."""
        size = 8192
        data = gaussian(np.zeros(2), np.array([1.0, 0.2]))
        schedule = schedules.linear(5.0, -7.0)
        x, t = data.draw(1, size), losses.sample_t(jax.random.key(1), size)
        nats = losses.diffusion_loss(data.denoise, x, schedule, key=KEY, t=t)
        logsnr_0 = self.law.sample(jax.random.key(2), size)
        drawn_ends = np.where(schedule(t) <= logsnr_0, nats, 0.0)
        weighted = losses.prior_loss(data.denoise, x, schedule, self.law, key=KEY, t=t).diffusion
        difference = drawn_ends - np.asarray(weighted)
        assert abs(difference.mean()) < 3 * difference.std(ddof=1) / np.sqrt(size)
        # Both are a fair part of the whole, so that the comparison says something.
        assert 0.1 < float(weighted.mean() / nats.mean()) < 0.9

    def test_z_0_is_as_noisy_as_it_was_drawn(self):
        z_clean = drawn(3, 4, 1000)
        levels = jnp.asarray([5.0, 0.0, -3.0, -7.0])
        z_0 = losses.add_noise(z_clean, SCHEDULE, key=KEY, logsnr_0=levels)
        noise = z_0 - diffusion.alpha(levels)[:, None] * z_clean
        np.testing.assert_allclose(noise.std(axis=1), diffusion.sigma(levels), rtol=0.1)  # its own error is 2 %
