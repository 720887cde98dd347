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

from ulx import guidance, samplers

MIXTURE = mixture_1d([0.4, 0.6], [-1.0, 0.8], [0.1, 0.2])


def grid_to(logsnr_max, num_steps=8, logsnr_min=-10.0):
    return samplers.logsnr_grid(num_steps, logsnr_min=logsnr_min, logsnr_max=logsnr_max)


# Compiled once for a denoiser and a number of steps.
sample = jax.jit(samplers.sample, static_argnames=("denoise", "solver"))


def standard_normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Recorder:
    """Wraps a denoiser and notes, while the compiled solver runs, the λ and the number of rows of every call."""

    def __init__(self, denoise):
        self.denoise, self.logsnr, self.rows = denoise, [], []

    def __call__(self, z_t, logsnr, *, key=None):
        jax.debug.callback(self._note, logsnr, ordered=True)
        return self.denoise(z_t)

    def _note(self, logsnr):
        self.logsnr.append(float(logsnr[0]))
        self.rows.append(logsnr.shape[0])


class TestGrid:
    def test_climbs_evenly_from_noise_to_data(self):
        grid = samplers.logsnr_grid(6, logsnr_min=-10.0, logsnr_max=5.0)
        np.testing.assert_allclose(grid, [-10.0, -7.5, -5.0, -2.5, 0.0, 2.5, 5.0], atol=1e-6)

    @pytest.mark.parametrize("num_steps", [0, -3])
    def test_refuses_no_steps(self, num_steps):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
            samplers.logsnr_grid(num_steps, logsnr_min=-10.0, logsnr_max=5.0)

    @pytest.mark.parametrize("ends", [(5.0, -10.0), (5.0, 5.0), (math.nan, 5.0)])
    def test_refuses_ends_out_of_order(self, ends):
        with pytest.raises(ValueError, match=f"{ends[0]} and {ends[1]}"):
            samplers.logsnr_grid(4, logsnr_min=ends[0], logsnr_max=ends[1])


def test_stops_at_the_grid_s_last_noise_level():
    """Paper §2, trap 6: z at λ_z(0) keeps its noise and its α.

    For data that is one point the flow is a straight line in u over s, which Euler follows exactly: the noise that z_1
    began with is the noise that z_0 has, in another amount.
    """
    point, noise = jnp.array([[0.7, -1.2], [0.0, 2.0]]), standard_normal((16, 2, 1, 2))
    (alpha, sigma), (begin_alpha, begin_sigma) = alpha_sigma(5.0), alpha_sigma(-10.0)
    mean = np.broadcast_to(np.asarray(point)[:, None, :], noise.shape)
    result = samplers.sample(lambda z_t, logsnr, key=None: jnp.asarray(mean), noise, grid_to(5.0), "euler")
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


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """On a 1-D mixture the flow keeps quantiles, which gives the exact end point of every sample without a solver."""
    noise = ndtri(np.linspace(0.02, 0.98, 25))
    exact = MIXTURE.flow(noise, -6.0, 4.0)
    errors = []
    with jax.enable_x64(True):
        for pieces in (1, 4):  # 32 and 128 steps, by one program of 32
            ends, z = np.linspace(-6.0, 4.0, pieces + 1), jnp.asarray(noise)[:, None]
            for begin, end in itertools.pairwise(ends):
                grid = samplers.logsnr_grid(32, logsnr_min=float(begin), logsnr_max=float(end))
                z = sample(MIXTURE.denoise, z, grid, solver).z
            assert z.dtype == jnp.float64
            errors.append(np.sqrt(np.mean((np.asarray(z)[:, 0] - exact) ** 2)))
    measured = math.log(errors[0] / errors[1]) / math.log(4)
    assert measured == pytest.approx(order, abs=0.15)  # the next order's term at these step sizes


@pytest.mark.parametrize(("solver", "guided"), [("euler", False), ("heun", True)])
def test_network_calls_are_counted(solver, guided):
    network, grid, batch = Recorder(lambda z_t: 0.5 * z_t), grid_to(5.0, num_steps=5), 3
    denoise = guidance.classifier_free(network, 2.0) if guided else network
    result = samplers.sample(denoise, standard_normal((batch, 2)), grid, solver)
    jax.effects_barrier()
    assert len(network.logsnr) == int(result.nfe) == samplers.network_calls(5, solver)
    assert sum(network.rows) == batch * samplers.network_calls(5, solver, guided)
    # Every call is at a point of the grid: the start of each step and, for Heun, its end. None comes after.
    levels = np.asarray(grid)
    expected = levels[:-1] if solver == "euler" else np.stack([levels[:-1], levels[1:]], axis=1).ravel()
    np.testing.assert_allclose(network.logsnr, expected, atol=1e-4)  # λ comes back from s = exp(−λ/2), float32


def test_unknown_solver(monkeypatch):
    # Outside the tests nothing checks types, so that a name from a command line gets this far.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    solver: Any = "rk4"
    with pytest.raises(ValueError, match=r"'rk4'.*euler, heun"):
        samplers.sample(MIXTURE.denoise, jnp.zeros((2, 1)), grid_to(5.0), solver)


def test_a_grid_of_one_point():
    with pytest.raises(ValueError, match="at least two points, got 1"):
        samplers.sample(MIXTURE.denoise, jnp.zeros((2, 1)), jnp.array([5.0]))
