"""Every variant: what it changes in the losses, and that it trains, measures, reports and loads again."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from stand_ins import Corner

from ulx import dry_run, job, losses, rate_control, run_folder, runner, runs, schedules
from ulx.bound import estimate_rate
from ulx.config import Config, from_json, to_json
from ulx.decoders import DiffusionDecoder, PixelDecoder, RegressionDecoder
from ulx.denoiser import Denoiser, StandardNormal
from ulx.diffusion import split_keys
from ulx.encode import Options as EncodeOptions
from ulx.encode import encode
from ulx.generate import decode, sample_latents
from ulx.likelihood import flow_rate
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.encoder import Pixels
from ulx.report.text import si
from ulx.stages import autoencoder_loss, base_loss, decoder_loss
from ulx.training import Draws
from ulx.variants import VARIANTS


def varied(config: Config, name: str) -> Config:
    return dataclasses.replace(VARIANTS[name].change(config), variant=name)


def shaken(model):
    """Every weight moved off its initial value, so that nothing is hidden behind a zero gate."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    rng = np.random.default_rng(0)
    move = lambda leaf: leaf + 0.1 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return eqx.combine(jax.tree.map(move, arrays), static)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.integers(0, 256, (4, 16, 16, 3)), jnp.uint8)
    return {"image": image, "label": jnp.asarray([0, 1, 2, 0], jnp.int32)}


KEY = jax.random.key(0)
DRAWS = Draws(keys=jax.random.split(jax.random.key(0), 4), step_key=jax.random.key(9))


def gradient(config, model, batch, step=100):
    """Of stage 1's loss, with what it logs."""
    loss = autoencoder_loss(config)
    run = eqx.filter_jit(eqx.filter_grad(lambda m: loss(m, None, batch, DRAWS, jnp.asarray(step)), has_aux=True))
    return run(model)


def size_of(tree) -> float:
    return float(optax.tree.norm(eqx.filter(tree, eqx.is_array)))


