"""A loss that stops being a number is named, left out if that is allowed, and changes nothing."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import guard, job, run_folder, runs
from ulx.config import TrainConfig
from ulx.metrics_log import read_metrics
from ulx.nn.transformer import BlockConfig, Stack
from ulx.sharding import make_mesh
from ulx.stages import autoencoder_loss
from ulx.training import TrainState, make_optimizer, make_step


class Two(eqx.Module):
    """A stack beside an array of its own, and what is no weight."""

    stack: Stack
    bias: jax.Array
    count: jax.Array
    name: str = eqx.field(static=True)


def two() -> Two:
    stack = Stack(3, 16, BlockConfig(head_size=8), cond_size=8, key=jax.random.key(0))
    return Two(stack, jnp.asarray([3.0, 4.0]), jnp.asarray(7), "two")


def test_a_stack_has_a_norm_for_each_layer():
    model = two()
    names, norms = guard.layer_names(model), np.asarray(guard.layer_norms(eqx.filter(model, eqx.is_inexact_array)))
    found = dict(zip(names, norms, strict=True))
    assert found["bias"] == pytest.approx(5.0)
    weight = np.asarray(model.stack.blocks.up.weight)
    for layer in range(3):
        norm = np.linalg.norm(weight[layer].ravel())
        assert found[f"stack.blocks.up.weight, layer {layer}"] == pytest.approx(norm, rel=1e-6)
    assert not [name for name in names if "count" in name]
    assert len(names) == 1 + 3 * len(jax.tree.leaves(eqx.filter(model.stack, eqx.is_inexact_array)))


def test_names_the_layers_that_are_not_finite():
    names = ["a, layer 0", "a, layer 1", "b", "c", "d"]
    norms = np.array([1.0, np.nan, np.inf, 2.0, 3.0])
    with pytest.raises(
        guard.NonFiniteError, match="not finite at step 7: loss; the gradient of a, layer 1; b\\. Nothing"
    ):
        guard.Guard(names, 0).passes(7, {"loss": np.nan, "rate": 1.0}, norms)
    with pytest.raises(guard.NonFiniteError, match=r"the gradient of a, layer 0; a, layer 1; b and 2 more of 5\."):
        guard.Guard(names, 0).passes(7, {"loss": np.nan}, np.full(5, np.nan))
    assert guard.Guard(names, 0).passes(7, {"loss": 1.0}, np.ones(5))


def test_so_many_in_a_row_may_be_left_out():
    watch, good, bad = guard.Guard(["a"], 2), {"loss": 1.0}, {"loss": np.inf}
    norms = np.ones(1)
    with pytest.warns(UserWarning, match="not finite at step 1: loss. This step was left out"):
        assert not watch.passes(1, bad, norms)
    with pytest.warns(UserWarning, match="step 2"):
        assert not watch.passes(2, bad, norms)
    assert watch.passes(3, good, norms)
    for step in (4, 5):
        with pytest.warns(UserWarning, match=f"step {step}"):
            watch.passes(step, bad, norms)
    with pytest.raises(guard.NonFiniteError, match=r"step 6: loss\. 2 steps before it were left out"):
        watch.passes(6, bad, norms)
    assert watch.skipped == 5


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_left_out_changes_nothing(where):
    """Weights, moments and averages bit for bit; the count of steps goes on, so that the next draws other noise."""

    class Line(eqx.Module):
        weight: jax.Array

    def loss(model, frozen, batch, draws, step, control):
        wrong = batch["x"].max() > 100
        value = jnp.mean((model.weight * batch["x"]) ** 2)
        if where == "gradient":  # sqrt(0) has a value, and no slope
            value = value + jnp.sqrt(jnp.where(wrong, model.weight - model.weight, 0.25))
        else:
            value = jnp.where(wrong, jnp.inf, value)
        return value, {"loss": value}

    config = TrainConfig(steps=9, warmup_steps=0, skip_nonfinite=1, posthoc_ema=(0.1,))
    step = make_step(loss, make_optimizer(config), config, key=jax.random.key(0), mesh=make_mesh())
    new = lambda: TrainState(Line(jnp.asarray(2.0)), make_optimizer(config), posthoc=1)  # noqa: E731
    arrays = lambda state: [np.asarray(leaf) for leaf in jax.tree.leaves(state)]  # noqa: E731
    after_one, _ = step((None, {"x": jnp.ones(2)}), new())
    expected = arrays(after_one)
    state, metrics = step((None, {"x": jnp.full(2, 1e3)}), after_one)
    assert not np.isfinite(float(metrics["gradient" if where == "gradient" else "loss"]))
    assert int(state.step) == 2
    counted = arrays(eqx.tree_at(lambda s: s.step, state, jnp.asarray(1, jnp.int32)))
    for found, wanted in zip(counted, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    state, _ = step((None, {"x": jnp.ones(2)}), state)
    assert float(state.model.weight) != float(expected[1])


def test_a_run_leaves_steps_out_says_so_and_stops_in_the_end(small_config, small_dataset, tmp_path):
    train = dataclasses.replace(small_config.train, steps=8, save_every=4, skip_nonfinite=2)
    config = dataclasses.replace(small_config, name="guarded", runs=str(tmp_path), train=train)
    path = run_folder.open_folder(config)
    plain = autoencoder_loss(config)

    def loss(model, frozen, batch, draws, step, control):
        value, metrics = plain(model, frozen, batch, draws, step, control)
        bad = jnp.isin(step, jnp.asarray([1, 2, 5, 6, 7]))  # counted from 0
        value = value * jnp.where(bad, jnp.nan, 1.0)
        return value, metrics | {"loss": value}

    stops = pytest.raises(guard.NonFiniteError, match="not finite at step 8: loss")
    with pytest.warns(UserWarning, match="left out") as caught, stops:
        job.train_stage("stage1", runs.stage1_state(config), None, loss, small_dataset, config)
    left_out = [str(one.message) for one in caught if "left out" in str(one.message)]
    assert [text.split(":")[0] for text in left_out] == [f"not finite at step {step}" for step in (2, 3, 6, 7)]
    assert "; the gradient of encoder." in left_out[0]
    lines = read_metrics(path / "stage1.jsonl")
    assert [(line["step"], line.get("skipped")) for line in lines] == [(1, None), (4, 2), (5, 2)]
