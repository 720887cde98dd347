import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import schedules
from ulx.diffusion import alpha

SCHEDULES = [
    schedules.linear(5.0, -10.0),
    schedules.cosine(5.0, -15.0),
    schedules.cosine(6.0, -8.0, shift=2.0),
    schedules.cosine(6.0, -8.0).shifted(-3.0),
    schedules.image_schedule(32),
    schedules.image_schedule(512),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
T = jnp.linspace(0.0, 1.0, 257)


@every_schedule
def test_runs_down_between_its_end_points(schedule):
    logsnr = schedule(T)
    # Near t = 1 the cosine's λ is 2 log of a float32's distance from π/2: 1e-7 / 0.5 e^(λ min / 2), here below 2e-4.
    np.testing.assert_allclose(logsnr[0], schedule.logsnr_max, atol=1e-5)
    np.testing.assert_allclose(logsnr[-1], schedule.logsnr_min, atol=2e-4)
    assert jnp.all(jnp.diff(logsnr) < 0)


@every_schedule
def test_derivative_is_that_of_the_schedule(schedule):
    by_autodiff = jax.vmap(jax.grad(schedule))(T)
    # 2e-4 for the reason above: both divide by the distance of a float32 from π/2.
    np.testing.assert_allclose(schedule.derivative(T), by_autodiff, rtol=2e-4)
    assert jnp.all(schedule.derivative(T) < 0)


@every_schedule
def test_inverse(schedule):
    # λ is rounded to 1e-6 and moves with |λ'| >= 9: in t that is far below 1e-6, which a few float32 roundings take.
    np.testing.assert_allclose(schedule.inverse(schedule(T)), T, atol=1e-6)


@every_schedule
@pytest.mark.parametrize("delta", [-2.5, 4.0])
def test_shifted_moves_every_log_snr_and_keeps_the_pace(schedule, delta):
    moved = schedule.shifted(delta)
    assert (moved.logsnr_max, moved.logsnr_min) == (schedule.logsnr_max + delta, schedule.logsnr_min + delta)
    np.testing.assert_allclose(moved(T), schedule(T) + delta, atol=2e-4)  # the float32 near π/2 again
    np.testing.assert_allclose(moved.derivative(T), schedule.derivative(T), rtol=2e-4)


def test_cosine_is_alpha_cos():
    schedule = schedules.cosine(20.0, -20.0)
    # Truncating at ±20 moves the angles by e^-10 = 4.5e-5.
    np.testing.assert_allclose(alpha(schedule(T)), jnp.cos(math.pi / 2 * T), atol=1e-4)


def test_linear_is_linear():
    np.testing.assert_allclose(schedules.linear(5.0, -10.0)(jnp.array([0.0, 0.5, 1.0])), [5.0, -2.5, -10.0])


class TestResolution:
    """Paper §2, trap 5: λ and b move by +2 ln(512/r)."""

    @pytest.mark.parametrize(("resolution", "shift"), [(512, 0.0), (256, 1.3863), (32, 5.5452), (1024, -1.3863)])
    def test_values(self, resolution, shift):
        assert schedules.resolution_shift(resolution) == pytest.approx(shift, abs=1e-4)

    def test_reason_pooling_an_image_raises_its_snr(self):
        # Averaging 2×2 pixels keeps the coarse structure and a quarter of the noise's power: structure that the 512
        # image shows at λ, its 256 version shows at λ + ln 4.
        noise = np.random.default_rng(0).standard_normal((512, 512))
        pooled = noise.reshape(256, 2, 256, 2).mean(axis=(1, 3))
        gained = math.log(noise.var() / pooled.var())
        # The variance of n samples is known to sqrt(2/n): 0.6 % of the pooled one; 3 standard errors.
        assert schedules.resolution_shift(256, reference=512) == pytest.approx(gained, abs=0.02)

    @pytest.mark.parametrize("resolution", [32, 64, 512])
    def test_image_schedule_is_simple_diffusion_s(self, resolution):
        # Hoogeboom et al. 2023: −2 log tan(πt/2) + 2 log(64/resolution), here between finite ends.
        schedule = schedules.image_schedule(resolution)
        assert schedule.shift == pytest.approx(2 * math.log(64 / resolution))
        low, high = (
            math.atan(math.exp(-(end - schedule.shift) / 2)) for end in (schedule.logsnr_max, schedule.logsnr_min)
        )
        angle = low + (high - low) * np.asarray(T, np.float64)
        np.testing.assert_allclose(schedule(T), -2 * np.log(np.tan(angle)) + 2 * math.log(64 / resolution), atol=1e-3)

    def test_image_schedule_ends_where_nothing_is_left(self):
        # The numbers that its docstring states.
        for resolution in (32, 64, 128, 256, 512):
            schedule, bias = schedules.image_schedule(resolution), -3 + 2 * math.log(512 / resolution)
            assert schedule.logsnr_min == pytest.approx(bias - 12)
            assert 127.5 * math.exp(-schedule.logsnr_max / 2) == pytest.approx(0.654, abs=1e-3)
            assert 1 / (1 + math.exp(schedule.logsnr_max - bias)) < 3.4e-4
            assert 0.5 * math.log1p(0.25 * math.exp(schedule.logsnr_min)) < 1e-5

    @pytest.mark.parametrize("resolution", [0, -32])
    def test_refuses_a_resolution_that_is_not_positive(self, resolution):
        with pytest.raises(ValueError, match=str(resolution)):
            schedules.image_schedule(resolution)


@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
@pytest.mark.parametrize("ends", [(-10.0, 5.0), (1.0, 1.0), (math.inf, -10.0), (5.0, -math.inf), (math.nan, -10.0)])
def test_refuses_end_points_out_of_order(make, ends):
    with pytest.raises(ValueError, match=f"logsnr_max={ends[0]}, logsnr_min={ends[1]}"):
        make(*ends)


def test_is_a_constant_under_jit():
    traces = []

    @jax.jit
    def end(schedule):
        traces.append(schedule)
        return schedule(jnp.ones(()))

    for schedule in (schedules.cosine(5.0, -15.0), schedules.cosine(5.0, -15.0)):
        assert jax.tree.leaves(schedule) == []
        end(schedule)
    assert len(traces) == 1  # an equal schedule is the same constant


def test_cosine_refuses_an_end_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="more than 20 below the cosine's shift"):
        schedules.cosine(5.0, -30.0)
