"""Settings: to JSON and back, what is refused, what is warned of."""

import dataclasses
import math
import signal
import sys

import pytest
from openmoji import PRESETS

from ulx import evaluate, job, proxy, run_folder, weightings
from ulx.command_line import experiment, parse, run_command
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig, differences, from_json, to_json
from ulx.data import DataConfig
from ulx.metrics import __main__ as compare_folders
from ulx.presets import PAPER
from ulx.training import Interrupted
from ulx.variants import VARIANTS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    assert from_json(to_json(PRESETS[preset])) == PRESETS[preset]


def test_steps_per_axis_survive_json():
    config = Config(
        model=PAPER["kinetics600-small"].model, data=DataConfig(source="moving-emoji", clips=True, resolution=128)
    )
    assert from_json(to_json(config)) == config
    assert config.model.encoder.down == ((1, 2, 2), (2, 2, 2), (2, 1, 1))


def test_latents_of_clips_that_begin_anywhere_are_not_cached():
    """They would be of the first frames of each video alone. A run of before can still be read."""
    for data in (DataConfig("folder", path="videos", clips=True), DataConfig("prepared", path="shards", clips=True)):
        config = Config(data=data)
        assert from_json(to_json(config)) == config
        with pytest.raises(ValueError, match=f"clips of --data.source {data.source} begin anywhere .*no-cache-latents"):
            job.run(config)
        job.check_trainable(dataclasses.replace(config, cache_latents=False))
    job.check_trainable(Config(data=DataConfig("moving-emoji", clips=True)))
    job.check_trainable(Config(data=DataConfig("folder", path="images")))


def test_guidance_of_what_is_measured_needs_something_to_move_away_from():
    guided = EvaluateConfig(guidance_scale=1.5)
    assert Config(evaluate=guided).evaluate == guided
    with pytest.raises(ValueError, match=r"guidance_scale 1\.5 moves samples away .* label_dropout=0 trains none"):
        Config(evaluate=guided, label_dropout=0.0)
    with pytest.raises(ValueError, match=r"of a run with captions evaluate\.guidance_sweep is measured"):
        Config(evaluate=guided, data=DataConfig(captions="texts"))
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, got inf"):
        EvaluateConfig(guidance_scale=math.inf)


def test_a_resize_for_weights_that_are_not_there(trained_run, tmp_path):
    for given in (
        lambda: compare_folders.Options(tmp_path, tmp_path, inception_resize="clean-bicubic"),
        lambda: proxy.Options("runs/one", inception_resize="tf1-bilinear"),
        lambda: evaluate.evaluate(evaluate.Options(trained_run, inception_resize="clean-bicubic")),
        lambda: job.run(Config(evaluate=EvaluateConfig(inception_resize="clean-bicubic"))),
    ):
        with pytest.raises(ValueError, match=r"--inception-resize .* is how .* by --inception-weights"):
            given()


def test_unknown_field_in_a_file_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown field train.learning_rates; did you mean learning_rate\?"):
        from_json('{"train": {"learning_rates": 0.1}}')


def test_a_choice_that_is_none_is_refused_in_a_file():
    with pytest.raises(ValueError, match=r"train\.dtype='float16' is none of 'float32', 'bfloat16'"):
        from_json('{"train": {"dtype": "float16"}}')


def test_differences_are_named_by_their_path():
    old = PRESETS["tiny"]
    new = dataclasses.replace(old, loss_factor=1.7, train=dataclasses.replace(old.train, steps=500), name="other")
    assert differences(old, new, ignore=("name",)) == ["loss_factor: 4.0 -> 1.7", "train.steps: 1000 -> 500"]


