"""Averages by power functions: closed forms, quadrature, least squares on a grid, and direct tracking."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ulx.ema import combined, gamma_of, inner_product, power_average, sigma_rel_of, synthesis

TRACKED = (0.05, 0.10)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 6.94, 16.97, 300.0])
def test_sigma_rel_is_the_profile_s_standard_deviation(gamma):
    """τ/t under p_γ is Beta(γ + 1, 1)."""
    expected = stats.beta(gamma + 1, 1).std()
    assert sigma_rel_of(gamma) == pytest.approx(expected, rel=1e-12)
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9)  # the roots of a cubic by eigenvalues


def test_gammas_of_the_paper():
    assert [round(gamma_of(sigma_rel), 2) for sigma_rel in TRACKED] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 12**-0.5, 0.5, math.nan])
def test_a_width_that_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel, the width .* above 0 and below 0\.289 .*, got"):
        gamma_of(sigma_rel)


def explicit(trajectory: np.ndarray, gamma: float) -> np.ndarray:
    """The average of the steps so far, after each step: the integral of p over (τ − 1, τ] is the weight of step τ."""
    steps = np.arange(1, len(trajectory) + 1)
    primitive = (np.arange(len(trajectory) + 1) / steps[:, None]) ** (gamma + 1)
    weights = np.tril(np.diff(primitive, axis=1))
    return weights @ trajectory


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_recursion_is_the_weighted_sum_of_the_trajectory(sigma_rel):
    gamma = gamma_of(sigma_rel)
    trajectory = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)

    def step(average, given):
        number, params = given
        average = power_average(average, {"w": params}, number, gamma)
        return average, average["w"]

    start = {"w": jnp.full(3, 0.7)}  # forgotten at the first step
    _, found = jax.lax.scan(step, start, (jnp.arange(1, 201), jnp.asarray(trajectory)))
    # Float32 rounds once a step, by 6e-8, and forgets it as fast as the steps themselves: measured 2e-7.
    np.testing.assert_allclose(found, explicit(trajectory, gamma), atol=1e-6)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6, 10**8])
def test_late_steps_keep_float32_s_precision(step):
    """1 − β falls to 1e-7, where 1 − (1 − 1/t)^(γ+1) in float32 would be noise; a constant stays what it is."""
    gamma = gamma_of(0.05)
    share = power_average(jnp.zeros(()), jnp.ones(()), jnp.asarray(step), gamma)
    expected = -math.expm1((gamma + 1) * math.log1p(-1 / step)) if step > 1 else 1.0
    assert float(share) == pytest.approx(expected, rel=5e-7)
    constant = jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.float32)
    assert np.array_equal(power_average(constant, constant, jnp.asarray(step), gamma), constant)


@pytest.mark.parametrize(("a", "b"), [((16.97, 700), (6.94, 1000)), ((6.94, 1000), (1.5, 400)), ((2.0, 9), (3.0, 9))])
def test_inner_product_against_quadrature(a, b):
    def profile(tau, gamma, step):
        return (gamma + 1) * tau**gamma / step ** (gamma + 1)

    expected, _ = integrate.quad(lambda tau: profile(tau, *a) * profile(tau, *b), 0, min(a[1], b[1]), epsrel=1e-12)
    assert inner_product(*a, *b) == pytest.approx(expected, rel=1e-10)
    assert inner_product(*a, *b) == pytest.approx(inner_product(*b, *a), rel=1e-14)


def evenly(steps: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Widths and steps of `count` snapshots of both tracked averages."""
    ends = np.arange(1, count + 1) * steps // count
    return np.tile(np.array(TRACKED), count), np.repeat(ends, len(TRACKED))


@pytest.mark.parametrize("index", [1, 20, 63])
def test_a_snapshot_is_made_of_itself_alone(index):
    sigma_rels, steps = evenly(1024, 32)
    found = synthesis(sigma_rels, steps, sigma_rel=float(sigma_rels[index]), step=int(steps[index]))
    # The matrix's condition, 1e4 here, times float64's rounding.
    np.testing.assert_allclose(found.weights, np.arange(64) == index, atol=1e-10)
    assert found.error < 1e-6


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.07, 256), (0.02, 256), (0.2, 250), (0.12, 192)])
def test_least_squares_against_a_grid(sigma_rel, step):
    """The same fit without inner products: profiles on the midpoints of a fine grid. The last snapshot's weight is what
    the others leave of 1, so that a fit without a constraint is left."""
    sigma_rels, steps = evenly(256, 8)
    tau = (np.arange(256 * 400) + 0.5) / 400

    def profile(sigma_rel, step):
        gamma = gamma_of(sigma_rel)
        return np.where(tau <= step, (gamma + 1) / step * np.minimum(tau / step, 1) ** gamma, 0)

    columns = np.stack([profile(*snapshot) for snapshot in zip(sigma_rels, steps, strict=True)], axis=1)
    wanted = profile(sigma_rel, step)
    last = columns[:, -1:]
    others = np.linalg.lstsq(columns[:, :-1] - last, wanted - last[:, 0], rcond=None)[0]
    expected = np.append(others, 1 - others.sum())
    found = synthesis(sigma_rels, steps, sigma_rel=sigma_rel, step=step)
    np.testing.assert_allclose(found.weights, expected, atol=1e-3)  # the grid's midpoint rule, times the condition
    residual = np.linalg.norm(wanted - columns @ expected) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(residual, rel=1e-3)


