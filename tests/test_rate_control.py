"""Rate control: its step, its loop on a model of a training, and its place in one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import job, rate_control, runs
from ulx.config import Config, TrainConfig
from ulx.metrics_log import read_metrics
from ulx.rate_control import RateConfig, RateController, log_excess, loss_factor
from ulx.stages import autoencoder_loss
from ulx.training import Interrupted
from ulx.weightings import sigmoid

KEY = jax.random.key(0)


def controller(steps=1000, **changes) -> RateController:
    config = RateConfig(target_bits_per_pixel=0.4, **changes)
    return RateController(config, steps, np.zeros((1, 4, 4, 3), np.uint8), KEY)


def test_loss_factor_and_cut_off():
    for factor in (1.01, 1.5, 4.0):
        assert float(loss_factor(log_excess(factor))) == pytest.approx(factor, rel=1e-6)
    weighting = sigmoid(2.5, 1.5)
    assert rate_control.controlled(weighting, None) is weighting
    found = rate_control.controlled(weighting, jnp.asarray(0.0))
    assert (found.bias, float(found.factor)) == (2.5, 2.0)  # λ* = b


def test_one_step_by_hand():
    """Ten steps of a time constant of 100: a tenth of the error, divided by the sensitivity; no further than exp(½)."""
    moved = controller().moved
    assert float(moved(jnp.asarray(0.3), jnp.asarray(0.4))) == pytest.approx(0.3, abs=1e-6)
    assert float(moved(jnp.asarray(0.3), jnp.asarray(0.44))) == pytest.approx(0.3 - 0.1 * math.log(1.1) / 0.3, rel=1e-5)
    assert float(moved(jnp.asarray(0.3), jnp.asarray(0.1))) == pytest.approx(0.3 + 0.1 * 0.5 / 0.3, rel=1e-5)


def test_acts_within_its_window_alone():
    acting = [step for step in range(1, 101) if controller(steps=100).acts(step)]
    assert acting == [40, 50, 60, 70, 80, 90]  # 30 < step <= 90, every ten


@pytest.mark.parametrize("sensitivity", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("start", [0.3, 0.6])
def test_loop_closes_on_a_training_that_lags_and_drifts(sensitivity, start):
    """log rate falls by half within the first 30 %, and follows λ* with a lag of 5 % of the training. The window is
    six time constants: e⁻⁶ of the first error is left, more where the training is less sensitive than that."""
    control, excess, felt = controller(), jnp.asarray(0.0), 0.0
    rate = start
    for step in range(1, 1001):
        felt += (float(excess) - felt) / 50
        rate = start * math.exp(sensitivity * felt + 0.7 * math.exp(-step / 100))
        if control.acts(step):
            excess = control.moved(excess, jnp.asarray(rate))
    assert rate == pytest.approx(0.4, rel=0.05)
    assert abs(math.log(start / 0.4)) > 0.25  # where it would have ended by itself


def test_measures_the_held_out_rate(small_config, small_dataset):
    """With a standard normal prior it has a closed form. 5 images, 16 draws each: the noise of ‖ε‖² over 256
    dimensions leaves 1 % or so."""
    model = dataclasses.replace(small_config.model, latent_prior="normal")
    model = runs.stage1_state(dataclasses.replace(small_config, model=model)).model
    control = RateController.on(small_dataset, RateConfig(0.4, window=(0.0, 1.0), every=1), 10, key=KEY)
    assert len(control.images) == len(small_dataset.validation)
    x = jnp.asarray(control.images) / 127.5 - 1
    exact = float(model.posterior(x).normal_rate(5.0).mean()) / (256 * math.log(2))
    moved = control(3, model, jnp.asarray(0.0))
    part = 1 / (0.1 * 10)
    clipped = min(max(math.log(exact / 0.4), -0.5), 0.5)
    assert abs(clipped) < 0.5 or exact > 0
    measured = rate_control._held_out_bits(model, x, jax.random.fold_in(KEY, 3))
    assert float(measured) == pytest.approx(exact, rel=0.05)
    assert float(moved) == pytest.approx(-part * float(jnp.clip(jnp.log(measured / 0.4), -0.5, 0.5)) / 0.3, rel=1e-4)


@pytest.fixture
def config(small_config, tmp_path) -> Config:
    train = dataclasses.replace(small_config.train, steps=8, save_every=4)
    rate = RateConfig(target_bits_per_pixel=0.05, window=(0.0, 0.8), every=2)
    return dataclasses.replace(small_config, runs=str(tmp_path), train=train, rate=rate, loss_factor=2.0)


def trained(config, dataset, on_log=lambda step, metrics: None):
    path = runs.open_folder(config)
    runs.remember_data(path, dataset)
    control = RateController.on(dataset, config.rate, config.train.steps, key=KEY)
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
    assert float(loss_factor(whole.control)) == pytest.approx(factors[-1], rel=1e-6)

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
