import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    Product,
    alpha_sigma,
    assert_mean,
    denoise_coordinates,
    gaussian,
    gaussian_nats,
    mixture_1d,
    points,
)

from ulx import losses, schedules
from ulx.bound import Bound, DiffusionEstimate, Mean, estimate_decoder, estimate_rate
from ulx.losses import PriorTerms
from ulx.time_sampling import antithetic, independent, low_discrepancy, proposal_from_levels, stratified

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

    @pytest.mark.parametrize("name", ["levels", "draws", "replicates"])
    def test_refuses_none(self, name):
        none: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=rf"{name} must be at least 1, got 0"):
            estimate_rate(GAUSSIAN.denoise, GAUSSIAN.draw(0, 2), LINEAR, key=jax.random.key(0), **none)

    def test_another_denoiser_has_its_own_rate(self):
        """Here one that takes the latent for wider than it is: more nats, each noise level's from its own error."""
        z_clean, variance, wider = gaussian([0.0, 0.0], [0.5, 0.5]).draw(0, 2048), 0.5, 3.0
        nodes, weights = np.polynomial.legendre.leggauss(64)
        alpha, sigma = alpha_sigma(-2.5 + 7.5 * nodes)
        gain = alpha * wider / (alpha**2 * wider + sigma**2)
        error = (1 - gain * alpha) ** 2 * variance + gain**2 * sigma**2
        nats = 2 * 7.5 * np.sum(weights * 0.5 * alpha**2 / sigma**2 * error)
        estimate = rate_of(gaussian([0.0, 0.0], [wider, wider]), z_clean, KEYS, LINEAR, 16)
        assert_mean(estimate.diffusion.total, nats)
        assert nats > 1.05 * gaussian_nats(np.array([0.5, 0.5]), 5.0, -10.0)

    def test_decoder_is_unweighted_and_without_the_terminal_kl(self):
        """It ends at λ = −2 here, where x's terminal KL would be 0.6 nats."""
        x, schedule = GAUSSIAN.draw(0, 2048), schedules.linear(8.0, -2.0)
        estimate = jax.jit(lambda x: estimate_decoder(GAUSSIAN.denoise, x, schedule, key=KEYS))(x)
        assert_mean(estimate.total, gaussian_nats(GAUSSIAN.variances[0], 8.0, -2.0))
        assert losses.terminal_kl(x, -2.0).mean() > 0.5


COMPONENTS = 3
DATA = {
    "gaussian": Product(gaussian([0.0], [2.0]), 16),
    "mixture": Product(MIXTURE, 16),
    "points": Product(POINTS, 16),
}
SCHEDULES = {
    "linear": LINEAR,
    "cosine": COSINE,
    "shifted": schedules.cosine(8.0, -7.0).shifted(-3.0),
}
ESTIMATORS = {
    "independent": (independent, False),
    "stratified": (stratified, False),
    "antithetic": (antithetic, False),
    "low_discrepancy": (low_discrepancy, False),
    "importance": (independent, True),
}


def estimate_untraced(parameters, z_clean, key, schedule, placement, proposal=None, draws=16, replicates=8):
    return estimate_rate(
        denoise_coordinates(parameters),
        z_clean,
        schedule,
        key=key,
        draws=draws,
        replicates=replicates,
        placement=placement,
        proposal=proposal,
    )


estimate = jax.jit(estimate_untraced, static_argnames=("schedule", "placement"))


@functools.cache
def by_estimator(name, kind, schedule_name):
    """128 examples, 16 draws each, 8 replicates. The proposal is learned from other examples with other noise."""
    placement, learned = ESTIMATORS[name]
    data, schedule = DATA[kind], SCHEDULES[schedule_name]
    parameters, proposal = data.parameters(COMPONENTS), None
    if learned:
        pilot = estimate(parameters, data.draw(1, 128), jax.random.key(7), schedule, stratified)
        proposal = pilot.diffusion.proposal()
    return estimate(parameters, data.draw(0, 128), jax.random.key(3), schedule, placement, proposal)


def noise_of(found):
    """The standard deviation of an example's estimate about its own expectation, pooled over examples."""
    return np.sqrt(np.var(found.diffusion.samples.sum(axis=2), axis=1, ddof=1).mean())