@pytest.mark.parametrize(
    ("sigma_rel", "off"),
    # Twice the measured error over the noise's standard deviation.
    [(0.02, 0.03), (0.03, 6e-3), (0.07, 3.4e-4), (0.15, 6e-4), (0.2, 1.2e-2)],
)
def test_another_width_is_what_tracking_it_would_have_given(sigma_rel, off):
    """A trajectory that learns and shivers, 1024 steps, 32 snapshots of the two tracked averages in float32: within
    the bound of `Synthesis.error`, which holds for any trajectory, and far within it for one as smooth as this."""
    rng, tau = np.random.default_rng(1), np.arange(1, 1025)[:, None]
    scale, noise = rng.uniform(1, 3, 50), 0.1
    trajectory = scale * (1 - np.exp(-tau / 200)) + noise * rng.standard_normal((1024, 50))
    sigma_rels, steps = evenly(1024, 32)
    tracked = {sigma_rel: explicit(trajectory, gamma_of(sigma_rel)) for sigma_rel in TRACKED}
    snapshots = [
        jnp.asarray(tracked[sigma_rel][step - 1], jnp.float32)
        for sigma_rel, step in zip(sigma_rels, steps, strict=True)
    ]
    found = synthesis(sigma_rels, steps, sigma_rel=sigma_rel, step=1024)
    gamma = gamma_of(sigma_rel)
    error = np.abs(combined(snapshots, found.weights) - explicit(trajectory, gamma)[-1])

    mean = trajectory.mean(axis=0)
    norm = math.sqrt(inner_product(gamma, 1024.0, gamma, 1024.0))
    bound = found.error * norm * np.linalg.norm(trajectory - mean, axis=0)
    rounding = np.abs(found.weights).sum() * 6e-8 * np.abs(trajectory).max()
    assert np.all(error <= bound + rounding)
    assert error.max() < off * noise
    assert abs(1 - found.weights.sum()) < 1e-12  # by constraint, to float64's rounding


def test_an_average_may_end_before_the_newest_snapshot():
    rng = np.random.default_rng(2)
    trajectory = np.cumsum(rng.standard_normal((512, 20)), axis=0)
    sigma_rels, steps = evenly(512, 32)
    tracked = {sigma_rel: explicit(trajectory, gamma_of(sigma_rel)) for sigma_rel in TRACKED}
    snapshots = [tracked[sigma_rel][step - 1] for sigma_rel, step in zip(sigma_rels, steps, strict=True)]
    found = synthesis(sigma_rels, steps, sigma_rel=0.08, step=400)
    error = combined(snapshots, found.weights) - explicit(trajectory, gamma_of(0.08))[399]
    spread = np.abs(explicit(trajectory, gamma_of(0.08))[399] - trajectory[399]).mean()
    assert np.abs(error).max() < 1e-3 * spread  # measured 3.4e-4


def test_the_sum_is_in_float64():
    """Weights of 1e4 that cancel: what is left would be lost in float32."""
    snapshots = [{"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([0.5, 0.5])}]
    found = combined(snapshots, np.array([1e9, 1e-3 - 1e9, 2.0]))
    assert found["w"].dtype == jnp.float32
    np.testing.assert_allclose(found["w"], [1.001, 1.002], rtol=1e-6)


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="needs snapshots and steps from 1"):
        synthesis(np.array([]), np.array([], int), sigma_rel=0.07, step=10)
    with pytest.raises(ValueError, match="needs snapshots and steps from 1, got step 0"):
        synthesis(np.array([0.1]), np.array([5]), sigma_rel=0.07, step=0)
    with pytest.raises(ValueError, match=r"got 0\.3"):
        synthesis(np.array([0.1]), np.array([5]), sigma_rel=0.3, step=5)
    with pytest.raises(ValueError, match="no snapshots"):
        combined([], np.array([]))
