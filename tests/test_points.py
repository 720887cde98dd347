"""When a measured point is this one: the benchmarks' memory."""

import dataclasses
import json
import math

import ablations
import bitrate_vs_fid
import compute_vs_fid
import gfid_proxy
import latent_shape
import loss_factor
import points
import pytest
import tyro

from ulx.config import Config, to_json
from ulx.data.source import Dataset
from ulx.nn.grid import per_axis
from ulx.presets import PAPER
from ulx.proxy import RECIPE
from ulx.weightings import sigmoid_bias


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


def test_what_does_not_touch_the_numbers_makes_no_other_point(small_config):
    model, train = small_config.model, dataclasses.replace(small_config.train, accumulate=2, save_every=3, spike=9.0)
    prior = dataclasses.replace(model.prior, block=dataclasses.replace(model.prior.block, remat="none"))
    evaluate = dataclasses.replace(small_config.evaluate, batch_size=2)
    model = dataclasses.replace(model, prior=prior)
    assert points.same(point(small_config), dataclasses.replace(small_config, model=model, train=train))
    assert points.same(point(small_config), dataclasses.replace(small_config, fsdp=2, evaluate=evaluate))
    for changes in (
        {"sample": dataclasses.replace(small_config.sample, num_steps=3)},
        {"evaluate": dataclasses.replace(small_config.evaluate, num_samples=9)},
        {"data": dataclasses.replace(small_config.data, source="folder", path="elsewhere")},
    ):
        assert not points.same(point(small_config), dataclasses.replace(small_config, **changes))


def test_the_committed_points_are_those_that_the_benchmarks_ask_for():
    """Or hours would be spent again, and beside the old numbers. Whoever changes the presets measures again, or says
    in the README what the results are of, and changes this."""
    # At 32 pixels the second sampler has not been tried.
    sweep, compute = bitrate_vs_fid.Settings(), compute_vs_fid.Settings(samplers=("dpmpp_2m",))
    of_sweep = [bitrate_vs_fid.configs_of(pair, 0, sweep) for pair in sweep.all_pairs]
    asked = {
        "bitrate_vs_fid": [config for configs in of_sweep for config in configs.values()],
        "compute_vs_fid": [c for method in compute.methods for c in compute_vs_fid.configs_of(method, 0, compute)],
        "gfid_proxy": [configs["large"] for configs in of_sweep],
    }
    for name, configs in asked.items():
        known = points.read(points.RESULTS / f"{name}.jsonl")
        found = [points.find(known, config) for config in configs]
        assert None not in found, name
        assert len({id(each) for each in found}) == len(configs)
    known = points.read(points.RESULTS / "compute_vs_fid.jsonl")
    longest = {m: points.find(known, compute_vs_fid.configs_of(m, 0, compute)[-1]) for m in ("unified", "pixels")}
    assert longest["pixels"] is not None
    assert longest["unified"] is not None
    assert points.find(known, compute_vs_fid.of_equal_total(longest["pixels"], longest["unified"], 0, compute))
    assert all(points.find(known, compute_vs_fid.with_more_bits(times, 0, compute)) for times in compute.more)
    at_64 = compute_vs_fid.Settings(preset="tiny64", lengths=(0.25, 0.5, 1.0))
    known = points.read(points.RESULTS / "compute_vs_fid_tiny64.jsonl")
    of_64 = [config for method in at_64.methods for config in compute_vs_fid.configs_of(method, 0, at_64)]
    pixels, unified = (points.find(known, compute_vs_fid.configs_of(m, 0, at_64)[-1]) for m in ("pixels", "unified"))
    assert pixels is not None
    assert unified is not None
    of_64.append(compute_vs_fid.of_equal_total(pixels, unified, 0, at_64))
    of_64 += [compute_vs_fid.with_more_bits(times, 0, at_64) for times in at_64.more]
    assert all(points.find(known, each) for config in of_64 for each in compute_vs_fid.by_samplers(config, at_64))
    factors = loss_factor.Settings()
    known = points.read(points.RESULTS / "loss_factor.jsonl")
    assert all(points.find(known, loss_factor.config_of(each, factors), points.OF_BASE) for each in factors.factors)
    of_proxy = points.read(points.RESULTS / "gfid_proxy.jsonl")
    assert all(gfid_proxy.is_of(each, RECIPE) for each in of_proxy)


