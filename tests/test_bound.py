import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import alpha_sigma, assert_mean, gaussian, gaussian_nats, mixture_1d, points

from ulx import losses, schedules
from ulx.bound import Bound, estimate_rate
from ulx.losses import PriorTerms

LINEAR = schedules.linear(5.0, -10.0)
COSINE = schedules.cosine(5.0, -10.0)
KEYS = jax.random.split(jax.random.key(1), 2048)
MIXTURE = mixture_1d([0.3, 0.7], [-1.0, 0.8], [0.05, 0.2])
POINTS = points([[-1.0], [0.2], [1.1]])
GAUSSIAN = gaussian(np.array([[0.5, -1.0], [0.0, 2.0]]), np.array([[0.3, 1.0], [4.0, 0.05]]))


@functools.partial(jax.jit, static_argnames=("data", "schedule", "levels"))
def rate_of(data, z_clean, keys, schedule, levels):
    return estimate_rate(data.denoise, z_clean, schedule, key=keys, levels=levels)


class TestOracles:
    """The reference values agree with each other, by roads that share no formula."""

    @pytest.mark.parametrize("data", [MIXTURE, POINTS, gaussian([0.0], [4.0])], ids=["mixture", "points", "gaussian"])
    def test_integral_of_the_error_is_the_information(self, data):
        """I-MMSE: ∫ ½ e^λ mmse(λ) dλ = I(λ max) − I(λ min), and with the terminal KL, rate + KL[q(z_1) ‖ N(0, I)]."""
        nodes, weights = np.polynomial.legendre.leggauss(64)
        logsnr = -2.5 + 7.5 * nodes
        integral = 7.5 * np.sum(weights * 0.5 * np.exp(logsnr) * [data.mmse(level) for level in logsnr])
        # 1e-8: what two quadratures in float64 reach.
        assert integral == pytest.approx(data.information(5.0) - data.information(-10.0), abs=1e-8)
        for end in (-10.0, 0.0):
            alpha, sigma = alpha_sigma(end)
            terminal = 0.5 * (alpha**2 * data.second_moment() + sigma**2 - 1 - np.log(sigma**2))
            assert terminal - data.information(end) == pytest.approx(data.kl_to_standard(end), abs=1e-8)

    @pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
    def test_gaussian_closed_forms(self, variance):
        data, z_t = gaussian([0.0], [variance]), jnp.linspace(-3.0, 3.0, 5)[:, None]
        alpha, sigma = alpha_sigma(1.5)
        best = alpha * variance * z_t / (alpha**2 * variance + sigma**2)
        np.testing.assert_allclose(data.denoise(z_t, jnp.full(5, 1.5)), best, rtol=1e-5)  # float32
        assert data.mmse(1.5) == pytest.approx(variance / (1 + variance * math.exp(1.5)), abs=1e-8)
        assert data.information(1.5) == pytest.approx(0.5 * math.log1p(variance * math.exp(1.5)), abs=1e-8)
        # The probability flow of a Gaussian rescales it.
        late, early = (np.sqrt(a**2 * variance + s**2) for a, s in (alpha_sigma(-4.0), alpha_sigma(2.0)))
        z = np.linspace(-3, 3, 7) * late
        np.testing.assert_allclose(data.flow(z, -4.0, 2.0), z * early / late, atol=1e-8)

    def test_points_posterior_is_a_softmax(self):
        corners = np.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0], [0.3, 0.3]])
        z_t, logsnr = np.array([[0.2, 0.1], [-1.5, 2.0]]), np.array([0.0, 2.0])
        alpha, sigma = (values[:, None] for values in alpha_sigma(logsnr))
        logits = -np.sum((z_t[:, None] - alpha[..., None] * corners) ** 2, axis=2) / (2 * sigma**2)
        posterior = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        x_hat = points(corners).denoise(jnp.asarray(z_t, jnp.float32), jnp.asarray(logsnr, jnp.float32))
        np.testing.assert_allclose(x_hat, posterior @ corners, atol=2e-6)  # float32

    @pytest.mark.parametrize("logsnr", [-5.0, 0.0, 5.0, 12.0])
    def test_k_points_hold_at_most_log_k(self, logsnr):
        assert 0 < POINTS.information(logsnr) <= math.log(3) + 1e-12
        if logsnr == 12.0:  # told apart entirely
            assert POINTS.information(logsnr) == pytest.approx(math.log(3), abs=1e-8)


