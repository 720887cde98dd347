"""The benchmarks of whole runs: what each row is trained as, that none is measured twice, and the pages they leave."""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ablations
import costs
import equinox as eqx
import jax
import latent_shape
import matplotlib.pyplot as plt
import numpy as np
import points
import pytest
import sampling
import speed
import tune_grid
from stand_ins import Corner

from ulx import evaluation, proxy, run_folder, runs
from ulx.config import Config, differences, to_json
from ulx.cost import network_costs
from ulx.denoiser import Denoiser
from ulx.metrics import efficientnet
from ulx.models import UnifiedLatents
from ulx.nn.conditions import ConditionSpec
from ulx.nn.uvit import UViT


def metric(value: float) -> dict:
    return {"value": value, "standard_error": value / 10, "n": 5}


def metrics_of(config: Config) -> dict:
    """What the main job would leave in metrics.json, as far as the benchmarks read it."""
    distance = lambda value: metric(value) | {"n_reference": 12, "nfe": 16, "rank_deficient": True}  # noqa: E731
    has_fid = config.evaluate.inception_weights is not None
    fid: dict = {"fid": {"base": distance(33.0), "reconstruction": distance(22.0)}} if has_fid else {}
    if config.evaluate.inception_weights is not None:
        sha256 = hashlib.sha256(Path(config.evaluate.inception_weights).read_bytes()).hexdigest()
        fid["definitions"] = {"fid": {"network": {"sha256": sha256}}}
    return fid | {
        "loss_factor": config.loss_factor,
        "held_out": {"n": 5},
        "bits_per_pixel": metric(0.5),
        "bits_per_pixel_base": metric(0.4),
        "bits_per_latent_dim": metric(1.5),
        "psnr": metric(20.0),
        "fd_efflite0": {"base": distance(110.0), "reconstruction": distance(80.0) | {"nfe": 12}},
        "alignment": {
            "by_guidance": {
                scale: {"retrieval": metric(score), "shuffled_prompts": metric(0.01), "fd_efflite0": distance(fd)}
                for scale, score, fd in (("1", 0.3, 110.0), ("4", 0.5, 90.0), ("8", 0.4, 120.0))
            },
            "ceilings": {"real_images": metric(0.9)},
        },
        "held_out_prompts": {"retrieval": metric(0.02), "guidance_scale": 4.0},
        "against_held_out_images": {"base": {"kd_efflite0": metric(0.25)} | ({"kid": metric(0.11)} if has_fid else {})},
        "cost": {
            **({} if config.model.latent == "pixels" else {"training_flops_stage1": 2e12}),
            "training_flops_stage2": 1e12,
            "forward_flops_per_image": {"encoder": 1e6, "prior": 2e6, "decoder": 3e6, "base": 4e6},
        },
    }


def remembered(config: Config) -> None:
    config.path.mkdir(parents=True, exist_ok=True)
    (config.path / "dataset.json").write_text(json.dumps({"fingerprint": "of the data"}))


def benchmark(name: str) -> Any:
    """By its file: an experiment may have the same name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(points.__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A benchmark's command, with what the main job is asked for in the order of asking."""
    asked: list[Config] = []

    def whole(config: Config) -> dict:
        asked.append(config)
        remembered(config)
        return metrics_of(config)

    def run(name: str, *options: str) -> tuple[list[Config], Path]:
        asked.clear()
        folders = ("--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"))
        monkeypatch.setattr(sys, "argv", [name, "--preset", "smoke", *folders, *options])
        benchmark(name).main()
        return list(asked), tmp_path / "results" / f"{name}_smoke"

    monkeypatch.setattr(points, "whole", whole)
    monkeypatch.setattr("ulx.command_line.run_command", lambda work: work())
    return run


