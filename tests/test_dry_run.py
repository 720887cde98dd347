"""The costs that are printed are those of the run that would follow."""

import dataclasses
import re
import runpy
import sys
from types import SimpleNamespace

import equinox as eqx
import imagenet512
import kinetics600
import openmoji
import pytest

from ulx import dry_run, job, runs
from ulx.command_line import experiment
from ulx.cost import network_costs, num_parameters
from ulx.nn.conditions import ConditionSpec
from ulx.progress import duration
from ulx.sharding import bytes_per_device
from ulx.variants import VARIANTS


def stage(text, name):
    """A line of the second table."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name} ") and "GiB" in line)
    return line.split()


def networks_of(config):
    """The autoencoder and the base model of three classes, untrained."""
    model = runs.stage1_state(config, ConditionSpec(num_classes=3)).model
    return model, runs.stage2_state(config, model, ConditionSpec(num_classes=3)).model


@pytest.fixture(scope="module")
def smoke():
    return dry_run.describe(openmoji.PRESETS["smoke"])


def test_sizes_are_those_of_the_networks_that_are_trained(smoke):
    config = openmoji.PRESETS["smoke"]
    state = runs.stage1_state(config, ConditionSpec(num_classes=10))
    base = runs.stage2_state(config, state.model, ConditionSpec(num_classes=10))
    for name, network in {"encoder": state.model.encoder, "decoder": state.model.decoder, "base": base.model}.items():
        assert re.search(rf"^{name} +{num_parameters(network) / 1e6:.1f} M ", smoke, re.M)
    flops = job.cost(state.model, base.model, config)
    for name in ("stage1", "stage2"):
        steps, batch, count, *_ = stage(smoke, name)[1:]
        assert (int(steps), int(batch)) == (100, 16)
        assert float(count) == pytest.approx(flops[f"training_flops_{name}"], rel=0.05)
    assert "32×32×3 images from openmoji, 10 classes, latents 8×8×8" in smoke


def test_training_flops_by_hand(small_config):
    """3 × forward for each example of what is trained; of a frozen encoder the forward pass, if it sees every batch."""
    model = runs.stage1_state(small_config).model
    base = runs.stage2_state(small_config, model, ConditionSpec(num_classes=3)).model
    one = {name: found.forward_flops for name, found in network_costs(model, base).items()}
    examples = small_config.train.steps * small_config.train.batch_size
    assert examples == 24
    for cached in (True, False):
        found = job.cost(model, base, dataclasses.replace(small_config, cache_latents=cached))
        stage1 = 3 * (one["encoder"] + one["prior"] + one["decoder"])
        stage2 = 3 * one["base"] + (0 if cached else one["encoder"])
        assert found["training_flops_stage1"] == examples * stage1
        assert found["training_flops_stage2"] == examples * stage2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_described(variant):
    config = VARIANTS[variant].change(openmoji.PRESETS["smoke"])
    text = dry_run.describe(config, compiled=False)
    for name in ("stage1", "decoder", "stage2"):
        assert (f"\n{name}  " in text.split("stage ")[1]) == (name in config.stages)


def test_weights_are_counted_in_bytes(small_config):
    """Parameters, two moments and the average in float32, the frozen autoencoder of stage 2, and counters."""
    state = eqx.filter_eval_shape(lambda: runs.stage1_state(small_config))
    parameters = num_parameters(eqx.filter(runs.stage1_state(small_config).model, eqx.is_inexact_array))
    assert 4 * 4 * parameters <= bytes_per_device(state) < 4 * 4 * parameters + 100


def test_memory_of_a_step_grows_with_the_batch(small_config):
    def memory(size):
        train = dataclasses.replace(small_config.train, batch_size=size)
        return (
            dry_run.planned(dataclasses.replace(small_config, train=train), ConditionSpec(num_classes=3))
            .steps["stage1"]
            .memory()
        )

    one, two, four = memory(8), memory(16), memory(32)
    # Affine in the batch: activations grow with it, gradients do not. A fifth for what the compiler packs otherwise.
    assert four - two == pytest.approx(2 * (two - one), rel=0.2)
    assert two > one > 4 * num_parameters(runs.stage1_state(small_config).model)


def test_each_of_several_devices_has_its_part_of_the_batch(small_config, monkeypatch):
    """What is compiled, and asked for its memory, is the step of half the batch; and the time is half."""

    def compiled(batch, devices):
        train = dataclasses.replace(small_config.train, batch_size=batch, accumulate=2)
        plan = dry_run.planned(dataclasses.replace(small_config, train=train), ConditionSpec(num_classes=3))
        return plan.steps["stage1"].lower(devices).as_text()

    assert compiled(8, 2) == compiled(4, 1) != compiled(8, 1)

    asked = []
    monkeypatch.setattr(dry_run.PlannedStep, "memory", lambda self, devices: asked.append(devices) or 2**30)
    monkeypatch.setattr(dry_run, "matmul_speed", lambda dtype: 1e6)
    monkeypatch.setattr(dry_run, "num_classes", lambda data: 3)
    described, checked = {}, []
    check = lambda size, mesh, *, pieces, of: checked.append((size, mesh.size, pieces, of))  # noqa: E731
    monkeypatch.setattr(dry_run, "check_batch", check)
    for devices in (1, 2):
        monkeypatch.setattr(dry_run, "make_mesh", lambda devices=devices: SimpleNamespace(size=devices))
        described[devices] = dry_run.describe(small_config)
    one, two = described[1], described[2]
    assert asked == [1, 1, 2, 2]
    flops = job.cost(*networks_of(small_config), small_config)["training_flops_stage1"]
    for text, devices in ((one, 1), (two, 2)):
        assert duration(flops / (devices * dry_run.SHARE * 1e6)) in text
    assert "of each of 2 devices, with its part of the batch" in two
    assert "of 2 × " in two
    assert "activations of the batch" in one
    # A batch that they do not divide is refused as the run refuses it, stage by stage.
    assert checked == [(4, devices, 1, stage) for devices in (1, 2) for stage in ("stage1", "stage2")]


def test_a_frozen_encoder_s_time_is_that_of_float32(small_config, monkeypatch):
    """Which it works in, whatever the base model is trained in; cached latents need none."""
    monkeypatch.setattr(dry_run, "matmul_speed", {"float32": 1e6, "bfloat16": 8e6}.get)
    monkeypatch.setattr(dry_run, "num_classes", lambda data: 3)
    train = dataclasses.replace(small_config.train_base, dtype="bfloat16")
    for cached in (True, False):
        config = dataclasses.replace(small_config, cache_latents=cached, train_base=train)
        model, base = networks_of(config)
        examples = train.steps * train.batch_size
        one = {name: found.forward_flops for name, found in network_costs(model, base).items()}
        seconds = 3 * one["base"] / 8e6 + (0 if cached else one["encoder"] / 1e6)
        took = duration(examples * seconds / dry_run.SHARE)
        (line,) = (line for line in dry_run.describe(config, compiled=False).splitlines() if line.startswith("stage2 "))
        assert line.split()[-1] == took


def test_speed_is_one_that_a_machine_can_have():
    assert 1e8 < dry_run.matmul_speed("float32", size=256) < 1e16


@pytest.mark.parametrize(("module", "size"), [(imagenet512, 512), (kinetics600, 128)])
def test_paper_presets_are_described_without_training(module, size):
    for name in ("small", "medium"):
        text = dry_run.describe(module.PRESETS[name], compiled=False)
        assert f"{size}×{size}×3" in text
        assert "not asked" in text
        assert stage(text, "stage1")[1] == "400,000"
    assert module.PRESETS["small"].data.shape[-3:] == (size, size, 3)


def run(monkeypatch, *args, **how):
    """What an experiment makes of a command line; nothing is trained."""
    found = []
    monkeypatch.setattr(job, "run", found.append)
    monkeypatch.setattr(dry_run, "describe", lambda config: found.append(config) or "a table")
    monkeypatch.setattr(sys, "argv", ["experiment.py", *args])
    experiment(imagenet512.PRESETS, "", **how)
    return found[0]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (imagenet512, "this is not ImageNet but the embedded openmoji, 32 pixels."),
        (kinetics600, "this is not Kinetics-600 but the embedded moving-emoji, 32 pixels."),
    ],
)
def test_without_a_path_it_is_the_embedded_data_and_says_so_first(monkeypatch, capsys, module, said):
    """The file itself, as its command runs it."""
    found = []
    monkeypatch.setattr(job, "run", found.append)
    monkeypatch.setattr(sys, "argv", [module.__file__])
    runpy.run_path(module.__file__, run_name="__main__")
    assert found == [module.PRESETS["tiny"]]
    assert capsys.readouterr().out.splitlines()[0] == f"No --data.path: {said}"


def test_with_a_path_it_is_the_papers_preset_on_what_was_prepared(monkeypatch, capsys):
    config = run(monkeypatch, "--data.path", "shards", of="ImageNet", on_files="small")
    assert config.preset == "small"
    assert (config.data.source, config.data.path, config.data.resolution) == ("prepared", "shards", 512)
    assert config.model == imagenet512.PRESETS["small"].model
    config = run(monkeypatch, "--data.path=shards", "--preset", "medium", of="ImageNet", on_files="small")
    assert (config.preset, config.data.source) == ("medium", "prepared")
    folder = ("--data.path", "photos", "--data.source", "folder", "--preset", "tiny")
    config = run(monkeypatch, *folder, of="ImageNet", on_files="small")
    assert (config.preset, config.data.source) == ("tiny", "folder")
    assert not capsys.readouterr().out


def test_a_dry_run_trains_nothing(monkeypatch, capsys):
    config = run(monkeypatch, "--dry-run", "--preset", "small", of="ImageNet", on_files="small")
    assert config == imagenet512.PRESETS["small"]
    assert "a table" in capsys.readouterr().out


def test_every_preset_is_one_of_its_name_and_goes_through_json():
    from ulx.config import from_json, to_json

    for module in (imagenet512, kinetics600):
        for name, preset in module.PRESETS.items():
            assert preset.preset == name
            assert from_json(to_json(preset)) == preset