class TestRate:
    """Estimates against closed forms and quadrature, within 3 standard errors of independent examples."""

    @pytest.mark.parametrize("levels", [1, 16])
    def test_gaussian(self, levels):
        z_clean, variance = GAUSSIAN.draw(0, 2048), GAUSSIAN.variances[0]
        estimate = rate_of(GAUSSIAN, z_clean, KEYS, COSINE, levels)
        # All of L_z: the rate, and KL[q(z_1) ‖ N(0, I)], under 1e-4 nats at λ = −10.
        assert_mean(estimate.rate, 0.5 * np.sum(np.log1p(variance * math.exp(5))))
        np.testing.assert_allclose(estimate.terminal, losses.terminal_kl(z_clean, -10.0), rtol=1e-6)
        np.testing.assert_allclose(estimate.rate, estimate.by_level.sum(axis=1) + estimate.terminal, rtol=1e-5)

        # Every slice of t holds its own nats.
        edges = np.asarray(estimate.logsnr_edges, np.float64)
        np.testing.assert_allclose(edges, COSINE(jnp.linspace(0.0, 1.0, levels + 1)), atol=1e-5)
        assert np.all(np.diff(edges) < 0)
        for level in range(levels):
            expected = gaussian_nats(variance, edges[level], edges[level + 1])
            # With 17 such comparisons 3.5 standard errors keep the joint chance of failing under 1 %.
            assert_mean(estimate.by_level[:, level], expected, standard_errors=3.5)

    @pytest.mark.parametrize(("data", "logsnr_min"), [(POINTS, -10.0), (MIXTURE, 0.0)], ids=["points", "mixture"])
    def test_one_dimension_against_quadrature(self, data, logsnr_min):
        estimate = rate_of(data, data.draw(0, 2048), KEYS, schedules.linear(5.0, logsnr_min), 16)
        # At λ_z(1) = 0 the aggregate z_1 is not normal: the bound is loose by its KL, 0.06 nats.
        assert_mean(estimate.rate, data.information(5.0) + data.kl_to_standard(logsnr_min))

    def test_more_levels_leave_less_variance(self):
        z_clean = GAUSSIAN.draw(0, 2048)
        few, many = (np.asarray(rate_of(GAUSSIAN, z_clean, KEYS, COSINE, levels).rate).std() for levels in (1, 16))
        assert many < few / 4  # 16 independent draws would do 1/4; one in every slice does better

    def test_an_example_does_not_depend_on_its_batch(self):
        z_clean = GAUSSIAN.draw(0, 2048)
        once = np.asarray(rate_of(GAUSSIAN, z_clean, KEYS, COSINE, 16).by_level)
        assert len(np.unique(once)) > 0.99 * once.size  # every example and level draws its own (float32 has few ties)
        # The last two again, elsewhere, in a batch whose other examples have other keys.
        keys = jax.random.split(jax.random.key(2), 2048).at[:2].set(KEYS[-2:])
        again = rate_of(GAUSSIAN, jnp.roll(z_clean, 2, axis=0), keys, COSINE, 16).by_level
        np.testing.assert_allclose(again[:2], once[-2:], rtol=1e-6)
        assert np.mean(np.abs(again[2:] / once[:-2] - 1) > 1e-3) > 0.9

    def test_the_denoiser_is_told_that_nobody_trains(self):
        def denoise(z_t, logsnr, *, key=None):
            assert key is None  # no dropout when evaluating
            return z_t

        jax.eval_shape(lambda key: estimate_rate(denoise, jnp.ones((2, 3)), LINEAR, key=key).rate, jax.random.key(0))

    def test_refuses_no_levels(self):
        with pytest.raises(ValueError, match=r"levels.*0"):
            estimate_rate(GAUSSIAN.denoise, GAUSSIAN.draw(0, 2), LINEAR, key=jax.random.key(0), levels=0)


def test_bound_adds_its_terms():
    bound = Bound(
        prior=PriorTerms(diffusion=jnp.array([1.0, 2.0]), terminal=jnp.array([0.5, 0.25])),
        decoder=jnp.array([10.0, 20.0]),
    )
    np.testing.assert_array_equal(bound.rate, [1.5, 2.25])
    np.testing.assert_array_equal(bound.total, [11.5, 22.25])
    assert len(jax.tree.leaves(bound)) == 3  # a pytree: it comes out of a jitted step and averages leaf by leaf
