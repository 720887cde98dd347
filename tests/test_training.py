"""The step against its formula, the loop's bookkeeping, and resuming bit for bit."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ulx import job, run_folder, runs
from ulx.checkpoint import Checkpoints
from ulx.config import Optimizer, TrainConfig
from ulx.data.pipeline import train_batches
from ulx.ema import gamma_of
from ulx.guard import NonFiniteError
from ulx.metrics_log import MetricsLog, read_metrics
from ulx.nn.conditions import ConditionSpec
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViT, UViTConfig
from ulx.sharding import make_mesh
from ulx.stages import autoencoder_loss
from ulx.training import Interrupted, TrainState, make_optimizer, make_step, pace


class Line(eqx.Module):
    """w x, with a bias that does not decay."""

    weight: jax.Array
    bias: jax.Array


def line_loss(model, frozen, batch, draws, step, control):
    error = model.weight * batch["x"] + model.bias - batch["y"]
    loss = jnp.mean(error**2)
    return loss, {"loss": loss}


def test_pace_is_what_the_optimizer_takes():
    """Up a line, down a cosine, to a hundredth. Adam's first steps under one gradient move by the learning rate."""
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=0.02, weight_decay=0.0)
    found = pace(config)
    cosine = [0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 100)) for step in range(10, 110)]
    np.testing.assert_allclose(found, [*np.arange(10) / 10, *cosine], atol=1e-6)
    optimizer, weight = make_optimizer(config), {"weight": jnp.ones(())}
    state = optimizer.init(weight)
    for expected in found:
        update, state = optimizer.update({"weight": jnp.ones(())}, state, weight)
        moved = float(cast(Any, update)["weight"])
        assert moved == pytest.approx(-0.02 * expected, rel=1e-4, abs=1e-8)


def bits_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def test_step_is_clipped_adamw_and_float32_averages():
    config = TrainConfig(
        steps=10,
        warmup_steps=2,
        learning_rate=0.1,
        clip_norm=0.5,
        weight_decay=0.3,
        ema_decay=0.9,
        posthoc_ema=(0.05, 0.2),
    )
    state = TrainState(Line(jnp.asarray(2.0), jnp.asarray(1.0)), make_optimizer(config), posthoc=2)
    trajectory = []
    step = make_step(line_loss, make_optimizer(config), config, key=jax.random.key(0), mesh=make_mesh())
    batch = {"x": jnp.asarray([1.0, 2.0]), "y": jnp.asarray([0.0, 1.0])}
    weight, bias = np.asarray([2.0, 1.0])
    moment, second, average = np.zeros(2), np.zeros(2), np.asarray([2.0, 1.0])
    for number in range(4):
        error = weight * np.asarray([1.0, 2.0]) + bias - np.asarray([0.0, 1.0])
        gradient = np.asarray([np.mean(2 * error * np.asarray([1.0, 2.0])), np.mean(2 * error)])
        norm = np.linalg.norm(gradient)
        clipped = gradient * min(1, 0.5 / norm)
        moment = 0.9 * moment + 0.1 * clipped
        second = config.beta2 * second + (1 - config.beta2) * clipped**2
        rate = 0.1 * (number / 2 if number < 2 else 1e-2 + (1 - 1e-2) * (1 + np.cos(np.pi * (number - 2) / 8)) / 2)
        update = moment / (1 - 0.9 ** (number + 1)) / (np.sqrt(second / (1 - config.beta2 ** (number + 1))) + 1e-8)
        weight, bias = weight - rate * (update[0] + 0.3 * weight), bias - rate * update[1]
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * np.asarray([weight, bias])
        state, metrics = step((None, batch), state)
        assert float(metrics["gradient"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["gradient/weight"]) == pytest.approx(abs(gradient[0]), rel=1e-5)
        np.testing.assert_allclose([state.model.weight, state.model.bias], [weight, bias], rtol=1e-5)
        np.testing.assert_allclose([state.ema.weight, state.ema.bias], average, rtol=1e-5)
        # (τ/t)^(γ+1) is the share of the first τ steps in a power average.
        trajectory.append([weight, bias])
        for sigma_rel, tracked in zip((0.05, 0.2), state.posthoc, strict=True):
            shares = np.diff((np.arange(number + 2) / (number + 1)) ** (gamma_of(sigma_rel) + 1))
            np.testing.assert_allclose([tracked.weight, tracked.bias], shares @ trajectory, rtol=1e-5)
    assert int(state.step) == 4


def test_muon_turns_matrices_of_blocks_and_convolutions_and_leaves_the_rest_to_adamw():
    """Two steps under one gradient. Muon takes its singular values through a polynomial five times (Jordan 2024) and
    makes it 0.2 √max(in, out) as large (Liu et al. 2025); all else moves as without Muon. To 1e-4 of the largest move:
    float32's rounding in fifteen products."""
    config = TrainConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.3, clip_norm=1e9)
    block = BlockConfig(head_size=4)
    sizes = UViTConfig(patch=1, conv_channels=(16,), conv_blocks=1, channels=(8, 16), blocks=(2, 1), block=block)
    network = UViT((8, 8, 3), sizes, conditions=ConditionSpec(text_channels=4), key=jax.random.key(0))
    params = eqx.filter(network, eqx.is_inexact_array)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    grads = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)

    def moved(optimizer: Optimizer):
        chain = make_optimizer(dataclasses.replace(config, optimizer=optimizer))
        update, found, state = jax.jit(chain.update), params, chain.init(params)
        for _ in range(2):
            updates, state = update(grads, state, found)
            found = optax.apply_updates(found, updates)
        return jax.tree.leaves(found)

    def turned(gradient):
        left, values, right = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
        values = values / np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        return 0.2 * np.sqrt(max(gradient.shape)) * (left * values) @ right

    others, names = 0, set()
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(grads),
        moved("adamw"),
        moved("muon"),
        strict=True,
    )
    for (path, weight), gradient, by_adamw, by_muon in leaves:
        if np.array_equal(by_adamw, by_muon):
            others += 1
            continue
        name = jax.tree_util.keystr(path)
        convolves = "conv_" in name
        names.add(".".join(name.split(".")[-2:]) if convolves else name.split(".blocks.")[1])
        # The kernel and the inputs of a convolution are the rows of one matrix; of a block's there is a stack.
        matrices = gradient.reshape(1, -1, gradient.shape[-1]) if convolves else gradient
        move = np.stack([turned(matrix) for matrix in matrices]).reshape(weight.shape)
        expected = np.asarray(weight, np.float64)
        for rate in 0.1 * pace(config)[:2]:
            expected = expected - rate * (move + 0.3 * expected)
        np.testing.assert_allclose(by_muon, expected, atol=1e-4 * np.abs(expected - weight).max(), err_msg=name)
    of_blocks = {f"attention.{part}.weight" for part in ("qkv", "text", "out")} | {"up.weight", "down.weight"}
    assert names == of_blocks | {"conv_1.weight", "conv_2.weight"}
    assert others > len(names)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    config = TrainConfig(steps=2, dtype="bfloat16", warmup_steps=0)
    seen = []

    def loss(model, frozen, batch, draws, step, control):
        seen.append((model.weight.dtype, frozen.dtype))  # what is frozen stays exact: it makes the targets
        return line_loss(model, frozen, batch, draws, step, control)

    state = TrainState(Line(jnp.asarray(2.0), jnp.asarray(1.0)), make_optimizer(config))
    batch = {"x": jnp.ones(2), "y": jnp.zeros(2)}
    step = make_step(loss, make_optimizer(config), config, key=jax.random.key(0), mesh=make_mesh())
    state, _ = step((jnp.ones(3), batch), state)
    assert seen[0] == (jnp.bfloat16, jnp.float32)
    assert state.model.weight.dtype == state.ema.weight.dtype == jnp.float32


