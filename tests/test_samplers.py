import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from oracles import alpha_sigma, gaussian, mixture_1d
from scipy.special import ndtri

from ulx import guidance, samplers, solvers

MIXTURE = mixture_1d([0.4, 0.6], [-1.0, 0.8], [0.1, 0.2])
STOCHASTIC = [("ancestral", 0.0), ("euler", 1.0), ("heun", 0.6)]
"""Solver and churn."""


def grid_to(logsnr_max, num_steps=8, logsnr_min=-10.0):
    return samplers.logsnr_grid(num_steps, logsnr_min=logsnr_min, logsnr_max=logsnr_max)


# Compiled once for a denoiser, a solver and a number of steps.
sample = jax.jit(samplers.sample, static_argnames=("denoise", "solver", "churn", "tolerance"))


def standard_normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Recorder:
    """Wraps a denoiser and notes, while the compiled solver runs, the λ and the number of rows of every call."""

    def __init__(self, denoise):
        self.denoise, self.logsnr, self.rows = denoise, [], []

    def __call__(self, z_t, logsnr, *, key=None):
        jax.debug.callback(self._note, logsnr, ordered=True)
        return self.denoise(z_t, logsnr)

    def _note(self, logsnr):
        self.logsnr.append(float(logsnr[0]))
        self.rows.append(logsnr.shape[0])


class TestGrid:
    def test_climbs_evenly_from_noise_to_data(self):
        grid = samplers.logsnr_grid(6, logsnr_min=-10.0, logsnr_max=5.0)
        np.testing.assert_allclose(grid, [-10.0, -7.5, -5.0, -2.5, 0.0, 2.5, 5.0], atol=1e-6)

    @pytest.mark.parametrize("inverse_rho", [1 / 7, 1.0, -0.3, 1e-9])
    def test_is_even_in_the_noise_to_that_power(self, inverse_rho):
        """EDM, Eq. 5, in s = σ/α = exp(−λ/2), in float32."""
        grid = samplers.logsnr_grid(6, logsnr_min=-10.0, logsnr_max=5.0, inverse_rho=inverse_rho)
        begin, end = math.exp(5.0) ** inverse_rho, math.exp(-2.5) ** inverse_rho
        s = [(begin + i / 6 * (end - begin)) ** (1 / inverse_rho) for i in range(7)]
        expected = np.linspace(-10, 5, 7) if inverse_rho == 1e-9 else -2 * np.log(s)
        np.testing.assert_allclose(grid, expected, rtol=1e-5, atol=1e-4)
        assert (grid[0], grid[-1]) == (-10, 5)

    @pytest.mark.parametrize("inverse_rho", [1.1, -2, math.nan])
    def test_refuses_a_spacing_it_cannot_keep(self, inverse_rho):
        with pytest.raises(ValueError, match="from -1 to 1"):
            samplers.logsnr_grid(6, logsnr_min=-10.0, logsnr_max=5.0, inverse_rho=inverse_rho)

    @pytest.mark.parametrize("num_steps", [0, -3])
    def test_refuses_no_steps(self, num_steps):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
            samplers.logsnr_grid(num_steps, logsnr_min=-10.0, logsnr_max=5.0)

    @pytest.mark.parametrize("ends", [(5.0, -10.0), (5.0, 5.0), (math.nan, 5.0)])
    def test_refuses_ends_out_of_order(self, ends):
        with pytest.raises(ValueError, match=f"{ends[0]} and {ends[1]}"):
            samplers.logsnr_grid(4, logsnr_min=ends[0], logsnr_max=ends[1])


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "tsit5"])
def test_stops_at_the_grid_s_last_noise_level(solver):
    """Paper §2, trap 6: z at λ_z(0) keeps its noise and its α.

    For data that is one point the flow is a straight line in u over s, which each step follows exactly: the noise that
    z_1 began with is the noise that z_0 has, in another amount. (Tsit5 goes over λ and has its tolerance.)
    """
    point, noise = jnp.array([[0.7, -1.2], [0.0, 2.0]]), standard_normal((16, 2, 1, 2))
    (alpha, sigma), (begin_alpha, begin_sigma) = alpha_sigma(5.0), alpha_sigma(-10.0)
    mean = np.broadcast_to(np.asarray(point)[:, None, :], noise.shape)
    denoise = lambda z_t, logsnr, key=None: jnp.asarray(mean)  # noqa: E731
    result = samplers.sample(denoise, noise, grid_to(5.0), solver, tolerance=1e-5)
    eps = (np.asarray(noise) - begin_alpha * mean) / begin_sigma
    # u is 150 large at the start, so that float32 leaves some 150 · 6e-8 in it at every step.
    np.testing.assert_allclose(result.z, alpha * mean + sigma * eps, atol=1e-4)
    assert np.std(np.asarray(result.z) - alpha * mean) == pytest.approx(0.082, abs=0.01)


