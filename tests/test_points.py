"""When a measured point is this one: the benchmarks' memory."""

import dataclasses
import json
import math

import ablations
import bitrate_vs_fid
import compute_vs_fid
import gfid_proxy
import latent_shape
import points
import pytest

from ulx.config import Config, to_json
from ulx.data.source import Dataset
from ulx.presets import PAPER


def point(config: Config) -> dict:
    return {"config": json.loads(to_json(config))}


def test_a_point_is_known_by_its_settings_wherever_its_run_was(small_config):
    here = point(small_config)
    evaluate = dataclasses.replace(small_config.evaluate, lpips=True)
    elsewhere = dataclasses.replace(
        small_config, name="other", runs="there", resume=True, autoencoder="runs/one", evaluate=evaluate
    )
    assert points.same(here, elsewhere)
    assert not points.same(here, dataclasses.replace(small_config, loss_factor=1.75))
    assert not points.same(here, dataclasses.replace(small_config, seed=1))


def test_settings_that_came_later_count_at_their_defaults(small_config):
    old = point(small_config)
    del old["config"]["model"]["given_frames"]
    assert points.same(old, small_config)
    old["config"]["abolished"] = 1
    assert not points.same(old, small_config)
    assert not points.same({}, small_config)


def test_what_was_measured_is_not_measured_again(small_config, small_dataset: Dataset, tmp_path):
    asked = []

    def measure(config):
        asked.append(config.loss_factor)
        return {"found": 10 * config.loss_factor}

    for factor in (2.0, 3.0):
        config = dataclasses.replace(small_config, runs=str(tmp_path), name=f"{factor}", loss_factor=factor)
        config.path.mkdir()
        (config.path / "dataset.json").write_text(json.dumps({"fingerprint": small_dataset.fingerprint}))
        for _ in range(2):
            found = points.measured(config, tmp_path / "results" / "points.jsonl", measure)
            assert (found["found"], found["data"]) == (10 * factor, small_dataset.fingerprint)
    assert asked == [2.0, 3.0]


def test_runs_of_the_sweeps_are_points_of_their_own():
    sweep = bitrate_vs_fid.Settings()
    configs = [config for pair in sweep.pairs for config in bitrate_vs_fid.configs_of(pair, 0, sweep).values()]
    compute = compute_vs_fid.Settings()
    configs += [config for method in compute.methods for config in compute_vs_fid.configs_of(method, compute)]
    assert len({str(config.path) for config in configs}) == len(configs)
    known = [point(config) for config in configs]
    assert [points.find(known, config) for config in configs] == known


@pytest.mark.parametrize("benchmark", [bitrate_vs_fid, compute_vs_fid, latent_shape, ablations])
def test_on_imagenet_it_is_the_papers_preset_in_files_of_its_own(benchmark):
    on_drawings, settings = benchmark.Settings(), benchmark.Settings(path="shards")
    config = settings.config()
    assert (config.data.source, config.data.path, config.data.resolution) == ("prepared", "shards", 512)
    assert config.model == PAPER["imagenet512-small"].model
    assert settings.file("sweep").name == "sweep_imagenet512.jsonl"
    assert settings.options == "--path shards"
    assert on_drawings.options == "--preset tiny"
    assert on_drawings.config().data.source == "openmoji"


def test_pixels_have_as_many_tokens_as_latents():
    for settings in (compute_vs_fid.Settings(), compute_vs_fid.Settings(path="shards")):
        configs = {method: compute_vs_fid.configs_of(method, settings)[0] for method in ("unified", "pixels")}
        reduction = configs["unified"].model.encoder.reduction(2)[0]
        assert configs["pixels"].model.base.patch == reduction * configs["unified"].model.base.patch


def test_a_run_that_was_begun_goes_on_with_the_autoencoder_that_it_has_copied(small_config, tmp_path):
    config = dataclasses.replace(small_config, runs=str(tmp_path), autoencoder=str(tmp_path / "gone"))
    found = points.resumable(config)
    assert (found.autoencoder, found.resume) == (None, False)
    config.path.mkdir()
    (config.path / "config.json").write_text("{}")
    found = points.resumable(config)
    assert (found.autoencoder, found.resume) == (config.autoencoder, True)


def test_all_machines_are_named_once():
    assert points.machines({"machine": name} for name in "aba") == "a; b"


def test_without_more_weight_than_the_prior_s_nothing_is_worth_its_bits():
    assert bitrate_vs_fid.cut_off((1.4, 2.0)) == pytest.approx(1.4)
    assert bitrate_vs_fid.cut_off((1.4, 1.0)) == bitrate_vs_fid.cut_off((1.4, 0.5)) == -math.inf


def test_ranks_are_what_is_correlated():
    assert gfid_proxy.spearman([1.0, 2.0, 30.0], [0.1, 5.0, 5.5]) == pytest.approx(1)
    assert gfid_proxy.spearman([1.0, 2.0, 3.0], [9.0, 5.0, -5.5]) == pytest.approx(-1)
    # Spearman's formula for ranks without ties: 1 − 6 Σd²/(n(n² − 1)).
    assert gfid_proxy.spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))