def run_stage(config, dataset, on_log=lambda step, metrics: None):
    path = run_folder.open_folder(config)
    run_folder.remember_data(path, dataset)
    state, loss = runs.stage1_state(config), autoencoder_loss(config)
    return job.train_stage("stage1", state, None, loss, dataset, config, on_log)


@pytest.fixture
def config(small_config, tmp_path):
    train = dataclasses.replace(small_config.train, steps=8, save_every=3)
    return dataclasses.replace(small_config, runs=str(tmp_path), train=train)


def snapshots_of(path: Path) -> dict[str, dict[str, bytes]]:
    """The bits of every array in every file of stage 1's snapshots."""
    found = {}
    for file in sorted((path / "snapshots" / "stage1").iterdir()):
        with np.load(file) as arrays:
            found[file.name] = {name: arrays[name].tobytes() for name in arrays}
    return found


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(config, small_dataset):
    train = dataclasses.replace(config.train, posthoc_ema=(0.05, 0.10), posthoc_snapshots=4)
    config = dataclasses.replace(config, train=train)
    whole = run_stage(dataclasses.replace(config, name="whole"), small_dataset)

    class Killed(Exception):
        pass

    def kill(step, metrics):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run_stage(dataclasses.replace(config, name="parts"), small_dataset, kill)
    # A polite interrupt at the next opportunity saves, wherever it is.
    politely = lambda step, metrics: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None  # noqa: E731
    with pytest.raises(Interrupted, match="--resume") as stopped:
        run_stage(dataclasses.replace(config, name="parts", resume=True), small_dataset, politely)
    assert stopped.value.number == signal.SIGTERM
    resumed = run_stage(dataclasses.replace(config, name="parts", resume=True), small_dataset)
    assert bits_of(resumed) == bits_of(whole)
    # Snapshots of the averages, evenly spaced. That of step 4 was written before the kill, and again after resuming
    # from step 3.
    stored = snapshots_of(Path(config.runs) / "whole")
    assert list(stored) == [f"0000000{step}.npz" for step in (2, 4, 6, 8)]
    assert snapshots_of(Path(config.runs) / "parts") == stored
    for sigma_rel, average in zip((0.05, 0.1), whole.posthoc, strict=True):
        last = [value for name, value in stored["00000008.npz"].items() if name.startswith(f"{sigma_rel}/")]
        assert last == bits_of(average)
    # The log reads as if nothing had happened.
    steps = [line["step"] for line in read_metrics(Path(config.runs) / "parts" / "stage1.jsonl")]
    assert steps == list(range(1, 9))
    losses = [
        [line["loss"] for line in read_metrics(Path(config.runs) / name / "stage1.jsonl")]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_no_step_recompiles(config, small_dataset):
    compiled = []

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    counts = {}
    try:
        # From the second logged step on, nothing may be compiled any more.
        run_stage(config, small_dataset, lambda step, metrics: counts.update({step: len(compiled)}))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert counts[1] > 0
    between_saves = [counts[5] - counts[4], counts[2] - counts[1], counts[8] - counts[7]]
    assert between_saves == [0, 0, 0]


def test_non_finite_values_stop_the_run_and_say_where(config, small_dataset, tmp_path):
    config = dataclasses.replace(config, name="nan")
    path = run_folder.open_folder(config)
    state = runs.stage1_state(config)
    poisoned = state.model.decoder.denoiser.network.project_out.bias.at[0].set(jnp.nan)
    state = eqx.tree_at(lambda s: s.model.decoder.denoiser.network.project_out.bias, state, poisoned)
    with pytest.raises(NonFiniteError, match=r"not finite at step 1: .*decoder.*gradient/decoder") as error:
        job.train_stage("stage1", state, None, autoencoder_loss(config), small_dataset, config)
    assert "gradient/prior" not in str(error.value)  # the prior is innocent, and not named
    with Checkpoints(path / "checkpoints" / "stage1") as checkpoints:
        assert checkpoints.latest is None


def test_a_checkpoint_from_before_a_field_was_there_still_fits(tmp_path, small_dataset):
    class Before(eqx.Module):
        step: jax.Array
        weight: jax.Array

    class Now(eqx.Module):
        step: jax.Array
        unused: tuple[jax.Array, ...]
        weight: jax.Array

    batches = train_batches(small_dataset, batch_size=4, seed=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, Before(jnp.asarray(5), jnp.arange(3.0)), {"data": batches}, wait=True)
        now = checkpoints.restore(Now(jnp.asarray(0), (), jnp.zeros(3)))
        assert (int(now.step), now.unused, now.weight.tolist()) == (5, (), [0.0, 1.0, 2.0])
        with pytest.raises(ValueError, match="does not fit this model"):
            checkpoints.restore(Now(jnp.asarray(0), (jnp.zeros(2),), jnp.zeros(3)))


def test_a_checkpoint_from_before_a_module_had_an_empty_part_still_fits(tmp_path, small_dataset):
    class Before(eqx.Module):
        layers: list[jax.Array]
        bias: None = None

    class Now(Before):
        frames: jax.Array | None = None

    class State(eqx.Module):
        model: Before

    batches = train_batches(small_dataset, batch_size=4, seed=0)
    zeros = [jnp.zeros(3), jnp.zeros(2)]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, State(Before([jnp.arange(3.0), jnp.ones(2)])), {"data": batches}, wait=True)
        now = checkpoints.restore(State(Now(zeros)))
        assert [layer.tolist() for layer in now.model.layers] == [[0.0, 1.0, 2.0], [1.0, 1.0]]
        with pytest.raises(ValueError, match=r"does not fit this model: 1 arrays .* such as model\.frames"):
            checkpoints.restore(State(Now(zeros, frames=jnp.zeros(1))))
        with pytest.raises(ValueError, match="does not fit this model"):
            checkpoints.restore(State(Now([jnp.zeros(4), jnp.zeros(2)])))