class TestEstimators:
    """Every estimator on every schedule: unbiased, and honest about its error."""

    @pytest.mark.parametrize("name", ESTIMATORS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_rate_of_exact_denoisers(self, name, schedule):
        for kind, data in DATA.items():
            found = by_estimator(name, kind, schedule)
            exact, mean = data.bound(5.0, -10.0), found.mean
            assert float(mean.value) == pytest.approx(exact, abs=3 * float(mean.standard_error))
            assert float(mean.standard_error) < 0.05 * exact  # so that this says something
            np.testing.assert_allclose(mean.value, found.rate.mean(), rtol=1e-5)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_importance_sampling_halves_the_error(self, schedule):
        """At equal cost, of L_z of given examples. Points are hard: rare draws hold much of their variance."""
        for kind, least in (("gaussian", 2.0), ("mixture", 2.0), ("points", 1.2)):
            noise = {name: noise_of(by_estimator(name, kind, schedule)) for name in ESTIMATORS}
            assert noise["independent"] > least * noise["importance"]
            assert noise["independent"] > 1.02 * noise["stratified"]

    @pytest.mark.parametrize(
        ("placement", "learned"), [(antithetic, False), (low_discrepancy, False), (stratified, True)]
    )
    def test_errors_are_honest(self, placement, learned):
        """The mean squared error that is claimed is the variance over 512 repetitions, with new data and with the same.

        15 examples with two draws each, in so many dimensions that the noise level decides the loss: where they share a
        shift, their spread then says nothing of the error of their mean.
        """
        data = Product(gaussian([0.0], [2.0]), 16)
        parameters = data.parameters(COMPONENTS)
        proposal = proposal_from_levels([5.0, 0.0, -10.0], [8.0, 2.0]) if learned else None

        def run(z_clean, key):
            return estimate_untraced(parameters, z_clean, key, LINEAR, placement, proposal, draws=2, replicates=24).mean

        z_clean, keys = data.draw(0, 512 * 15).reshape(512, 15, 16), jax.random.split(jax.random.key(0), 512)
        repeat = jax.jit(jax.vmap(run))
        new = repeat(z_clean, keys)
        same = repeat(jnp.broadcast_to(z_clean[:1], z_clean.shape), keys)
        assert_mean(new.value, data.bound(5.0, -10.0))
        # A variance from 512 values is known to 6 % (more with heavy tails), the mean of the claimed ones better.
        assert np.mean(new.standard_error**2) == pytest.approx(np.var(new.value, ddof=1), rel=0.25)
        assert np.mean(same.estimator_error**2) == pytest.approx(np.var(same.value, ddof=1), rel=0.25)

    def test_an_error_needs_replicates(self):
        with pytest.raises(ValueError, match=r"two independent replicates, got 4 and 1"):
            Mean.of(jnp.ones((4, 1)))

    def test_mean_by_hand(self):
        """Replicates' means 4 and 6, examples' means 2.5 and 7.5, and ±0.5 that neither explains."""
        found = Mean.of(jnp.array([[1.0, 4.0], [7.0, 8.0]]))
        noise, spread = 2 / 2, 12.5 - 4 * 0.5**2 / 2
        assert float(found.value) == 5
        assert float(found.estimator_error) == pytest.approx(math.sqrt(noise))
        assert float(found.standard_error) == pytest.approx(math.sqrt(spread / 2 + noise))

    def test_proposal_is_learned_from_second_moments(self):
        samples = jnp.array([[[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], [[4.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
        found = DiffusionEstimate(samples, schedules.linear(5.0, -10.0)).proposal(uniform_share=0.3)
        rms = np.sqrt([5.0, 1.0, 1.0])
        np.testing.assert_allclose(found.mass, 0.7 * rms / rms.sum() + 0.1, rtol=1e-6)
        np.testing.assert_allclose(found.logsnr_edges, [5.0, 0.0, -5.0, -10.0], atol=1e-6)


def test_bound_adds_its_terms():
    bound = Bound(
        prior=PriorTerms(diffusion=jnp.array([1.0, 2.0]), terminal=jnp.array([0.5, 0.25])),
        encoder=jnp.array([-0.5, -1.0]),
        decoder=jnp.array([10.0, 20.0]),
    )
    np.testing.assert_array_equal(bound.rate, [1.0, 1.25])
    np.testing.assert_array_equal(bound.total, [11.0, 21.25])
    assert len(jax.tree.leaves(bound)) == 4  # a pytree: it comes out of a jitted step and averages leaf by leaf