def test_euler_is_ddim():
    grid, noise = grid_to(5.0, num_steps=12), standard_normal((32, 1))
    z = noise
    for now, later in itertools.pairwise(np.asarray(grid)):
        (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma(now), alpha_sigma(later)
        x_hat = MIXTURE.denoise(z, jnp.full(32, now))
        z = next_alpha * x_hat + next_sigma * (z - alpha * x_hat) / sigma
    result = sample(MIXTURE.denoise, noise, grid, "euler")
    # Float32: u begins 150 times larger than z, and near the modes' boundary roundings grow a few times.
    np.testing.assert_allclose(result.z, z, atol=1e-4)


def test_multistep_is_dpm_solver_pp_2m():
    """Lu et al. 2022, Alg. 2, in α, σ and their half log-SNR, on a grid of uneven steps."""
    logsnrs = np.array([-8.0, -5.0, -4.5, -2.0, 0.5, 1.0, 4.0])
    noise = ndtri(np.linspace(0.02, 0.98, 25))[:, None]
    half, (alpha, sigma) = logsnrs / 2, alpha_sigma(logsnrs)
    with jax.enable_x64(True):
        z, x_hats = noise, []
        for i in range(1, len(logsnrs)):
            x_hats.append(np.asarray(MIXTURE.denoise(jnp.asarray(z), jnp.full(25, logsnrs[i - 1]))))
            h, estimate = half[i] - half[i - 1], x_hats[-1]
            if i > 1:
                r = (half[i - 1] - half[i - 2]) / h
                estimate = (1 + 1 / (2 * r)) * x_hats[-1] - 1 / (2 * r) * x_hats[-2]
            z = sigma[i] / sigma[i - 1] * z - alpha[i] * np.expm1(-h) * estimate
        result = sample(MIXTURE.denoise, jnp.asarray(noise), jnp.asarray(logsnrs), "dpmpp_2m")
    np.testing.assert_allclose(result.z, z, atol=1e-12)  # float64, u up to 100


GAUSSIAN = gaussian(np.array([0.5, -1.0, 0.0]), np.array([0.3, 1.0, 0.01]))


@pytest.mark.parametrize("logsnr_max", [0.0, 5.0])
def test_heun_follows_the_exact_flow(logsnr_max):
    """A Gaussian with its own mean and variance in every dimension: the flow rescales about α·mean."""
    (mean,), (variance,) = GAUSSIAN.means, GAUSSIAN.variances
    noise = standard_normal((64, 3))
    result = sample(GAUSSIAN.denoise, noise, grid_to(logsnr_max, num_steps=128), "heun")
    (alpha, sigma), (begin_alpha, begin_sigma) = alpha_sigma(logsnr_max), alpha_sigma(-10.0)
    ratio = np.sqrt((alpha**2 * variance + sigma**2) / (begin_alpha**2 * variance + begin_sigma**2))
    expected = alpha * mean + ratio * (np.asarray(noise) - begin_alpha * mean)
    # Heun's own error at 128 steps is 3e-4 |z|; dividing by α(5) would make one of 3e-3 |z|.
    np.testing.assert_allclose(result.z, expected, atol=1.2e-3)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order):
    """On a 1-D mixture the flow keeps quantiles, which gives the exact end point of every sample without a solver."""
    noise = ndtri(np.linspace(0.02, 0.98, 25))
    exact = MIXTURE.flow(noise, -6.0, 4.0)
    errors = []
    with jax.enable_x64(True):
        for steps in (32, 128):
            z = sample(MIXTURE.denoise, jnp.asarray(noise)[:, None], grid_to(4.0, steps, logsnr_min=-6.0), solver).z
            assert z.dtype == jnp.float64
            errors.append(np.sqrt(np.mean((np.asarray(z)[:, 0] - exact) ** 2)))
    measured = math.log(errors[0] / errors[1]) / math.log(4)
    assert measured == pytest.approx(order, abs=0.15)  # the next order's term at these step sizes