def test_checkpoint_of_another_model_is_refused(config, small_dataset):
    run_stage(config, small_dataset)
    wider = dataclasses.replace(config.model.prior, channels=(32,))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, prior=wider))
    with (
        Checkpoints(config.path / "checkpoints" / "stage1") as checkpoints,
        pytest.raises(ValueError, match="does not fit this model"),
    ):
        checkpoints.restore(runs.stage1_state(other))
    with pytest.raises(ValueError, match=r"model.prior.channels: \(16,\) -> \(32,\)"):
        run_folder.open_folder(dataclasses.replace(other, resume=True))


def test_other_data_is_refused(config, small_dataset):
    path = run_folder.open_folder(config)
    run_folder.remember_data(path, small_dataset)
    with pytest.raises(ValueError, match="other data than is there now"):
        run_folder.remember_data(path, dataclasses.replace(small_dataset, fingerprint="another"))


def test_log_drops_what_is_taken_again_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with MetricsLog(path, resume_step=2) as log:
        log.write(3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_only_weights_decay():
    config = TrainConfig(steps=10, warmup_steps=0, weight_decay=1.0)
    optimizer = make_optimizer(config)
    params: Any = {"model": Line(jnp.asarray(2.0), jnp.asarray(3.0))}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    moved = cast(Any, optax.apply_updates(params, updates))["model"]
    assert float(moved.weight) < 2.0
    assert float(moved.bias) == 3.0
