"""Benchmarks of a training step itself: what grows how, where its time goes, what compiling takes."""

import json
import sys

import compile_time
import cost_curves
import denoising
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_profile

from ulx.cost import network_costs
from ulx.dry_run import planned
from ulx.nn.conditions import ConditionSpec


def test_a_fit_finds_the_polynomial_and_tells_where_there_is_none():
    sizes = [8, 16, 32, 48, 64]
    found = cost_curves.fitted(sizes, [5 + 2 * n + 0.1 * n**2 for n in sizes], 2)
    assert found["coefficients"] == pytest.approx([5, 2, 0.1])
    assert found["largest_error"] < 1e-9
    assert found["share_of_highest"][-1] == pytest.approx(0.1 * 64**2 / (5 + 2 * 64 + 0.1 * 64**2))
    # No straight line comes near a point that is twice too high.
    assert cost_curves.fitted([1, 2, 3, 4], [1.0, 2.0, 6.0, 4.0], 1)["largest_error"] > 0.2


def test_a_step_s_memory_is_affine_in_the_batch_and_flops_are_the_networks(tmp_path):
    settings = cost_curves.Settings(
        stages=("stage2",), curves=("batch",), batch=(2, 4, 8), rounds=1, results=str(tmp_path)
    )
    results = cost_curves.measure(settings)
    (one,) = results["curves"]
    # Activations grow with the batch, weights do not; the compiler packs small ones otherwise than large ones.
    assert one["fits"]["mib"]["largest_error"] < 0.15
    config = cost_curves.config_of("batch", 4, settings)
    plan = planned(config, ConditionSpec(num_classes=1))
    base = network_costs(plan.model, plan.base)["base"]
    assert one["gflops"] == pytest.approx([size * base.training_flops / 1e9 for size in (2, 4, 8)])
    assert one["fits"]["gflops"]["coefficients"][0] == pytest.approx(0, abs=1e-9)
    assert "| stage2 | batch | 2, 4, 8 | a + b n |" in cost_curves.table(results)
    cost_curves.plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_curves_that_were_measured_before_stay():
    """The same one measured again takes its place, all in the order of a whole measurement."""
    batch = {"stage": "stage2", "curve": "batch"}
    wide, deep = batch | {"curve": "width"}, batch | {"curve": "depth"}
    both = cost_curves.joined({"curves": [batch | {"date": "before"}, wide]}, {"curves": [deep, batch]})
    assert both["curves"] == [batch, deep, wide]


@pytest.mark.parametrize(("curve", "size", "tokens", "blocks", "width"), [
    ("pixels", 48**2, 144, 4, 192),
    ("depth", 8, 64, 8, 192),
    ("width", 64, 64, 4, 64),
])  # fmt: skip
def test_a_curve_changes_one_size(curve, size, tokens, blocks, width):
    config = cost_curves.config_of(curve, size, cost_curves.Settings(batch_size=3))
    base = planned(config, ConditionSpec(num_classes=1)).base.network
    assert np.prod(base.position.shape[:-1]) == tokens
    assert base.position.shape[-1] == width
    assert base.middle.blocks.modulation.weight.shape[0] == blocks
    assert config.train.batch_size == config.train_base.batch_size == 3
    assert {block.remat for block in (config.model.base.block, config.model.decoder.block)} == {"block"}