def test_bias_follows_the_resolution_unless_it_is_set():
    config = Config()
    assert config.decoder_weighting == weightings.sigmoid(bias=weightings.sigmoid_bias(32), factor=1.5)
    assert dataclasses.replace(config, sigmoid_bias=1.0).decoder_weighting.bias == 1.0


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_loss_factor_that_must_collapse_is_warned_of(factor):
    with pytest.warns(UserWarning, match="must collapse"):
        Config(loss_factor=factor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainConfig(batch_size=0), "batch_size must be at least 1"),
        (lambda: TrainConfig(learning_rate=float("nan")), "learning_rate must be positive"),
        (lambda: TrainConfig(ema_decay=1.0), r"ema_decay must be in \[0, 1\)"),
        (lambda: TrainConfig(posthoc_ema=(0.05, 0.5)), r"above 0 and below 0\.289 .*, got 0\.5"),
        (lambda: TrainConfig(posthoc_ema=(0.05, 0.05)), r"posthoc_ema holds a width twice: \(0\.05, 0\.05\)"),
        (lambda: TrainConfig(posthoc_snapshots=0), "posthoc_snapshots must be at least 1"),
        (lambda: SampleConfig(num_steps=0), "num_steps must be at least 1"),
        (lambda: SampleConfig(solver="dpmpp_2m", churn=0.5), "'dpmpp_2m' takes no churn"),
        (lambda: SampleConfig(decoder_solver="ancestral", decoder_churn=0.5), "'ancestral' takes no churn"),
        (lambda: SampleConfig(decoder_tolerance=-1.0), "tolerance=-1.0 is less than float32 can keep"),
        (lambda: SampleConfig(guidance_interval=(2.0, -1.0)), "lowest < highest"),
        (lambda: Config(label_dropout=2.0), r"label_dropout must be in \[0, 1\]"),
        (lambda: Config(prior_warmup=(5, 5)), "first < last"),
        (lambda: Config(train=TrainConfig(steps=250)), "never reach the paper's objective"),
        (lambda: Config(seed=-1), "seed must not be negative"),
        (lambda: Config(name="a/b"), "that of a folder inside"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def command_line(*args):
    return parse(Config, PRESETS, default="tiny", description="", args=args)


def test_command_line_changes_one_thing_of_a_preset():
    config = command_line("--preset", "smoke", "--loss-factor", "1.7", "--train.steps", "60")
    expected = dataclasses.replace(
        PRESETS["smoke"], loss_factor=1.7, train=dataclasses.replace(PRESETS["smoke"].train, steps=60)
    )
    assert config == expected
    assert command_line() == PRESETS["tiny"]


def test_a_variant_changes_the_defaults_and_options_come_on_top():
    changes = {name: variant.change for name, variant in VARIANTS.items()}
    read = lambda *args: parse(Config, PRESETS, default="tiny", variants=changes, description="", args=args)  # noqa: E731
    assert read() == PRESETS["tiny"]
    config = read("--variant", "stop-gradient", "--kl-weight", "0.5", "--preset", "smoke")
    assert (config.variant, config.prior_gradient, config.kl_weight) == ("stop-gradient", 0.0, 0.5)
    assert config.model == PRESETS["smoke"].model
    with pytest.raises(SystemExit):
        read("--variant", "stop-gradients")


def test_a_variant_s_noise_levels_are_those_of_the_resolution_asked_for(monkeypatch):
    """λ_x(1) moves by 2 ln(size ratio), and so does b: from 32 to 64 pixels by 2 ln 2. λ_x(0) stays."""
    found = []
    monkeypatch.setattr(job, "run", found.append)
    for options in ([], ["--data.resolution", "64"], ["--data.resolution=64", "--base-bias", "0.5"]):
        monkeypatch.setattr(sys, "argv", ["openmoji.py", "--variant", "pixels", *options])
        experiment(PRESETS, "")
    small, large, changed = found
    assert (small.data.resolution, large.data.resolution) == (32, 64)
    assert large.model.logsnr_0 == small.model.logsnr_0
    for value in (lambda c: c.model.logsnr_1, lambda c: c.base_bias):
        assert value(small) - value(large) == pytest.approx(2 * math.log(2))
    assert changed.model == large.model
    assert changed.base_bias == 0.5


def test_widths_come_through_the_command_line_and_json():
    config = command_line("--train-base.posthoc-ema", "0.05", "0.1", "--train-base.posthoc-snapshots", "16")
    assert (config.train_base.posthoc_ema, config.train_base.posthoc_snapshots) == ((0.05, 0.1), 16)
    assert config.train.posthoc_ema == ()
    assert from_json(to_json(config)) == config


def test_sampler_options_come_through_the_command_line_and_json():
    given = ("--sample.solver", "heun", "--sample.churn", "0.5", "--sample.guidance-interval", "-2.5", "3")
    config = command_line(*given, "--sample.decoder-solver", "tsit5", "--sample.decoder-tolerance", "1e-2")
    sampler = config.sample
    assert (sampler.solver, sampler.churn, sampler.guidance_interval) == ("heun", 0.5, (-2.5, 3.0))
    assert (sampler.decoder_solver, sampler.decoder_tolerance) == ("tsit5", 0.01)
    assert from_json(to_json(config)) == config


def test_an_unknown_optimizer_is_refused():
    """Also where no type checker looks on, as it does here when one is made."""
    config = TrainConfig()
    object.__setattr__(config, "optimizer", "sgd")
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': use one of adamw, muon"):
        config.__post_init__()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--los-factor", "1.7"), "--loss-factor"),
        (("--preset", "enormous"), "enormous"),
        (("--train.steps", "0"), "steps must be at least 1, got 0"),
        (("--data.source", "folder"), "--data.path"),
    ],
)
def test_mistakes_on_the_command_line_end_in_a_clear_message(args, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line(*args)
    assert stopped.value.code not in (0, None)
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_errors_end_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")

    def fail():
        raise FileNotFoundError("no folder /nowhere")

    with pytest.raises(SystemExit) as stopped:
        run_command(fail)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: no folder /nowhere\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_exit_status_says_who_stopped_a_run(number, status, capsys, monkeypatch):
    """75 is "try again": a scheduler's signal, not a user's."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")

    def stop():
        raise Interrupted("stopped after step 4, which is saved", number)

    with pytest.raises(SystemExit) as stopped:
        run_command(stop)
    assert stopped.value.code == status
    assert capsys.readouterr().err == "\nstopped after step 4, which is saved\n"


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "mine").write_text("not a folder")
    with pytest.raises(NotADirectoryError, match="mine is a file"):
        run_folder.open_folder(Config(name="mine", runs=str(tmp_path)))


def test_run_that_exists_is_not_overwritten(tmp_path):
    config = Config(name="mine", runs=str(tmp_path))
    run_folder.open_folder(config)
    with pytest.raises(FileExistsError, match="--resume, or choose another --name"):
        run_folder.open_folder(config)
    run_folder.open_folder(dataclasses.replace(config, resume=True))


def test_importing_the_package_loads_nothing(tmp_path):
    import subprocess

    code = "import sys, ulx; bad = {'jax', 'equinox', 'grain'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