def test_tsit5_keeps_its_tolerance_for_every_example_and_counts_what_it_tried():
    """One example at the edge between the modes, where the flow bends most, among 99 that are easy."""
    noise = np.append(np.linspace(1.0, 2.0, 99), ndtri(0.41))
    exact = MIXTURE.flow(noise, -10.0, 5.0)
    errors, calls = [], []
    with jax.enable_x64(True):
        for tolerance in (1e-3, 1e-6):
            recorder = Recorder(MIXTURE.denoise)
            result = sample(recorder, jnp.asarray(noise)[:, None], grid_to(5.0, 1), "tsit5", tolerance=tolerance)
            jax.effects_barrier()
            errors.append(np.abs(np.asarray(result.z)[:, 0] - exact).max())
            calls.append(len(recorder.logsnr))
            assert int(result.nfe) == calls[-1]
            assert min(recorder.logsnr) == pytest.approx(-10.0)
            assert max(recorder.logsnr) == pytest.approx(5.0)
    # Errors of some ten steps add up, and the flow between the modes stretches them a few times.
    assert errors[0] < 1e-2
    assert errors[1] < 1e-5
    # A fifth-order method needs 1000^(1/5) = 4 times the steps for a thousandth of the error.
    assert calls[1] < 5 * calls[0]


