"""The evaluation's bits on a run whose weights are drawn, against the estimates by hand; distances of any images."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import Corner

from ulx import evaluation, evaluation_pairs, runs
from ulx.bound import estimate_decoder, estimate_rate
from ulx.denoiser import StandardNormal
from ulx.diffusion import split_keys
from ulx.evaluation_data import rows_like
from ulx.generate import example_keys
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.kernel import kernel_distance
from ulx.metrics.reference import training_moments
from ulx.nn.conditions import NO_LABEL, Conditions
from ulx.progress import Progress
from ulx.runner import Runner, Told
from ulx.seeding import root_int, root_key


@pytest.fixture(scope="module")
def run(trained_run) -> runs.Run:
    return runs.load(trained_run)


@pytest.fixture(scope="module")
def images(small_dataset) -> np.ndarray:
    return np.stack([example["image"] for example in small_dataset.validation])


@pytest.fixture(scope="module")
def runner(run, images) -> Runner:
    with Progress("evaluate", total=len(images)) as progress:
        return Runner(run.model, run.config, progress)


def test_rate_under_the_base_model_is_without_a_label(run, runner, images):
    """Five images come in batches of four."""

    @eqx.filter_jit
    def by_hand(model, base, x, keys, label):
        denoise = lambda z_t, logsnr, *, key=None: base(z_t, logsnr, Conditions(jnp.full(len(z_t), label)))  # noqa: E731
        return estimate_rate(denoise, model.encoder(x), model.latent_schedule, key=keys, levels=4).rate

    x, keys = jnp.asarray(images) / 127.5 - 1, split_keys(example_keys(root_key(0, "evaluation rate"), 0, 5), 2)[1]
    none, first = (by_hand(run.model, run.base, x, keys, jnp.asarray(label)) for label in (NO_LABEL, 0))
    found = runner.rate(images, run.base)
    np.testing.assert_allclose(found.rate, none, rtol=1e-4)  # another batch shape rounds differently
    assert np.abs(found.rate / np.asarray(first) - 1).max() > 1e-3
    # Trained without a null label, it is asked about each image as one of its class.
    labelled = runner.rate(images, run.base, Told(np.zeros(5, np.int32)))
    np.testing.assert_allclose(labelled.rate, first, rtol=1e-4)
    assert found.diffusion.samples.shape == (5, 1, 4)
    np.testing.assert_allclose(found.logsnr_edges, [5.0, 1.25, -2.5, -6.25, -10.0], atol=1e-5)
    prior = runner.rate(images, run.model.prior)
    assert np.abs(np.asarray(prior.rate) / np.asarray(found.rate) - 1).max() > 1e-3


def test_decoder_nats_are_those_of_the_images_given_their_noisy_latents(run, runner, images):
    @eqx.filter_jit
    def by_hand(model, x, keys):
        z_key, decoder_key = jax.vmap(jax.random.split, out_axes=1)(keys)
        alpha, sigma = jax.nn.sigmoid(5.0) ** 0.5, jax.nn.sigmoid(-5.0) ** 0.5
        z_0 = alpha * model.encoder(x) + sigma * jax.vmap(lambda k: jax.random.normal(k, (8, 8, 4)))(z_key)
        denoise = lambda z_t, logsnr, *, key=None: model.decoder.denoiser(z_t, logsnr, context=z_0)  # noqa: E731
        return estimate_decoder(denoise, x, model.decoder.schedule, key=decoder_key, levels=4).total

    found = runner.decoder_nats(images)
    expected = by_hand(
        run.model, jnp.asarray(images) / 127.5 - 1, example_keys(root_key(0, "evaluation decoder"), 0, 5)
    )
    np.testing.assert_allclose(found.total, expected, rtol=1e-4)
    assert found.samples.shape == (5, 1, 4)


def test_flow_of_a_standard_normal_is_its_density(run, images):
    """log p(z_0) = log N(z_0; 0, I) exactly, so that only the solver's error is left: 1e-3 nats per dimension."""
    model = eqx.tree_at(lambda m: m.prior, run.model, StandardNormal(run.model.latent_shape))
    with Progress("evaluate", total=len(images)) as progress:
        found, steps = Runner(model, run.config, progress).flow_nats(images)
    assert steps > 3

    @eqx.filter_jit
    def by_hand(model, x, keys):
        flow_keys = split_keys(keys, 2)[1]
        noise = jax.vmap(lambda k: jax.random.normal(k, (8, 8, 4)))(split_keys(flow_keys, 2)[0])
        alpha, sigma = jax.nn.sigmoid(5.0) ** 0.5, jax.nn.sigmoid(-5.0) ** 0.5
        z_0 = alpha * model.encoder(x) + sigma * noise
        log_density = -0.5 * jnp.sum(z_0**2 + math.log(2 * math.pi), axis=(1, 2, 3))
        return -256 * (0.5 * math.log(2 * math.pi * math.e) + jnp.log(sigma)) - log_density

    keys = example_keys(root_key(0, "evaluation flow"), 0, 5)
    np.testing.assert_allclose(found, by_hand(model, jnp.asarray(images) / 127.5 - 1, keys), atol=256e-3)


def test_autoencoder_alone_is_measured_as_in_the_whole(run, runner, small_dataset, images):
    """The same estimates of the same draws: its rate under the prior, and the PSNR of its reconstructions."""
    found = evaluation.evaluate_autoencoder(run.model, small_dataset, run.config)
    nats = np.asarray(runner.rate(images, run.model.prior).rate)
    assert found["bits_per_pixel"]["value"] == pytest.approx(nats.mean() / (256 * math.log(2)), rel=1e-6)
    reconstructions, nfe = runner.decode(runner.encode(images), evaluation.RECONSTRUCT)
    error = np.mean((reconstructions.astype(np.float64) - images) ** 2, axis=(1, 2, 3))
    assert found["psnr"]["value"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-5)
    assert found["psnr"]["nfe"] == nfe == 2