@pytest.mark.parametrize(
    ("name", "options", "count", "row"),
    [
        (
            "bitrate_vs_fid",
            ("--pairs", "1.4", "4", "2.5", "1.7"),
            4,
            "| 1.4 | 4 | 2.50 | 0.500 ± 0.050 | 20.00 ± 2.00 | 80.0 | 110.0 | 110.0 | 0.250 ± 0.025 |",
        ),
        (
            "compute_vs_fid",
            ("--methods", "unified", "pixels", "--lengths", "0.5", "1", "--samplers", "euler"),
            6,
            "| unified | 50 | 1 | 3 | 0.500 | 80.0 | 110.0 | 0.250 ± 0.025 | euler | 16 + 12 | 0 |",
        ),
        ("ablations", (), 7, "| N(0, I) | MSE | 0.500 ± 0.050 | 0.400 ± 0.040 | 1.500 | 20.00 ± 2.00 | 80.0 | 110.0 |"),
        (
            "latent_shape",
            (),
            6,
            "| 16×16×8 | 0.500 ± 0.050 | 1.500 | 20.00 ± 2.00 | 80.0 | 110.0 | 0.250 | 1 | 2 | 3 | 4 |",
        ),
        (
            "text_to_image",
            ("--factors", "2", "4"),
            6,
            "| unified | 4 | small | 0.500 ± 0.050 | 80.0 | 110.0 | 0.300 ± 0.030 | 0.010 ± 0.001 | 4 | 0.500 ± 0.050 "
            "| 90.0 | 0.020 ± 0.002 |",
        ),
    ],
)
def test_every_row_is_a_run_of_its_own_and_measured_once(command, capsys, name, options, count, row):
    asked, results = command(name, *options)
    assert len(asked) == len({config.path for config in asked}) == count
    page = results.with_suffix(".md").read_text()
    assert row in page
    assert page in capsys.readouterr().out
    assert results.with_suffix(".png").stat().st_size > 1000
    assert len(points.read(results.with_suffix(".jsonl"))) == count
    again, _ = command(name, *options)
    assert again == []
    assert results.with_suffix(".md").read_text() == page


@pytest.mark.parametrize(
    ("name", "options", "cells"),
    [
        ("bitrate_vs_fid", ("--pairs", "1.4", "4"), "22.0 | 33.0 | 33.0 | 0.110 ± 0.011 | 0.110 ± 0.011"),
        ("compute_vs_fid", ("--methods", "unified", "--lengths", "1", "--more"), "22.0 | 33.0 | 0.110 ± 0.011"),
        ("ablations", ("--rows", "unified"), "22.0 | 33.0 | 0.110"),
        ("latent_shape", (), "22.0 | 33.0 | 0.110"),
    ],
)
def test_with_inception_s_weights_distances_are_fid(command, tmp_path, name, options, cells):
    """A point that was measured without them is measured again, and the first one stays for who has none."""
    weights, others = (tmp_path / name for name in ("inception.pth", "others.pth"))
    weights.write_bytes(b"weights")
    others.write_bytes(b"others")
    first, results = command(name, *options)
    page = results.with_suffix(".md").read_text()
    again, _ = command(name, *options, "--inception-weights", str(weights))
    assert [config.path for config in again] == [config.path for config in first]
    assert {config.evaluate.inception_weights for config in again} == {str(weights)}
    of_fid = results.with_suffix(".md").read_text()
    assert f"| {cells} |" in of_fid
    assert "fd is fid of 5 samples" in of_fid
    assert "kd kid, the kernel distance" in of_fid
    assert "--inception-weights FILE" in of_fid
    assert command(name, *options, "--inception-weights", str(weights))[0] == []
    assert len(command(name, *options, "--inception-weights", str(others))[0]) == len(first)
    assert command(name, *options, "--inception-weights", str(weights))[0] == []
    assert command(name, *options)[0] == []
    assert results.with_suffix(".md").read_text() == page
    assert "fd is fd_efflite0 of 5 samples" in page


def test_each_run_is_evaluated_by_each_sampler(command):
    """It is trained once: the next sampler goes on with a run that is there, which may have another sampler."""
    options = ("--methods", "unified", "pixels", "--lengths", "1")
    one, _ = command("compute_vs_fid", *options, "--samplers", "dpmpp_2m")
    both, results = command("compute_vs_fid", *options)
    assert [config.sample.solver for config in (*one, *both)] == ["dpmpp_2m"] * 4 + ["ancestral"] * 4
    for first, second in zip(one, both, strict=True):
        assert first.path == second.path
        assert differences(first, second, ignore=(*run_folder.HARMLESS, "autoencoder")) == []
    page = results.with_suffix(".md").read_text()
    assert (page.count("| dpmpp_2m |"), page.count("| ancestral |")) == (4, 4)
    assert command("compute_vs_fid", *options)[0] == []


def test_samples_are_shown_of_the_runs_that_are_there(command, tmp_path):
    options = ("--methods", "unified", "pixels", "--lengths", "0.5", "1", "--samplers", "euler", "--more")
    asked, results = command("compute_vs_fid", *options)
    picture = results.with_name("compute_vs_fid_smoke_samples.png")
    assert not picture.exists()
    longest = {config.variant: config for config in sorted(asked, key=lambda config: config.train_base.steps)}
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    for shown, config in enumerate(longest.values()):
        evaluation.Evaluation({}, {"base_samples": images}).save(config.path / "evaluation")
        (config.path / "dataset.json").write_text(json.dumps({"attribution": "drawn at random"}))
        assert command("compute_vs_fid", *options)[0] == []
        height = plt.imread(picture).shape[0]
        assert height == pytest.approx(150 * 1.05 * (1 + shown), abs=2)
        assert (results.parent / "ATTRIBUTION.txt").read_text() == "drawn at random\n"