def test_operations_are_told_apart_by_what_they_hold():
    def work(x, image, kernel, weight):
        image = jax.lax.conv(image, kernel, (1, 1), "SAME")
        return jnp.tanh(x @ weight) * 2, jnp.sort(image, axis=-1)

    args = jnp.ones((64, 32)), jnp.ones((1, 4, 16, 16)), jnp.ones((8, 4, 3, 3)), jnp.ones((32, 128))
    program = jax.jit(work).lower(*args).compile().as_text()
    assert program is not None
    kinds = step_profile.kinds_of(program)
    assert {"products", "convolutions", "the rest"} <= set(kinds.values())
    for name, kind in kinds.items():
        if "convolution" in name:
            assert kind == "convolutions"
        if "sort" in name:
            assert kind == "the rest"
    text = """%f {
  %dot.1 = f32[2,2] dot(%a, %b)
}

ENTRY m {
  %odd = f32[2,2] fusion(%a), kind=kCustom, calls=%f
  %gemm = f32[2] custom-call(%a), custom_call_target="__cublas$gemm"
  %r = f32[] all-reduce(%a)
}
"""
    found = step_profile.kinds_of(text)
    assert (found["odd"], found["gemm"], found["r"]) == ("products", "products", "between devices")


def test_time_inside_an_operation_is_not_counted_twice():
    def event(name, begin, end, thread=1):
        return {"ph": "X", "ts": begin, "dur": end - begin, "pid": 0, "tid": thread, "args": {"hlo_op": name}}

    events = [
        event("dot", 20, 40),
        event("while", 0, 100),
        event("dot", 50, 80),
        event("add", 100, 110),
        event("dot", 0, 5, thread=2),
        {"ph": "X", "ts": 0, "dur": 1e6, "pid": 0, "tid": 1, "args": {}},
    ]
    found = step_profile.seconds_of(events)
    assert {name: round(1e6 * value) for name, value in found.items()} == {"while": 50, "dot": 55, "add": 10}


def test_a_profile_adds_up(monkeypatch, tmp_path, capsys):
    argv = ["--preset", "smoke", "--stages", "stage2", "--steps", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_profile", *argv])
    step_profile.main()
    found = json.loads((tmp_path / "step_profile.json").read_text())["stages"]["stage2"]
    seconds = found["seconds"]
    assert seconds["products"] > 0 < seconds["the rest"]
    assert seconds["convolutions"] == 0
    assert found["gflops"] == pytest.approx(found["products_gflop_per_s"] * seconds["products"])
    assert found["share_of_matmul"] < 1
    assert "| stage2 |" in capsys.readouterr().out


def test_what_was_compiled_comes_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # however fast the machine compiles it
    settings = compile_time.Settings(presets=("openmoji/smoke",), stages=("stage2",), results=str(tmp_path))
    (row,) = compile_time.measure(settings)
    assert row["from_cache"]["compile_s"] < 0.5 * row["empty"]["compile_s"]
    assert "| openmoji/smoke | stage2 |" in compile_time.table([row])


def test_what_a_denoiser_knows_of_gaussian_latents_is_the_posterior_s():
    """Of independent N(0, s²) the best x̂ leaves s²σ²/(s²α² + σ²); the mean alone leaves all."""
    rng = np.random.default_rng(0)
    scale, alpha, sigma = 2.0, 0.6, 0.8
    z, eps = rng.standard_normal((2, 400, 3, 4, 4, 2))
    z = scale * z + rng.standard_normal((3, 4, 4, 2))  # a mean at each position, which is known
    mean = z.mean(0)
    x_hat = mean + scale**2 * alpha / (scale**2 * alpha**2 + sigma**2) * (alpha * (z - mean) + sigma * eps)
    left = sigma**2 / (scale**2 * alpha**2 + sigma**2)
    # 400 × 96 squares: a standard error of 0.7 %; of a frame 1.3 %.
    assert denoising.unknown_share(z, x_hat, False) == pytest.approx(left, rel=0.03)
    np.testing.assert_allclose(denoising.unknown_share(z, x_hat, True), [left] * 3, rtol=0.05)
    np.testing.assert_allclose(denoising.unknown_share(z, np.broadcast_to(mean, z.shape), True), 399 / 400, rtol=1e-9)
    # A frame that nobody knows, beside two that are known.
    x_hat = np.where(np.arange(3)[:, None, None, None] == 1, mean, z)
    np.testing.assert_allclose(denoising.unknown_share(z, x_hat, True), [0, 399 / 400, 0], rtol=1e-9)
