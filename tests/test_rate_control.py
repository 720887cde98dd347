"""Rate control: its step, its loop on a model of a training, and its place in one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import job, rate_control, run_folder, runs
from ulx.config import Config, TrainConfig
from ulx.metrics_log import read_metrics
from ulx.rate_control import Control, RateConfig, RateController, held_out_images
from ulx.stages import autoencoder_loss
from ulx.training import Interrupted, pace
from ulx.weightings import sigmoid

KEY = jax.random.key(0)


STEPS = 1000


def controller(learning_rates=None, ema_decay=0.99, warmup_end=250, **changes) -> RateController:
    images = np.zeros((1, 4, 4, 3), np.uint8)
    config = RateConfig(target_bits_per_pixel=0.4, **changes)
    return RateController(
        config, np.ones(STEPS) if learning_rates is None else learning_rates, ema_decay, warmup_end, images, KEY
    )


def averaging(limit: float, step: int) -> float:
    """What step number `step` leaves of the average of the weights."""
    return min(limit, step / (9 + step))


def settled(excess: float) -> Control:
    return Control(*(jnp.asarray(excess) for _ in range(3)))


def test_loss_factor_and_cut_off():
    for factor in (1.01, 1.5, 4.0):
        assert float(Control.start(factor).loss_factor) == pytest.approx(factor, rel=1e-6)
    weighting = sigmoid(2.5, 1.5)
    assert rate_control.controlled(weighting, None) is weighting
    found = rate_control.controlled(weighting, settled(0.0))
    assert (found.bias, float(found.factor)) == (2.5, 2.0)  # λ* = b


def test_one_move_by_hand():
    """Ten steps of a time constant of 100: a tenth of the way, no more than 0.1."""
    by_hand = controller(ema_decay=0.0, time_constant=0.1)

    def moved(control, bits, left):
        return float(by_hand.moved(round(STEPS * (1 - left)), control, jnp.asarray(bits)).excess)

    # At one λ* the rate is yet to fall by 0.6 of what is left, in logarithm.
    assert moved(settled(0.3), 0.4 * math.exp(0.6 * 0.5), 0.5) == pytest.approx(0.3, abs=1e-5)
    assert moved(settled(0.3), 0.4 * math.exp(0.6 * 0.9), 0.9) == pytest.approx(0.3, abs=1e-5)
    # A rate 10 % above asks for a lower λ*, a bit beyond what is to be felt, as 1 − e^(−0.5/0.2) of it will be.
    change = -math.log(1.1) / 0.45 / (1 - math.exp(-2.5))
    assert moved(settled(0.3), 0.44 * math.exp(0.3), 0.5) == pytest.approx(0.3 + 0.1 * change, rel=1e-4)
    # At the end nothing would be felt, and 2.5 times as far is enough.
    assert moved(settled(0.3), 0.44, 0.0) == pytest.approx(0.3 - 0.1 * 2.5 * math.log(1.1) / 0.45, rel=1e-5)
    assert moved(settled(0.3), 0.1, 0.5) == pytest.approx(0.3 + 0.1, rel=1e-5)
    # An estimate of no rate may be below 0: as far up as it goes at once.
    assert moved(settled(0.3), -1e-4, 0.5) == moved(settled(0.3), 0.0, 0.5) == pytest.approx(0.3 + 0.1, rel=1e-5)
    # On its way: of λ* = 0.3 the average has felt 0.1, with which the rate is on target, and the encoder 0.2. It has to
    # get back to 0.1 from there.
    arriving = Control(jnp.asarray(0.3), jnp.asarray(0.2), jnp.asarray(0.1))
    wanted = 0.2 - 0.1 / (1 - math.exp(-2.5))
    assert moved(arriving, 0.4 * math.exp(0.3), 0.5) == pytest.approx(0.3 + 0.1 * (wanted - 0.3), rel=1e-4)


def test_what_is_left_counts_learning_rates_and_lags_as_the_average():
    """Half of the steps at the peak, half at a third of it. The average of a line lags by decay / (1 − decay) steps."""
    rates = np.repeat([1.0, 1 / 3], STEPS // 2)
    found = controller(rates, ema_decay=0.9)
    assert found.left[[249, 499, 749, 999]] == pytest.approx([5 / 8, 1 / 4, 1 / 8, 0], abs=1e-9)
    assert found.averaged_left[400] == pytest.approx(found.left[400] + 9 * 1.5e-3, abs=1e-6)
    assert found.averaged_left[999] == pytest.approx(9 * 0.5e-3, abs=1e-6)


def test_it_averages_as_training_does():
    found, average = controller(ema_decay=0.998), 1.0
    for step in range(1, STEPS + 1):
        decay = averaging(0.998, step)
        average = decay * average + (1 - decay) * found.left[step - 1]
        if step in (1, 300, 900):
            assert found.averaged_left[step - 1] == pytest.approx(average, abs=1e-6)


def test_lags_of_the_encoder_and_of_the_average():
    """After a step of λ* from 0 to 1, 1 − 1/e has been followed in a fifth of the time, and the average is behind. The
    first half of the steps, at nine times the learning rate of the rest, is 0.9 of the time."""
    pace = np.repeat([0.9, 0.1], STEPS // 2)
    control, average = Control(jnp.asarray(1.0), jnp.asarray(0.0), jnp.asarray(0.0)), 0.0
    found = controller(pace)
    for step in range(1, STEPS + 1):
        control = found.lagged(step, control)
        time = 0.0018 * step if step <= 500 else 0.9 + 0.0002 * (step - 500)
        decay = averaging(0.99, step)
        average = decay * average + (1 - decay) * (1 - math.exp(-time / 0.2))
        if step in (111, 500, 800):
            assert float(control.followed) == pytest.approx(1 - math.exp(-time / 0.2), abs=2e-3)
            assert float(control.averaged) == pytest.approx(average, abs=2e-3)
    assert float(control.felt_loss_factor) == pytest.approx(1 + math.exp(float(control.averaged)), rel=1e-6)


def test_acts_within_its_window_alone():
    acting = [step for step in range(1, 101) if controller(np.ones(100), warmup_end=20, window=(0.15, 0.9)).acts(step)]
    assert acting == [40, 50, 60, 70, 80, 90]  # of the 80 steps after the warm-up: 32 < step <= 92, every ten


@pytest.mark.parametrize("sensitivity", [0.37, 0.58])
@pytest.mark.parametrize("lag", [0.15, 0.25])
@pytest.mark.parametrize("drift", [0.5, 0.7])
@pytest.mark.parametrize("start", [0.3, 0.4, 0.55])
def test_loop_closes_on_a_training_unlike_its_model(sensitivity, lag, drift, start):
    """A rate that falls as the prior learns, and follows λ* as the learning rate lets it, both more or less than
    assumed. `start` is where it would end at the λ* of the beginning."""
    loop = controller(pace(TrainConfig(steps=STEPS, warmup_steps=50, ema_decay=0.99)))
    parts = loop.pace / loop.pace.sum()
    control, followed, average = settled(0.0), 0.0, math.log(start) + 1.0
    low, time = 0.0, 0.0
    for step in range(1, STEPS + 1):
        followed += (float(control.excess) - followed) * min(1.0, parts[step - 1] / lag)
        time += parts[step - 1]
        transient = 0.5 * math.exp(-20 * time)
        log_rate = math.log(start) + sensitivity * followed + transient + drift * (1 - time)
        average += (log_rate - average) * (1 - averaging(0.99, step))
        control = loop.lagged(step, control)
        if loop.acts(step):
            control = loop.moved(step, control, jnp.asarray(math.exp(average)))
        low = min(low, float(control.excess))
    assert math.exp(average) == pytest.approx(0.4, rel=0.06)  # 0.05 in the worst of these
    # And a training at what it reports, throughout, ends there too.
    fixed = start * math.exp(sensitivity * math.log(float(control.felt_loss_factor) - 1))
    assert fixed == pytest.approx(math.exp(average), rel=0.04)  # 0.03
    # It does not dive on its way: a latent that has collapsed does not come back.
    assert low > min(0.0, math.log(0.4 / start) / sensitivity) - 0.5


def test_measures_the_held_out_rate(small_config, small_dataset):
    """With a standard normal prior it has a closed form. 5 images, 8 draws each: the noise of ‖ε‖² over 256 dimensions
    leaves 2 % or so."""
    model = dataclasses.replace(small_config.model, latent_prior="normal")
    model = runs.stage1_state(dataclasses.replace(small_config, model=model)).model
    images = held_out_images(small_dataset, 128)
    assert len(images) == len(small_dataset.validation)
    np.testing.assert_array_equal(held_out_images(small_dataset, 3), images[[0, 2, 4]])  # spread over all
    x = jnp.asarray(images) / 127.5 - 1
    exact = float(model.posterior(x).normal_rate(5.0).mean()) / (256 * math.log(2))
    measured = rate_control._held_out_bits(model, x, jax.random.fold_in(KEY, 3))
    assert float(measured) == pytest.approx(exact, rel=0.06)
    control = controller(np.ones(10), warmup_end=0, window=(0.0, 1.0), every=3)
    control = dataclasses.replace(control, images=images)
    found = control(3, lambda: model, settled(0.0))
    expected = control.moved(3, control.lagged(3, settled(0.0)), measured)
    np.testing.assert_allclose(found.excess, expected.excess, rtol=1e-4)
    np.testing.assert_array_equal(control(4, lambda: pytest.fail("measured"), settled(0.5)).excess, 0.5)


@pytest.fixture
def config(small_config, tmp_path) -> Config:
    train = dataclasses.replace(small_config.train, steps=8, save_every=4)
    rate = RateConfig(target_bits_per_pixel=0.05, window=(0.0, 0.8), every=2)
    return dataclasses.replace(small_config, runs=str(tmp_path), train=train, rate=rate, loss_factor=2.0)


def trained(config, dataset, on_log=lambda step, metrics: None):
    path = run_folder.open_folder(config)
    run_folder.remember_data(path, dataset)
    images = held_out_images(dataset, config.rate.images)
    control = RateController(config.rate, pace(config.train), config.train.ema_decay, 0, images, KEY)
    loss = autoencoder_loss(config)
    return job.train_stage("stage1", runs.stage1_state(config), None, loss, dataset, config, on_log, control)


def test_adapts_logs_and_resumes_bit_for_bit(config, small_dataset):
    """The rate is far above the target, so c_lf falls at steps 2, 4 and 6 of 8 and stays from there."""
    whole = trained(dataclasses.replace(config, name="whole"), small_dataset)
    log = read_metrics(config.path.parent / "whole" / "stage1.jsonl")
    factors = [line["loss_factor"] for line in log]
    assert factors[0] == factors[1] == pytest.approx(2.0)  # what step 2 was trained with, before it acted
    assert factors[1] > factors[2] == factors[3] > factors[4] == factors[5] > factors[6] == factors[7]
    assert whole.control is not None
    assert float(whole.control.loss_factor) == pytest.approx(factors[-1], rel=1e-6)
    assert factors[-1] < float(whole.control.felt_loss_factor) < 2.0

    part = dataclasses.replace(config, name="part")

    def interrupt(step, metrics):
        if step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        trained(part, small_dataset, interrupt)
    resumed = trained(dataclasses.replace(part, resume=True), small_dataset)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="target_bits_per_pixel must be positive"):
        RateConfig(target_bits_per_pixel=0.0)
    with pytest.raises(ValueError, match="window"):
        RateConfig(window=(0.9, 0.3))
    with pytest.raises(ValueError, match="time_constant"):
        RateConfig(time_constant=0.0)
    with pytest.raises(ValueError, match="every must be at least 1"):
        RateConfig(every=0)
    with pytest.warns(UserWarning, match="collapse"), pytest.raises(ValueError, match="it needs loss_factor > 1"):
        Config(loss_factor=1.0, rate=RateConfig(0.4), train=TrainConfig(steps=400))