def test_any_tokenizer_has_a_row_beside_the_methods(command, small_dataset, tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        "class Half:\n"
        "    def encode(self, x): return x[:, ::2, ::2]\n"
        "    def decode(self, z, key): return z.repeat(2, 1).repeat(2, 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ulx.data.open_dataset", lambda config: small_dataset)
    monkeypatch.setattr(efficientnet, "load", Corner)
    monkeypatch.setattr(proxy, "fit", lambda state, *_, **__: SimpleNamespace(ema_model=state.model))
    monkeypatch.setenv("ULX_CACHE_DIR", str(tmp_path / "cache"))
    given = ("--methods", "unified", "--lengths", "0.02", "0.04", "--tokenizers", "halves:Half")
    asked, results = command("compute_vs_fid", *given)
    assert {config.variant for config in asked} == {"unified"}
    found = points.read(results.with_suffix(".jsonl"))
    mine = [point for point in found if point["config"]["variant"] == "halves:Half"]
    assert [(point["base_steps"], point["config"]["sample"]["solver"]) for point in mine] == [
        (2, "dpmpp_2m"),
        (2, "ancestral"),
        (4, "dpmpp_2m"),
        (4, "ancestral"),
    ]
    short, long = (point["cost"]["training_flops_stage2"] for point in mine[::2])
    assert long == 2 * short > 0
    rows = [
        line.split(" | ") for line in results.with_suffix(".md").read_text().splitlines() if "| halves:Half" in line
    ]
    assert [(row[1], row[3], row[4]) for row in rows] == [
        *2 * [("2", "", "")],
        *2 * [("4", "", "")],
    ]  # no total, no rate
    for row, point in zip(rows, mine, strict=True):
        fd = point["fd_efflite0"]
        assert row[5:7] == [f"{fd[what]['value']:.1f}" for what in ("reconstruction", "base")]
        assert fd["base"]["value"] != fd["reconstruction"]["value"]
    again, _ = command("compute_vs_fid", *given)
    assert again == []
    assert points.read(results.with_suffix(".jsonl")) == found


def changed(config: Config, baseline: Config) -> set[str]:
    return {line.partition(":")[0] for line in differences(baseline, config, ignore=("name", "variant"))}


def test_ablations_differ_from_the_baseline_in_what_they_name():
    settings = ablations.Settings(other_data="images")
    configs = {row: ablations.config_of(row, 0, settings) for row in settings.all_rows}
    baseline = configs.pop("unified")
    trained = changed(dataclasses.replace(baseline, train_decoder=baseline.train), baseline)  # the decoder, as stage 1
    assert trained
    assert {row: changed(config, baseline) for row, config in configs.items()} == {
        "mse": {"model.reconstruction", *trained},
        "normal-prior": {"model.latent_prior"},
        "normal-prior-mse": {"model.latent_prior", "model.reconstruction", *trained},
        "stop-gradient": {"prior_gradient", "kl_weight"},  # and 8 channels, which the baseline has
        "low-noise": {"model.logsnr_0"},
        "learned-variance": {"model.encoder.variance"},
        "other-data": set(),
    }
    assert configs["mse"].train_configs["decoder"] == baseline.train
    other = ablations.of_other_data(configs["other-data"], "images")
    assert changed(other, configs["other-data"]) == {"data.source", "data.path"}


def test_an_autoencoder_of_other_data_is_trained_first_and_taken(command, monkeypatch):
    trained = []
    monkeypatch.setattr(points, "stage1", trained.append)
    asked, results = command("ablations", "--rows", "unified", "--other-data", "images")
    assert [config.data.path for config in trained] == ["images"]
    assert [config.autoencoder for config in asked] == [None, str(trained[0].path)]
    assert asked[1].data == asked[0].data
    assert "| C | autoencoder trained on other data |" in results.with_suffix(".md").read_text()
    again, _ = command("ablations", "--rows", "unified", "--other-data", "images")
    assert again == []
    assert len(trained) == 1
    # Of another folder it is another point.
    another, _ = command("ablations", "--rows", "unified", "--other-data", "others")
    assert len(another) == 1