def test_the_samples_that_are_measured_are_guided_as_asked(run, runner, small_dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "networks", lambda config: ([Corner()], None, None))
    options = dataclasses.replace(run.config.evaluate, guidance_scale=3.0, flow_images=0)
    data = dataclasses.replace(run.config.data, cache_dir=str(tmp_path))
    found = evaluation.evaluate(
        run.model, run.base, small_dataset, dataclasses.replace(run.config, evaluate=options, data=data)
    )
    labels = small_dataset.train.labels[
        rows_like(small_dataset.train, options.num_samples, root_int(run.config.seed, "evaluation labels"))
    ]
    sampled = lambda scale: runner.sample(  # noqa: E731
        run.base, options.num_samples, evaluation.SAMPLE, Told(labels), guidance=scale
    )
    (guided, nfe), (plain, half) = sampled(3.0), sampled(1.0)
    np.testing.assert_array_equal(found.pictures["base_samples"], guided)
    assert (guided != plain).any()
    distance = found.metrics["fd_efflite0"]
    assert distance["base"]["nfe"] == nfe == 2 * half == 2 * distance["prior"]["nfe"]
    assert (found.metrics["sampler"]["guidance_scale"], found.metrics["sampler"]["guidance_interval"]) == (3.0, None)


@pytest.fixture(scope="module")
def distances(small_dataset, tmp_path_factory):
    held_out = np.stack([example["image"] for example in small_dataset.validation])
    rng = np.random.default_rng(0)
    drawn = lambda n: rng.integers(0, 256, (n, *held_out.shape[1:]), dtype=np.uint8)  # noqa: E731
    made = {"base": (drawn(7), 4), "prior": (drawn(7), 3), "reconstruction": (drawn(5), 2)}
    networks = [Corner(), Corner(metric="fid", kernel_metric="kid", definition="another", sha256="c1")]
    cache = str(tmp_path_factory.mktemp("cache"))
    moments = lambda network: training_moments(small_dataset, network, cache)  # noqa: E731
    found = evaluation._distances(networks, made, held_out, {"reconstruction"}, moments, "images")
    return found, made, held_out


def test_reconstructions_are_compared_with_their_originals_and_with_the_training_set(distances, small_dataset):
    found, made, held_out = distances
    corner = lambda images: np.asarray(images, np.float64)[:, 0, 0] / 127.5 - 1  # noqa: E731
    trained = corner(np.stack([example["image"] for example in small_dataset.train]))
    distance = lambda a, b: frechet_distance(Moments.of(corner(a)), Moments.of(b))  # noqa: E731
    by_hand = {
        "base": distance(made["base"][0], trained),
        "prior": distance(made["prior"][0], trained),
        "reconstruction": distance(made["reconstruction"][0], corner(held_out)),
        "reconstruction_to_training": distance(made["reconstruction"][0], trained),
        "held_out_images": distance(held_out, trained),
    }
    assert len({round(value, 3) for value in by_hand.values()}) == 5
    for metric in ("fd_efflite0", "fid"):
        for what, value in by_hand.items():
            np.testing.assert_allclose(found[metric][what]["value"], value, rtol=1e-4, err_msg=what)  # float32
    against = {what: entry["against"] for what, entry in found["fid"].items()}
    assert against.pop("reconstruction") == "held-out images"
    assert set(against.values()) == {"training images"}


def test_every_network_has_a_kernel_distance_of_its_own_name(distances):
    found, _, _ = distances
    names = {"kd_efflite0", "precision", "recall", "kid", "precision_fid", "recall_fid"}
    assert {frozenset(entry) for entry in found["against_held_out_images"].values()} == {frozenset(names)}
    assert found["against_held_out_images"]["base"]["kid"]["n_a"] == 5
    assert found["against_held_out_images"]["base"]["kid"]["n_b"] == 7


def test_an_image_and_its_own_reconstruction_are_no_pair_of_the_kernel_distance(distances):
    found, made, held_out = distances
    corner = lambda images: np.asarray(images, np.float64)[:, 0, 0] / 127.5 - 1  # noqa: E731
    for what, paired in (("base", False), ("reconstruction", True)):
        by_hand = kernel_distance(corner(held_out), corner(made[what][0]), paired=paired)
        entry = found["against_held_out_images"][what]["kd_efflite0"]
        assert entry["value"] == pytest.approx(by_hand.value, rel=1e-4)  # float32
        assert entry["standard_error"] == pytest.approx(by_hand.standard_error, rel=1e-4)


def test_weights_that_are_not_there_are_refused(small_config):
    options = dataclasses.replace(small_config.evaluate, inception_weights="nowhere.pth")
    config = dataclasses.replace(small_config, evaluate=options)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth is no file: name the weights of FID's InceptionV3"):
        evaluation.networks(config)


def test_pairs_too_small_for_a_measure_go_without_it():
    distance = lambda x, y: jnp.abs(x - y).mean((1, 2, 3))  # noqa: E731
    images = np.zeros((3, 32, 32, 3), np.uint8)
    other = images + np.uint8(51)
    assert evaluation_pairs.errors(images, other, distance)["lpips_vgg16"]["value"] == pytest.approx(0.4)  # 51/127.5
    assert set(evaluation_pairs.errors(images[:, :15, :15], other[:, :15, :15], distance)) == {"psnr", "ssim"}
    assert set(evaluation_pairs.errors(images[:, :8, :8], other[:, :8, :8], distance)) == {"psnr"}