def test_stop_gradient_leaves_the_encoder_the_decoder_and_a_small_kl(small_config, batch):
    """Against the same loss with the rate's gradient cut by hand: the prior's own is untouched, the encoder feels none
    of it, and without a decoder only the KL is left."""
    config = varied(small_config, "stop-gradient")
    assert config.prior_gradient == 0
    assert config.kl_weight > 0
    model = shaken(runs.stage1_state(config).model)
    found, metrics = gradient(config, model, batch)
    paper, paper_metrics = gradient(small_config, model, batch)
    for a, b in zip(jax.tree.leaves(found.prior), jax.tree.leaves(paper.prior), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(metrics["rate"]) == pytest.approx(float(paper_metrics["rate"]), rel=1e-5)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    kl = float(losses.terminal_kl(model.encoder(x), 5.0).mean()) / (256 * np.log(2))
    extra = float(metrics["loss"] - paper_metrics["loss"])
    assert extra == pytest.approx(config.kl_weight * kl, rel=1e-3)
    without_kl, _ = gradient(dataclasses.replace(config, kl_weight=0.0), model, batch)

    def kl_alone(encoder):
        return losses.bits_per_pixel(losses.terminal_kl(encoder(x), 5.0), num_pixels=256).mean()

    of_kl = eqx.filter_grad(kl_alone)(model.encoder)
    for a, b, c in zip(*map(jax.tree.leaves, (found.encoder, without_kl.encoder, of_kl)), strict=True):
        np.testing.assert_allclose(a - b, config.kl_weight * c, rtol=2e-2, atol=1e-6)  # a difference of float32 sums


def test_the_rate_s_pull_on_the_encoder_warms_up(small_config, batch):
    """From nothing to all of it between the two steps of `prior_warmup`; the decoder's pull is there all the time."""
    assert small_config.prior_warmup == (1, 3)
    model = shaken(runs.stage1_state(small_config).model)

    def pull(part, step):
        config = dataclasses.replace(small_config, prior_gradient=part)
        return gradient(config, model, batch, step)[0].encoder

    for step, part in ((0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0)):
        for a, b in zip(jax.tree.leaves(pull(1.0, step)), jax.tree.leaves(pull(part, 100)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert size_of(jax.tree.map(jnp.subtract, pull(1.0, 100), pull(0.0, 100))) > 1e-3


def test_the_encoder_s_own_term_is_scaled_and_measured(small_config, batch):
    """L_e of Eq. 5: with no gradient from the rate there is none from it, and it is part of what is measured."""
    model = shaken(runs.stage1_state(varied(small_config, "learned-variance")).model)
    x, keys = batch["image"].astype(jnp.float32) / 127.5 - 1, jax.random.split(jax.random.key(0), 4)
    times = (jnp.full(4, 0.5),) * 2

    def rate(model, part):
        bound, _ = model.bound(x, small_config.decoder_weighting, key=keys, t=times, prior_gradient=part)
        return bound.rate.sum()

    pull = eqx.filter_jit(eqx.filter_grad(rate))
    assert size_of(pull(model, jnp.asarray(0.0)).encoder) == 0
    assert size_of(pull(model, jnp.asarray(1.0)).encoder) > 0
    own = model.posterior(x).nats(5.0)
    assert float(jnp.abs(own).min()) > 0.1
    found = runner.latent_rate(model, model.prior, x, Conditions(), keys, 4, 1)
    np.testing.assert_allclose(found.encoder, own, rtol=1e-4)
    np.testing.assert_allclose(found.rate - found.diffusion.total - found.terminal, own, rtol=1e-3, atol=1e-2)
    standard = eqx.tree_at(lambda m: m.prior, model, StandardNormal(model.latent_shape))
    z_clean = model.posterior(x).sample(key=split_keys(keys, 2)[0])
    alone = eqx.filter_jit(flow_rate)(
        standard.prior.given(),
        z_clean,
        model.latent_schedule,
        key=split_keys(keys, 2)[1],
        probes=runner.FLOW_PROBES,
        tolerance=runner.FLOW_TOLERANCE,
    )
    np.testing.assert_allclose(runner._flow(standard, x, keys).rate, alone.rate + own, rtol=1e-4)
    # Rate control measures it too.
    clean_key, rate_key = split_keys(KEY, 2)
    z_clean, schedule = model.posterior(x).sample(key=clean_key), model.latent_schedule
    estimate = eqx.filter_jit(lambda model: estimate_rate(
        model.prior.given(), z_clean, schedule, key=rate_key, levels=rate_control.LEVELS
    ))  # fmt: skip
    rest = estimate(model).rate
    bits = rate_control._held_out_bits(model, x, KEY)
    assert float(bits) == pytest.approx(float((rest + own).mean()) / (256 * np.log(2)), rel=1e-5)
    assert abs(float(own.mean() / rest.mean())) > 1e-2


def test_variants_are_what_the_table_says(small_config):
    """ulx/README.md's table, Tab. 6 and App. B."""
    of = lambda name: VARIANTS[name].change(small_config)  # noqa: E731
    single, shifted, stopped = of("single-stage-logistic"), of("single-stage"), of("stop-gradient")
    assert shifted.decoder_weighting.bias == pytest.approx(small_config.decoder_weighting.bias - 2)
    for config in (single, shifted):
        assert config.train.steps == small_config.train.steps + small_config.train_base.steps
        assert config.model.prior == small_config.model.base
    assert single.model.logsnr_0_bias == small_config.base_bias
    assert (stopped.prior_gradient, stopped.kl_weight, stopped.model.encoder.latent_channels) == (0, 0.01, 8)
    assert of("low-noise").model.logsnr_0 == 10
    kl = of("kl-autoencoder")
    assert (kl.prior_gradient, kl.model.logsnr_0) == (0.01, 10)
    assert of("mse").train_decoder == small_config.train != small_config.train_decoder
    assert of("pixels").base_bias == pytest.approx(-3 + 2 * np.log(512 / 16))


def test_learned_variance_is_paid_for_and_bought(small_config, batch):
    """The gradient of the standard deviation's bias: L_e alone would widen it, and the decoder's loss narrows it."""
    config = varied(small_config, "learned-variance")
    model = shaken(runs.stage1_state(config).model)
    posterior = model.posterior(batch["image"].astype(jnp.float32) / 127.5 - 1)
    assert posterior.std is not None
    assert posterior.mean.shape == posterior.std.shape == (4, 8, 8, 4)
    assert 0.01 < float(posterior.std.mean()) < 0.5
    found, metrics = gradient(config, model, batch)
    bias = found.encoder.project_out.bias
    assert bias.shape == (8,)
    assert np.all(np.abs(bias[4:]) > 0)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    rate = lambda model: losses.bits_per_pixel(model.posterior(x).nats(5.0), num_pixels=256).mean()  # noqa: E731
    assert np.all(eqx.filter_grad(rate)(model).encoder.project_out.bias[4:] < 0)  # widening lowers L_e
    fixed = eqx.tree_at(lambda m: m.encoder.project_out.bias, model, replace_fn=lambda b: b.at[4:].add(-8.0))
    _, narrow = gradient(config, fixed, batch)
    # e⁻⁸ of the width: L_e is gone, and the rate has grown by what it was.
    assert float(narrow["rate"] - metrics["rate"]) > 0


def test_normal_prior_has_no_weights_and_its_rate_no_noise(small_config, batch):
    config = varied(small_config, "normal-prior")
    model = shaken(runs.stage1_state(config).model)
    assert isinstance(model.prior, StandardNormal)
    _, metrics = gradient(config, model, batch)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    rate = model.posterior(x).normal_rate(5.0).mean() / (256 * np.log(2))
    assert float(metrics["rate"]) == pytest.approx(float(rate), rel=1e-4)


def test_regression_decoder_weighs_as_its_cut_off(small_config, batch):
    """½ e^b (c − 1) ‖x − x̂‖²: at the cut-off λ* of the diffusion decoder, exp(λ*) = e^b (c − 1)."""
    config = varied(small_config, "mse")
    model = shaken(runs.stage1_state(config).model)
    assert isinstance(model.decoder, RegressionDecoder)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    z_0 = model.encode(x, key=jax.random.key(3))
    weighting = config.decoder_weighting
    found = model.decoder.nats(x, z_0, weighting, key=jax.random.key(4))
    x_hat = np.asarray(model.decoder.network(jnp.zeros_like(x), jnp.full(4, model.decoder.schedule.logsnr_min),
                                             context=z_0), np.float64)  # fmt: skip
    error = np.sum((np.asarray(x) - x_hat) ** 2, axis=(1, 2, 3))
    bias = -3 + 2 * np.log(512 / 16)
    np.testing.assert_allclose(found, 0.5 * np.exp(bias + np.log(1.5 - 1)) * error, rtol=1e-4)
    drawn = decode(model, z_0, config.sample, keys=jax.random.split(jax.random.key(5), 4))
    np.testing.assert_allclose(drawn.z, np.clip(x_hat, -1, 1), atol=1e-5)
    assert int(drawn.nfe) == 1
    # Then the diffusion decoder: the encoder is frozen.
    decoder = shaken(runs.decoder_state(config, model, ConditionSpec()).model)
    assert isinstance(decoder, DiffusionDecoder)
    step = lambda pair: decoder_loss(config)(pair[0], pair[1], batch, DRAWS, jnp.asarray(0))[0]  # noqa: E731
    to_decoder, to_model = eqx.filter_jit(eqx.filter_grad(step))((decoder, model))
    assert size_of(to_decoder) > 0
    assert size_of(to_model) == 0
    z_keys, decoder_keys = split_keys(DRAWS.keys, 2)
    z_0 = model.encode(x, key=z_keys)
    nats = decoder.nats(x, z_0, config.decoder_weighting, key=decoder_keys, t=DRAWS.times(0))
    assert float(step((decoder, model))) == pytest.approx(float(nats.mean()) / (256 * np.log(2)), rel=1e-4)


def test_logistic_decoder_is_told_the_noise_of_its_latent(small_config, batch):
    config = varied(small_config, "single-stage-logistic")
    model = shaken(runs.stage1_state(config, ConditionSpec(num_classes=3)).model)
    assert isinstance(model.decoder, DiffusionDecoder)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    z_0 = model.encode(x, key=jax.random.key(3))
    call = eqx.filter_jit(lambda level: model.decoder.given(z_0, level)(x, jnp.zeros(4)))
    low, high = call(jnp.full(4, -3.0)), call(jnp.full(4, 5.0))
    assert float(jnp.abs(low - high).max()) > 1e-3
    with pytest.raises(ValueError, match="needs its context's log-SNR"):
        model.decoder.given(z_0)(x, jnp.zeros(4))
    # Sampling and measuring are at λ_z(0).
    np.testing.assert_array_equal(model.decoder_logsnr_0(2), [5.0, 5.0])


def test_pixels_are_their_own_latent(small_config, batch):
    """The base model sees λ from λ_x(0) to λ_x(1), and what it hands over is divided by α and clipped."""
    config = varied(small_config, "pixels")
    model = runs.stage1_state(config).model
    assert isinstance(model.encoder, Pixels)
    assert isinstance(model.decoder, PixelDecoder)
    assert config.stages == ("stage2",)
    assert model.latent_schedule.logsnr_max == schedules.image_schedule(16).logsnr_max
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    z_0 = model.encode(x, key=jax.random.key(0))
    decoded = decode(model, z_0, config.sample, keys=jax.random.split(jax.random.key(5), 4))
    # σ/α at λ = 10.55 is 0.0051: within six of them of the image.
    np.testing.assert_allclose(decoded.z, x, atol=6 * 0.0051)
    base = runs.stage2_state(config, model, ConditionSpec(num_classes=3)).model
    assert base.shape == (16, 16, 3)
    value, _ = eqx.filter_jit(base_loss(config, 16 * 16))(base, model, batch, DRAWS, jnp.asarray(0))
    assert np.isfinite(float(value))


def test_refuses_combinations_that_have_no_network(small_config):
    for change in ({"latent": "pixels"}, {"latent_prior": "normal"}):
        model = dataclasses.replace(small_config.model, **change)
        with pytest.raises(ValueError, match="single_stage generates with the stage-1 prior"):
            dataclasses.replace(small_config, model=model, single_stage=True)
    with pytest.raises(ValueError, match="--label-dropout 0: bits of a single stage"):
        job.run(dataclasses.replace(small_config, single_stage=True, label_dropout=0.0))
    with pytest.raises(ValueError, match="logsnr_0_bias"):
        dataclasses.replace(small_config.model, latent_prior="normal", logsnr_0_bias=0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_survive_their_file(small_config, name):
    config = varied(small_config, name)
    assert from_json(to_json(config)) == config


@pytest.fixture
def quick(monkeypatch, small_dataset):
    """The job without what other tests answer for: the embedded data, the distances' network."""
    monkeypatch.setattr(job, "open_dataset", lambda data: small_dataset)
    monkeypatch.setattr("ulx.metrics.efficientnet.load", Corner)
    features = lambda network, images, **_: images.reshape(len(images), -1)[:, ::97].astype(np.float64)  # noqa: E731
    monkeypatch.setattr("ulx.evaluation.features", features)

    def moments(dataset, network, cache_dir, found=None):
        from ulx.metrics.frechet import Moments

        return Moments.of(features(None, np.stack([example["image"] for example in dataset.train])))

    monkeypatch.setattr("ulx.evaluation.training_moments", moments)


# These have between them every part and every stage; the others run in the slow tests.
COVERING = ("mse", "single-stage-logistic", "pixels", "kl-autoencoder")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in (*COVERING, "unified")]


def _folder_of_images(folder: Path) -> Path:
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", [*COVERING, *REST])
def test_runs_from_end_to_end(quick, small_config, small_dataset, tmp_path, name):
    """Trains every stage that it has, is measured and reported, and loads with the weights that were measured."""
    config = dataclasses.replace(varied(small_config, name), runs=str(tmp_path), name=name)
    report = job.run(config)
    path = config.path
    assert {file.stem for file in path.glob("*.jsonl")} == set(config.stages)
    metrics = json.loads((path / "evaluation" / "metrics.json").read_text())
    assert np.isfinite(metrics["bits_per_pixel"]["value"])
    assert np.isfinite(metrics["fd_efflite0"]["base"]["value"])
    text = report.read_text()
    assert name in text
    for stage in config.stages:
        assert metrics["cost"][f"training_flops_{stage}"] > 0
    parts = metrics["cost"]["parameters"]
    # In a single stage prior and base are one network.
    alone = sum(parts.values()) - (parts["base"] if config.single_stage else 0)
    assert f"<td>all</td><td>{si(alone)}</td>" in text
    run = runs.load(path)
    assert isinstance(run.base, Denoiser)
    keys = jax.random.split(jax.random.key(0), 2)
    sample = sample_latents(
        run.base, run.model.latent_schedule, config.sample, keys=keys, conditions=Conditions(jnp.asarray([0, 1]))
    )
    image = decode(run.model, sample.z, config.sample, keys=keys)
    assert image.z.shape == (2, 16, 16, 3)
    how = {"kl-autoencoder": "one call", "pixels": "the latents are the pixels"}.get(name, config.sample.decoder_solver)
    assert metrics["sampler"]["decoder"] == metrics["psnr"]["solver"] == how
    if name == "kl-autoencoder":
        found = np.load(encode(EncodeOptions(path, _folder_of_images(tmp_path / "images"))))
        assert found["z_std"].shape == found["z_clean"].shape == (2, 8, 8, 4)
        assert found["z_std"].min() > 0
        assert not np.allclose(found["z_std"], found["z_clean"])
    if name == "mse":
        assert isinstance(run.model.decoder, DiffusionDecoder)


def test_a_drawn_noise_level_is_told_to_the_decoder_that_is_trained_afterwards(small_config, batch):
    config = varied(small_config, "mse")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, logsnr_0_bias=0.0))
    autoencoder = runs.stage1_state(config).model
    decoder = shaken(runs.decoder_state(config, autoencoder, ConditionSpec()).model)
    loss, _ = decoder_loss(config)(decoder, autoencoder, batch, DRAWS, jnp.asarray(0))
    assert np.isfinite(float(loss))
    model = runs.with_decoder(autoencoder, decoder)
    z_0 = jax.random.normal(KEY, (4, *model.latent_shape))
    assert np.isfinite(decode(model, z_0, config.sample, keys=DRAWS.keys).z).all()


def test_an_autoencoder_of_another_run(quick, small_config, small_dataset, tmp_path):
    """Tab. 6, C: stage 1 is taken with its settings; stage 2 is this run's own."""
    first = dataclasses.replace(small_config, runs=str(tmp_path), name="first", loss_factor=1.7)
    with pytest.raises(FileNotFoundError, match="not a run"):
        run_folder.adopt(dataclasses.replace(small_config, autoencoder=str(tmp_path / "nothing")))
    job.run(first)
    second = dataclasses.replace(small_config, runs=str(tmp_path), name="second", seed=5, autoencoder=str(first.path))
    job.run(second)
    a, b = runs.load(first.path), runs.load(second.path)
    assert b.config.loss_factor == 1.7
    for x, y in zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True):
        np.testing.assert_array_equal(x, y)
    assert a.base is not None
    assert b.base is not None
    assert not np.array_equal(a.base.network.position, b.base.network.position)
    # What would be trained is stage 2 alone, on what was taken; and once it was, the run stands on its own.
    described = dry_run.describe(dataclasses.replace(second, name="third"), compiled=False)
    assert "\nstage2 " in described
    assert "\nstage1 " not in described
    moved = first.path.rename(tmp_path / "elsewhere")
    assert run_folder.adopt(dataclasses.replace(second, resume=True)).loss_factor == 1.7
    for other in (second, dataclasses.replace(second, name="third", resume=True)):
        with pytest.raises(FileNotFoundError, match="not a run"):
            run_folder.adopt(other)
    moved.rename(first.path)
    unfinished = Path(a.path) / "config.json"
    unfinished.write_text(to_json(dataclasses.replace(first, train=dataclasses.replace(first.train, steps=7))))
    with pytest.raises(FileNotFoundError, match="not finished stage1"):
        run_folder.adopt(second)