def test_a_recipe_is_known_by_its_fields():
    old = {"recipe": dataclasses.asdict(RECIPE)}
    del old["recipe"]["train"]["spike"]
    assert gfid_proxy.is_of(old, RECIPE)
    assert not gfid_proxy.is_of(old, dataclasses.replace(RECIPE, grid=4))
    old["recipe"]["abolished"] = 1
    assert not gfid_proxy.is_of(old, RECIPE)
    assert not gfid_proxy.is_of({"recipe": repr(RECIPE)}, RECIPE)  # as it was written once


def test_a_point_that_was_cut_off_while_it_was_written_is_measured_again(small_config, tmp_path):
    config = dataclasses.replace(small_config, runs=str(tmp_path))
    config.path.mkdir()
    (config.path / "dataset.json").write_text('{"fingerprint": "f"}')
    file = tmp_path / "points.jsonl"
    for end in ("\n", ""):  # and by hand, without a last newline
        file.write_text('{"first": "\u00e9"}' + end)
        points.add({"found": 1}, config, file)
        assert [each.get("found") for each in points.read(file)] == [None, 1]
    with file.open("a") as out:
        out.write('{"second": 2, "thi')
    assert len(points.read(file)) == 2
    points.add({"found": 3}, config, file)
    assert [each.get("found") for each in points.read(file)] == [None, 1, 3]
    file.write_text('{"first": 1}\n{"seco\n{"third": 3}\n')
    with pytest.raises(ValueError, match=r"points\.jsonl, line 2, is no JSON"):
        points.read(file)


def test_runs_of_the_sweeps_are_points_of_their_own():
    sweep = bitrate_vs_fid.Settings()
    configs = [config for pair in sweep.all_pairs for config in bitrate_vs_fid.configs_of(pair, 0, sweep).values()]
    compute = compute_vs_fid.Settings()
    configs += [config for method in compute.methods for config in compute_vs_fid.configs_of(method, 0, compute)]
    configs += [compute_vs_fid.with_more_bits(2.0, 0, compute)]
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
    assert benchmark.Settings(preset="smoke", runs="r", seeds=(0, 1)).options == "--preset smoke --seeds 0 1"
    assert on_drawings.config().data.source == "openmoji"


def test_a_page_s_command_is_the_one_that_made_it():
    given = compute_vs_fid.Settings(preset="tiny64", lengths=(0.25, 0.5), more=(), results="elsewhere", sample_steps=8)
    assert given.options == "--preset tiny64 --lengths 0.25 0.5 --more --sample-steps 8"
    assert tyro.cli(compute_vs_fid.Settings, args=[*given.options.split(), "--results", "elsewhere"]) == given
    sweep = bitrate_vs_fid.Settings(pairs=((1.4, 4.0), (2.5, 2.0)))
    assert tyro.cli(bitrate_vs_fid.Settings, args=sweep.options.split()) == sweep


def test_on_imagenet_loss_factors_are_the_papers_and_lengths_parts_of_its_training():
    sweep, compute = bitrate_vs_fid.Settings(path="shards"), compute_vs_fid.Settings(path="shards")
    configs = [bitrate_vs_fid.configs_of(pair, 0, sweep)["large"] for pair in sweep.all_pairs]
    rule = sigmoid_bias(512)
    of_rule = [config.loss_factor for config in configs if config.decoder_weighting.bias == rule]
    assert of_rule == [1.3, 1.5, 1.7, 1.9, 2.1]  # Tab. 2
    cut_offs = [bitrate_vs_fid.cut_off(pair) for pair in sweep.all_pairs]
    assert sorted(cut_offs)[0] < cut_offs[-1] < sorted(cut_offs)[-2]  # of another b, among them
    whole = compute.config().train_base.steps
    assert [c.train_base.steps for c in compute_vs_fid.configs_of("unified", 0, compute)] == [
        whole // 8,
        whole // 4,
        whole // 2,
        whole,
    ]