class TestStochastic:
    """Ancestral sampling, and the reverse SDE of churn."""

    def law(self, monkeypatch, solver, churn, variance, grid):
        """The variance of z at the end for data N(0, variance) and z_1 with its exact marginal, without drawing.

        The sampler is then linear in z_1 and in its noises, so that the response to each alone gives the law: example
        j gets noise at step j and nowhere else, the last example a z_1.
        """
        size = len(grid)
        impulse = lambda keys, step, like: (jnp.arange(size) == step).astype(like.dtype)[:, None]  # noqa: E731
        monkeypatch.setattr(solvers, "_noise", impulse)
        start = jnp.zeros((size, 1)).at[-1].set(_marginal_deviation(variance, float(grid[0])))
        denoise = gaussian(np.zeros(1), np.array([variance])).denoise
        result = jax.jit(lambda: samplers.sample(denoise, start, grid, solver, churn=churn, key=jax.random.key(0)))()
        return float(jnp.sum(result.z**2))

    @pytest.mark.parametrize(("solver", "churn"), STOCHASTIC)
    def test_law_on_gaussian_data(self, monkeypatch, solver, churn):
        """Against the recursion of the variance, written in u = z/α over s = σ/α; six uneven steps, float64."""
        logsnrs, v = np.array([-6.0, -4.0, -3.5, -1.0, 0.5, 3.0, 4.0]), 0.3
        s = np.exp(-logsnrs / 2)
        expected = v + s[0] ** 2
        for i, (now, then) in enumerate(itertools.pairwise(s)):
            gain = lambda s: v / (v + s**2)  # x̂ = gain · u  # noqa: E731
            if solver == "ancestral":
                shrink = gain(now) + (then / now) ** 2 * (1 - gain(now))
                expected = shrink**2 * expected + then**2 * (1 - then**2 / now**2)
                continue
            hat = min(np.exp(-(logsnrs[i] - churn * (logsnrs[i + 1] - logsnrs[i])) / 2), s[0])
            slope = (1 - gain(hat)) / hat
            shrink = 1 + (then - hat) * slope
            if solver == "heun":
                shrink = 1 + (then - hat) * 0.5 * (slope + shrink * (1 - gain(then)) / then)
            expected = shrink**2 * (expected + hat**2 - now**2)
        with jax.enable_x64(True):
            found = self.law(monkeypatch, solver, churn, v, jnp.asarray(logsnrs))
        alpha, _ = alpha_sigma(4.0)
        assert found == pytest.approx(alpha**2 * expected, rel=1e-12)

    @pytest.mark.parametrize(("solver", "churn", "order"), [("ancestral", 0.0, 1), ("euler", 1.0, 1), ("heun", 1.0, 2)])
    def test_weak_order(self, monkeypatch, solver, churn, order):
        """The variance at the end tends to that of the exact marginal. Its error is without sampling noise, float64."""
        errors = []
        with jax.enable_x64(True):
            for steps in (64, 256):
                found = self.law(monkeypatch, solver, churn, 0.3, grid_to(4.0, steps, logsnr_min=-6.0))
                errors.append(abs(found - _marginal_deviation(0.3, 4.0) ** 2))
        measured = math.log(errors[0] / errors[1]) / math.log(4)
        assert measured == pytest.approx(order, abs=0.15)  # the next order's term at these step sizes

    @pytest.mark.parametrize(("solver", "churn"), [STOCHASTIC[0], STOCHASTIC[2]])
    def test_drawn_samples_have_that_law(self, solver, churn):
        """With noise as it is drawn. Data that is one point: every step is then exact, and z = α x + σ ε."""
        point = gaussian(np.array([0.7, -1.2]), np.zeros(2))
        keys = jax.random.split(jax.random.key(1), 20_000)
        noise = standard_normal((20_000, 2))
        result = sample(point.denoise, noise, grid_to(2.0), solver, churn=churn, key=keys)
        alpha, sigma = alpha_sigma(2.0)
        eps = (np.asarray(result.z) - alpha * np.array([0.7, -1.2])) / sigma
        # Means and correlations of 20,000 are known to 0.007, variances to 0.01: 4 standard errors.
        assert np.abs(eps.mean(axis=0)).max() < 0.028
        assert np.abs(eps.var(axis=0) - 1).max() < 0.04
        assert abs(np.mean(eps[:, 0] * eps[:, 1])) < 0.028
        assert abs(np.mean(eps[1:] * eps[:-1])) < 0.028
        # Of z_1 is left what the steps pass on: all of it in an ODE, s'/s in the posterior, s'/ŝ after churn.
        if solver == "ancestral":
            passed_on = np.exp(-12.0 / 2)
        else:
            h = 12.0 / 8
            back = [min(churn * h, i * h) for i in range(8)]
            passed_on = np.exp(-sum(back) / 2)
        assert abs(np.mean(eps * np.asarray(noise)) - passed_on) < 0.028

    @pytest.mark.parametrize(("solver", "churn"), STOCHASTIC[:2])
    def test_an_example_s_noise_is_its_own(self, solver, churn):
        keys, noise = jax.random.split(jax.random.key(3), 5), standard_normal((5, 4))
        run = lambda rows: np.asarray(  # noqa: E731
            sample(GAUSSIAN_4.denoise, noise[rows[0]], grid_to(5.0), solver, churn=churn, key=keys[rows[1]]).z
        )
        order, others = np.arange(5), np.array([3, 1, 3, 0, 0])
        together = run((order, order))
        np.testing.assert_array_equal(run((others, others)), together[others])
        same_start = run((np.zeros(5, int), order))
        assert np.abs(same_start[0] - same_start[1:]).max(axis=1).min() > 0.1

    def test_churn_0_is_the_ode(self):
        key = jax.random.key(0)
        with jax.enable_x64(True):
            noise, grid = jnp.asarray(ndtri(np.linspace(0.02, 0.98, 25)))[:, None], grid_to(5.0)
            ode = sample(MIXTURE.denoise, noise, grid, "heun")  # which needs no key
            little = sample(MIXTURE.denoise, noise, grid, "heun", churn=1e-12, key=key)
            # Its noise is sqrt(churn · h) ~ 1e-6 of what the level has, eight times.
            np.testing.assert_allclose(little.z, ode.z, atol=1e-4)
            assert np.abs(little.z - ode.z).max() > 1e-8


def _marginal_deviation(variance, logsnr):
    alpha, sigma = alpha_sigma(logsnr)
    return math.sqrt(alpha**2 * variance + sigma**2)


GAUSSIAN_4 = gaussian(np.zeros(4), np.array([0.3, 1.0, 0.1, 2.0]))


