"""Snapshots on disk, and another average of a run's weights from them, down to the commands."""

import dataclasses
import shutil
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import encode, evaluate, job, reconstruct, run_folder, runs, sample
from ulx.checkpoint import Checkpoints
from ulx.config import TrainConfig
from ulx.data.pipeline import train_batches
from ulx.ema import synthesis
from ulx.snapshots import Snapshots

WIDTHS = (0.05, 0.10)


def tree(seed: float) -> dict[str, Any]:
    return {"layers": [{"weight": jnp.full((2, 3), seed)}, {"weight": jnp.arange(4.0) * seed}], "none": None}


@pytest.fixture
def stored(tmp_path) -> Snapshots:
    snapshots = Snapshots(tmp_path / "stage1", WIDTHS)
    for step in (10, 20, 30):
        snapshots.save(step, [tree(step), tree(-step)])
    return snapshots


def test_what_is_saved_is_what_is_read(stored):
    for width, sign in zip(WIDTHS, (1, -1), strict=True):
        average, step, error = stored.average(width, tree(0.0))
        assert (step, stored.steps) == (30, [10, 20, 30])
        assert error < 1e-6
        assert jax.tree.structure(average) == jax.tree.structure(tree(0.0))
        for found, expected in zip(jax.tree.leaves(average), jax.tree.leaves(tree(30.0 * sign)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-7)  # weights of one or zero, to float64's rounding
    with np.load(stored.directory / "00000020.npz") as arrays:
        assert set(arrays) == {f"{width}/layers/{i}/weight" for width in ("0.05", "0.1") for i in (0, 1)}


def test_no_file_is_ever_half(stored, monkeypatch):
    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    for step in (30, 40):
        with pytest.raises(KeyboardInterrupt):
            stored.save(step, [tree(0.0), tree(0.0)])
    assert stored.steps == [10, 20, 30]
    assert stored.average(0.05, tree(0.0))[0]["layers"][0]["weight"][0, 0] == pytest.approx(30)


def test_files_that_are_damaged_or_another_model_s_are_named(stored):
    for like in ({"layers": [{"weight": jnp.zeros((2, 4))}, {"weight": jnp.zeros(4)}]}, {"other": jnp.zeros(3)}):
        with pytest.raises(ValueError, match=r"00000010\.npz is no snapshot of this model"):
            stored.average(0.07, like)
    file = stored.directory / "00000020.npz"
    for content in (b"", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"00000020\.npz is no snapshot of this model"):
            stored.average(0.07, tree(0.0))
    with pytest.raises(FileNotFoundError, match="no snapshots in"):
        Snapshots(stored.directory / "other", WIDTHS).average(0.07, tree(0.0))


@pytest.mark.parametrize(("steps", "count", "expected"), [(10, 4, [3, 5, 8, 10]), (3, 5, [1, 2, 3]), (7, 1, [7])])
def test_they_are_evenly_spaced_up_to_the_last_step(steps, count, expected):
    config = TrainConfig(steps=steps, posthoc_ema=(0.1,), posthoc_snapshots=count)
    assert [step for step in range(1, steps + 1) if config.stores_averages(step)] == expected
    off = TrainConfig(steps=steps, posthoc_snapshots=count)
    assert not any(off.stores_averages(step) for step in range(1, steps + 1))


def arrays_of(path, stage: str, step: int, width: float) -> list[np.ndarray]:
    with np.load(path / "snapshots" / stage / f"{step:08d}.npz") as arrays:
        return [arrays[name] for name in arrays if name.startswith(f"{width}/")]


def leaves(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """To float64's rounding of the weights, and another of float32."""
    return all(np.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(found, expected, strict=True))


class TestRun:
    def test_a_tracked_width_is_its_newest_snapshot(self, trained_run):
        plain = runs.load(trained_run)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            base, stage1 = runs.load(trained_run, ema=0.1), runs.load(trained_run, ema=0.05, stage="stage1")
        assert base.base is not None
        assert same(leaves(base.base), arrays_of(trained_run, "stage2", 4, 0.1))
        assert not same(leaves(base.base), leaves(plain.base))
        assert same(leaves(base.model), leaves(plain.model))  # stage 2 is for stage 1 as it was trained on
        assert (base.step, base.weights) == ((6, 4), "EMA; stage2: sigma_rel 0.1")
        assert same(leaves(stage1.model), arrays_of(trained_run, "stage1", 4, 0.05))
        assert (stage1.base, stage1.step, stage1.weights) == (None, (4, 0), "EMA; stage1: sigma_rel 0.05")

    def test_another_width_is_the_weighted_sum_and_warns_if_it_is_a_poor_one(self, trained_run):
        with pytest.warns(UserWarning, match=r"sigma_rel=0\.02 is beyond what 3 snapshots of widths 0\.05, 0\.1 can"):
            found = leaves(runs.load(trained_run, ema=0.02).base)
        snapshots = [(width, step) for step in (2, 3, 4) for width in WIDTHS]
        widths, steps = (np.array(values) for values in zip(*snapshots, strict=True))
        weights = synthesis(widths, steps, sigma_rel=0.02, step=4).weights
        expected = [np.zeros(leaf.shape) for leaf in found]
        for weight, (width, step) in zip(weights, snapshots, strict=True):
            for total, leaf in zip(expected, arrays_of(trained_run, "stage2", step, width), strict=True):
                total += weight * leaf
        assert same(found, expected)

    @pytest.mark.parametrize("sigma_rel", [0.0, 0.29, 0.3])
    def test_a_width_that_no_average_has(self, sigma_rel, tmp_path):
        with pytest.raises(ValueError, match=r"above 0 and below 0\.289"):
            runs.load(tmp_path, ema=sigma_rel)

    def test_a_run_without_snapshots(self, small_config, small_dataset, tmp_path):
        config = dataclasses.replace(small_config, runs=str(tmp_path))
        path = run_folder.open_folder(config)
        run_folder.remember_data(path, small_dataset)
        with Checkpoints(path / "checkpoints" / "stage1") as checkpoints:
            batches = train_batches(small_dataset, batch_size=4, seed=0)
            checkpoints.save(6, runs.stage1_state(config), {"data": batches}, wait=True)
        with pytest.raises(ValueError, match=r"kept no snapshots of stage1, .* --train\.posthoc-ema 0\.05 0\.10"):
            runs.load(path, ema=0.07, stage="stage1")
        with pytest.raises(FileNotFoundError, match="has no base model yet: finish stage 2"):
            runs.load(path, ema=0.07)

    def test_a_run_whose_first_snapshot_is_yet_to_come(self, trained_run, tmp_path):
        path = shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("snapshots"))
        with pytest.raises(FileNotFoundError, match="no snapshot of stage2 yet: train on"):
            runs.load(path, ema=0.07)


class TestCommands:
    @pytest.mark.parametrize(
        ("main", "args", "expected"),
        [
            (evaluate.main, [], {"ema": 0.07}),
            (sample.main, [], {"ema": 0.07, "stage": "stage2"}),
            (sample.main, ["--prior"], {"ema": 0.07, "stage": "stage1"}),
            (reconstruct.main, ["images"], {"ema": 0.07, "stage": "stage1"}),
            (encode.main, ["images"], {"ema": 0.07, "stage": "stage1"}),
        ],
    )
    def test_each_asks_for_the_stage_it_uses(self, main, args, expected, monkeypatch, tmp_path):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))

        class Asked(Exception):
            pass

        def load(path, **given):
            assert given == expected
            raise Asked

        monkeypatch.setattr(runs, "load", load)
        with pytest.raises(Asked):
            main(["run", *args, "--ema", "0.07"])

    def test_evaluate_measures_that_average_and_says_so(self, trained_run, small_dataset, monkeypatch):
        measured = {}

        def measure(path, model, base, dataset, config, text, *, weights):
            measured.update(base=base, weights=weights, asked=config.evaluate, sampler=config.sample)
            return path / "report.html"

        monkeypatch.setattr(job, "measure", measure)
        monkeypatch.setattr(evaluate, "open_dataset", lambda config: small_dataset)
        sampler = sample.SamplerOptions(solver="ancestral", decoder_num_steps=3)
        counts = {"held_out": 7, "num_samples": 9}
        guided = {"guidance_scale": 1.5, "guidance_sweep": (2.0,)}
        evaluate.evaluate(evaluate.Options(trained_run, ema=0.05, sample=sampler, **counts, **guided))
        assert same(leaves(measured["base"]), arrays_of(trained_run, "stage2", 4, 0.05))
        assert measured["weights"] == "EMA; stage2: sigma_rel 0.05"
        own = runs.load(trained_run).config
        assert measured["asked"] == dataclasses.replace(own.evaluate, **counts, **guided)
        assert measured["sampler"] == dataclasses.replace(own.sample, solver="ancestral", decoder_num_steps=3)