@pytest.mark.parametrize(
    ("options", "within", "shapes"),
    [
        ({}, 0.06, [(8, 2), (8, 4), (8, 8), (8, 16), (16, 8), (4, 8)]),
        # Tab. 3 and 4 of the paper. Among 1,024 tokens, attention is more of the whole than among 256.
        ({"path": "shards"}, 0.13, [(32, 4), (32, 8), (32, 16), (32, 32), (32, 64), (64, 32), (16, 32)]),
    ],
)
def test_latents_have_their_shapes_at_comparable_compute(options, within, shapes):
    settings = latent_shape.Settings(**options)
    assert settings.shapes == shapes
    own = settings.own
    preset = points.Settings(**options).config()
    assert changed(latent_shape.config_of(own, 0, settings), preset) == {"evaluate.flow_images"}
    with pytest.raises(ValueError, match=f"grids are {2 * own[0]}, {own[0]} and {own[0] // 2} positions each way here"):
        latent_shape.Settings(grids=(7,), **options)
    flops = {}
    for shape in shapes:
        config = latent_shape.config_of(shape, 0, settings)
        model = eqx.filter_eval_shape(UnifiedLatents, config.data.shape, config.model, key=jax.random.key(0))
        assert model.latent_shape == (shape[0], shape[0], shape[1])
        base = eqx.filter_eval_shape(
            lambda key, c=config, m=model: Denoiser(
                UViT(m.latent_shape, c.model.base, conditions=ConditionSpec(num_classes=10), key=key)
            ),
            jax.random.key(0),
        )
        flops[shape] = {name: cost.forward_flops for name, cost in network_costs(model, base).items()}
    for shape in shapes:
        for name, found in flops[shape].items():
            # Attention over fewer tokens, and the first and last layers, make the difference.
            assert found == pytest.approx(flops[own][name], rel=within), (shape, name)


def test_samplers_get_the_calls_that_are_asked_for(small_config):
    settings = sampling.Settings(calls=(8, 4), tolerances=(1e-3, 1e-2))

    def samples(sampler, part):
        return [config.sample for config in sampling.configs_of(sampler, part, small_config, settings)]

    own = small_config.sample
    assert samples("heun", "latents") == [dataclasses.replace(own, solver="heun", num_steps=n) for n in (2, 4)]
    assert samples("euler-churn", "decoder") == [
        dataclasses.replace(own, decoder_solver="euler", decoder_churn=1.0, decoder_num_steps=n) for n in (4, 8)
    ]
    assert samples("tsit5", "latents") == [
        dataclasses.replace(own, solver="tsit5", tolerance=tolerance) for tolerance in (1e-2, 1e-3)
    ]


@pytest.fixture
def finished_run(trained_run, small_dataset, tmp_path, monkeypatch) -> Path:
    """The run at its last step, as its settings have it, under another name."""
    monkeypatch.setattr("ulx.data.open_dataset", lambda data: small_dataset)
    monkeypatch.setattr("ulx.metrics.efficientnet.load", lambda: Corner())
    path = tmp_path / "finished"
    shutil.copytree(trained_run, path)
    config = run_folder.read_config(path)
    train = dataclasses.replace(config.train_base, steps=runs.load(path).step[1])
    data = dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache"))
    (path / "config.json").write_text(to_json(dataclasses.replace(config, train_base=train, data=data)))
    return path


def test_sampling_spends_what_it_reports_and_is_not_repeated(finished_run, tmp_path, monkeypatch):
    file = tmp_path / "results" / "sampling.jsonl"
    settings = sampling.Settings(run=str(finished_run), samplers=("heun", "tsit5"), calls=(2,), tolerances=(0.1,))
    *_, shown = sampling.measured(settings, file)
    assert [(point.part, point.sampler) for point in shown] == [
        (part, sampler) for part in ("latents", "decoder") for sampler in ("heun", "tsit5")
    ]
    heun, adaptive = shown[0].found["nfe"], shown[1].found["nfe"]
    assert heun == shown[2].found["nfe"] == 2  # one step
    assert adaptive >= 7
    assert len({point.distance for point in shown}) == len(shown)

    sampling.write(shown, settings, file)
    page = file.with_suffix(".md").read_text()
    assert f"| tsit5, tolerance 0.1 | {adaptive} |" in page
    assert page.count("\n| heun | 2 |") == 2
    assert file.with_suffix(".png").stat().st_size > 1000
    # Nothing is measured again, nor is the run even read.
    monkeypatch.setattr(runs, "load", lambda *args: pytest.fail("read again"))
    *_, again = sampling.measured(settings, file)
    assert [point.found for point in again] == [point.found for point in shown]