@pytest.mark.parametrize(
    ("solver", "churn", "guided"),
    [
        ("euler", 1.5, True),
        ("heun", 0.0, True),
        ("heun", 0.5, False),
        ("dpmpp_2m", 0.0, False),
        ("ancestral", 0.0, False),
    ],
)
def test_network_calls_are_counted(solver, churn, guided):
    network, grid, batch = Recorder(lambda z_t, logsnr: 0.5 * z_t), grid_to(5.0, num_steps=5), 3
    denoise = guidance.classifier_free(network, 2.0) if guided else network
    result = samplers.sample(
        denoise, standard_normal((batch, 2)), grid, solver, churn=churn, key=jax.random.split(jax.random.key(0), batch)
    )
    jax.effects_barrier()
    assert sum(network.rows) == batch * int(result.nfe)
    # Every call is at the start of a step, moved by the churn, and, for Heun, at its end. None comes after.
    levels = np.asarray(grid)
    starts = np.maximum(levels[:-1] - churn * np.diff(levels), levels[0])
    expected = np.stack([starts, levels[1:]], axis=1).ravel() if solver == "heun" else starts
    np.testing.assert_allclose(network.logsnr, expected, atol=1e-4)  # λ comes back from s = exp(−λ/2), float32


def test_an_interval_s_calls_are_counted_where_they_are():
    """CFG for λ in [−4, 2], whose ends are points of the grid: guided at −4, −1 and 2, otherwise one network."""
    network = Recorder(lambda z_t, logsnr: 0.5 * z_t)
    denoise = guidance.within((-4.0, 2.0), guidance.classifier_free(network, 2.0), network)
    result = samplers.sample(denoise, standard_normal((3, 2)), grid_to(5.0, num_steps=5), "heun")
    jax.effects_barrier()
    assert network.rows == [3 * calls for calls in (1, 1, 1, 2, 2, 2, 2, 2, 2, 1)]
    assert int(result.nfe) == 16
    network.rows.clear()
    result = samplers.sample(denoise, standard_normal((3, 2)), grid_to(5.0, num_steps=1), "tsit5")
    jax.effects_barrier()
    assert sum(network.rows) == 3 * int(result.nfe)
    assert set(network.rows) == {3, 6}


def test_precision_is_that_of_the_noise_and_at_least_float32():
    with jax.enable_x64(True):
        for given, expected in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
            noise, grid = jnp.zeros((2, 1), given), grid_to(5.0)
            shape = jax.eval_shape(lambda: samplers.sample(MIXTURE.denoise, noise, grid, "heun"))  # noqa: B023
            assert shape.z.dtype == expected


def test_unknown_solver(monkeypatch):
    # Outside the tests nothing checks types, so that a name from a command line gets this far.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    solver: Any = "rk4"
    with pytest.raises(ValueError, match=r"'rk4'.*euler, heun"):
        samplers.sample(MIXTURE.denoise, jnp.zeros((2, 1)), grid_to(5.0), solver)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("dpmpp_2m", {"churn": 0.5}, "'dpmpp_2m' takes no churn, got churn=0.5: use euler or heun, or churn 0"),
        ("heun", {"churn": -1.0}, r"churn must be a finite number from 0 \(the ODE\) up, got -1.0"),
        ("tsit5", {"tolerance": math.nan}, "tolerance=nan is less than float32 can keep"),
        ("tsit5", {"tolerance": 1e-9}, "tolerance=1e-09 is less than float32 can keep.*use 2e-06 or more"),
        ("ancestral", {}, "'ancestral' with churn=0.0 draws noise: pass key="),
        ("heun", {"churn": 1.0}, "'heun' with churn=1.0 draws noise: pass key="),
    ],
)
def test_options_that_cannot_be(solver, options, message):
    with pytest.raises(ValueError, match=message):
        samplers.sample(MIXTURE.denoise, jnp.zeros((2, 1)), grid_to(5.0), solver, **options)


def test_a_grid_of_one_point():
    with pytest.raises(ValueError, match="at least two points, got 1"):
        samplers.sample(MIXTURE.denoise, jnp.zeros((2, 1)), jnp.array([5.0]))