def test_pixels_are_trained_for_as_much_as_latents_cost_altogether():
    settings = compute_vs_fid.Settings()
    cost = {"training_flops_stage1": 7e12, "training_flops_stage2": 9e12}
    pixels = {"base_steps": 4000, "cost": {"training_flops_stage2": 8e12}}
    found = compute_vs_fid.of_equal_total(pixels, {"base_steps": 4000, "cost": cost}, 3, settings)
    assert found.train_base.steps == 8000
    assert (found.model.latent, found.seed) == ("pixels", 3)


def test_pixels_have_as_many_tokens_as_latents():
    """And the same transformer; between pixels and tokens they have what the decoder has, so that no token is as narrow
    as what it stands for."""
    of_presets = [compute_vs_fid.Settings(preset=preset) for preset in ("tiny", "tiny64", "smoke")]
    for settings in (*of_presets, compute_vs_fid.Settings(path="shards")):
        latents, pixels = (compute_vs_fid.configs_of(m, 0, settings)[0].model for m in ("unified", "pixels"))
        (reduction, _), (own, _) = latents.encoder.reduction(2), latents.base.reduction(2)
        assert pixels.base.reduction(2) == (reduction * own, reduction * own)
        assert (pixels.base.channels, pixels.base.blocks) == (latents.base.channels, latents.base.blocks)
        assert pixels.base.block == latents.base.block
        assert pixels.base.conv_channels == latents.decoder.conv_channels
        first = (*pixels.base.conv_channels, pixels.base.channels[0])[0]
        assert 3 * math.prod(per_axis(pixels.base.patch, 2)) < first
    narrow = dataclasses.replace(compute_vs_fid.Settings().config().model.decoder, patch=8)
    preset = compute_vs_fid.Settings().config()
    preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, decoder=narrow))
    with pytest.raises(ValueError, match=r"has \(8, 8\) pixels under one, on latents \[4, 4\]"):
        compute_vs_fid.by_method(preset, "pixels")


def test_the_base_model_of_any_tokenizer_is_the_one_of_unified_latents():
    for settings in (compute_vs_fid.Settings(), compute_vs_fid.Settings(path="shards"), bitrate_vs_fid.Settings()):
        config = settings.config()
        recipe = compute_vs_fid.recipe_of(config)
        assert recipe.bias == config.base_bias
        side = config.data.resolution // config.model.encoder.reduction(2)[0]
        assert recipe.network((side, side, 4)) == dataclasses.replace(
            config.model.base, patch=recipe.network((side, side, 4)).patch
        )
        assert recipe.network((side, side, 4)).reduction(2) == config.model.base.reduction(2)
        assert recipe.network((2 * side, 2 * side, 4)).reduction(2)[0] == 2 * config.model.base.reduction(2)[0]
        assert (recipe.train, recipe.sample) == (config.train_base, config.sample)
        assert recipe.logsnr_1 == config.model.logsnr_1
    of_any = compute_vs_fid.configs_of_tokenizer("mine:Half", 0, compute_vs_fid.Settings())
    assert {config.base_bias for config in of_any} == {RECIPE.bias}  # of latents of variance 1


def test_tokenizers_are_not_measured_on_imagenet():
    with pytest.raises(ValueError, match="--tokenizers with --path: what a base model makes on a tokenizer is held"):
        compute_vs_fid.Settings(path="shards", tokenizers=("mine:Half",))


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