@pytest.mark.slow
def test_sampling_as_the_run_does_repeats_its_evaluation(finished_run, small_dataset, tmp_path):
    """By euler in two steps, in both parts: the same noise, labels and distances."""
    settings = sampling.Settings(run=str(finished_run), samplers=("euler",), calls=(2,))
    *_, (latents, decoder) = sampling.measured(settings, tmp_path / "sampling.jsonl")
    run = runs.load(finished_run)
    assert run.base is not None
    whole = evaluation.evaluate(run.model, run.base, small_dataset, run.config).metrics
    assert latents.distance == pytest.approx(whole["fd_efflite0"]["base"]["value"], rel=1e-6)
    assert decoder.distance == pytest.approx(whole["fd_efflite0"]["reconstruction"]["value"], rel=1e-6)
    assert decoder.found["psnr"]["value"] == pytest.approx(whole["psnr"]["value"], rel=1e-6)


def test_sampling_refuses_a_run_that_goes_on(trained_run, tmp_path):
    settings = sampling.Settings(run=str(trained_run), samplers=("euler",))
    with pytest.raises(ValueError, match="has not finished its base model"):
        next(sampling.measured(settings, tmp_path / "sampling.jsonl"))
    with pytest.raises(FileNotFoundError, match="nothing is not a run"):
        sampling.trained(dataclasses.replace(settings, run=str(tmp_path / "nothing")))


def test_speed_measures_what_is_asked(monkeypatch, capsys, tmp_path):
    out = tmp_path / "speed.json"
    small = ("--preset", "smoke", "--batch-size", "4", "--repeats", "1", "--rounds-before", "0", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["speed", *small, "--work", "stage2", "encode"])
    speed.main()
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found["work"]) == ["stage2", "encode"]
    for name, one in found["work"].items():
        ours = one["ulx"]
        assert ours["examples_per_s"] * ours["seconds"] == pytest.approx(4)
        rate = ours["examples_per_s"] * one["gflops_per_example"]
        assert ours["share_of_matmul"] == pytest.approx(rate / one["matmul_gflop_per_s"])
        assert ours["time_over_ulx"] == {"median": 1, "low": 1, "high": 1}
        assert ours["compile_s"] > 0 < ours["memory_mib"]
        assert f"| {name} | ulx | {ours['examples_per_s']:.3g} |" in shown
    assert 0 < found["work"]["stage2"]["input_share"] < 1
    # Another work joins them in the file, with half of the network calls.
    monkeypatch.setattr(sys, "argv", ["speed", *small, "--work", "sample", "--sampling-steps", "3"])
    speed.main()
    more = json.loads(out.read_text())["work"]
    assert list(more) == ["stage2", "encode", "sample"]
    assert more["encode"] == found["work"]["encode"]
    assert more["sample"]["steps"] == 3
    # The table of costs has all of them.
    monkeypatch.setattr(sys, "argv", ["costs", "--results", str(tmp_path)])
    costs.main()
    page = (tmp_path / "costs.md").read_text()
    train = importlib.import_module("openmoji").PRESETS["smoke"].train_base
    hours = train.steps * train.batch_size / found["work"]["stage2"]["ulx"]["examples_per_s"] / 3600
    row = next(line for line in page.splitlines() if "| stage2 |" in line)
    assert row.endswith(f"| {costs.length(hours * 3600)} |")
    assert "| sample, 3 steps |" in page
    # A preset that encodes batch by batch does not train as fast as kept latents would allow.
    online = found | {"experiment": "kinetics600", "work": {"stage2_online": found["work"]["stage2"]} | found["work"]}
    assert [bool(row[-1]) for row in costs.rows(online)] == [True, False, False]


def test_a_spacing_is_tuned_against_the_fine_solution(finished_run, monkeypatch, capsys, tmp_path):
    argv = ["--run", str(finished_run), "--solver", "heun", "--steps", "2", "6", "--inverse-rho", "0", "0.3"]
    argv += ["--fine-steps", "6", "--count", "4", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tune_grid", *argv])
    tune_grid.main()
    results = json.loads((tmp_path / "tune_grid.json").read_text())
    assert [(row["part"], row["steps"]) for row in results["rows"]] == [
        (part, steps) for part in ("latents", "decoder") for steps in (2, 6)
    ]
    for row in results["rows"]:
        even, bent = row["errors"]
        if row["steps"] == 6:  # the fine solution itself
            assert (even, row["best"]) == (0, 0)
        assert bent > 0
        assert row["best"] == (0 if even < bent else 0.3)
    assert "| latents | 2 |" in capsys.readouterr().out
