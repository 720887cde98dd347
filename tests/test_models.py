"""The networks composed: Alg. 1 and 2 put together by hand, gradients that go where they should."""

import dataclasses
import math
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ulx import diffusion, losses, runs, schedules, weightings
from ulx.config import Config, SampleConfig
from ulx.generate import decode, example_keys, in_batches, sample_latents
from ulx.models import UnifiedLatents
from ulx.nn.conditions import NO_LABEL, Conditions, ConditionSpec
from ulx.sharding import make_mesh
from ulx.stages import CollapseWatch, autoencoder_loss, base_loss, dropped_conditions, make_base
from ulx.training import Draws, Spread, make_optimizer, make_step

CLASSES = ConditionSpec(num_classes=3)
KEY = jax.random.key(0)


def shaken(model):
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    moved = [leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def model(small_config):
    """Every weight moved off its initial value, so that nothing is hidden behind a zero gate."""
    return shaken(runs.stage1_state(small_config).model)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (4, 16, 16, 3)), jnp.float32)


def keys(count=4, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def draws(count=4):
    return Draws(keys=keys(count), step_key=jax.random.key(9))


@pytest.mark.parametrize("bias", [None, 1.0])
def test_the_bound_is_algorithm_1(small_config, images, bias):
    """Against its terms put together from the losses, with the same three independent noises; with a bias λ_z(0) is
    drawn (App. B), which all three terms know of."""
    model = shaken(UnifiedLatents((16, 16, 3), dataclasses.replace(small_config.model, logsnr_0_bias=bias), key=KEY))
    times = (jnp.linspace(0.1, 0.9, 4), jnp.linspace(0.9, 0.2, 4))
    weighting = weightings.sigmoid(2.5, 1.5)
    bound, posterior = eqx.filter_jit(model.bound)(images, weighting, key=keys(), t=times)

    @eqx.filter_jit
    def by_hand(model):
        z_clean = model.encoder(images)
        _, z_key, prior_key, decoder_key, level_key = diffusion.split_keys(keys(), 5)
        drawn, schedule = model.logsnr_0, schedules.linear(5.0, -10.0)
        level = None if drawn is None else drawn.sample(level_key, 4)
        z_0 = losses.add_noise(z_clean, schedule, key=z_key, logsnr_0=level)
        prior = losses.prior_loss(model.prior.given(), z_clean, schedule, drawn, key=prior_key, t=times[0])
        decoder = losses.decoder_loss(
            model.decoder.given(z_0, level), images, model.decoder.schedule, weighting, key=decoder_key, t=times[1]
        )
        return z_clean, prior, decoder

    expected, prior, decoder = by_hand(model)
    np.testing.assert_allclose(posterior.mean, expected, atol=1e-5)
    # Two compilations of the same float32 sums.
    np.testing.assert_allclose(bound.rate, prior.total, rtol=1e-4)
    np.testing.assert_allclose(bound.total, prior.total + decoder, rtol=1e-4)
    assert model.latent_schedule.logsnr_max == 5.0
    assert model.decoder.schedule == schedules.image_schedule(16)


def test_the_bound_drops_out_only_when_it_is_told_to(small_config, images):
    """Dropout belongs to training; a bound that is measured has none, whatever the networks were built with."""
    wet = lambda network: dataclasses.replace(network, block=dataclasses.replace(network.block, dropout=0.5))  # noqa: E731
    config = dataclasses.replace(
        small_config.model, prior=wet(small_config.model.prior), decoder=wet(small_config.model.decoder)
    )
    dry, wet_model = (
        shaken(UnifiedLatents((16, 16, 3), c, key=jax.random.key(0))) for c in (small_config.model, config)
    )
    times = (jnp.linspace(0.1, 0.9, 4), jnp.linspace(0.9, 0.2, 4))

    @eqx.filter_jit
    def terms(model, dropout):
        bound, _ = model.bound(images, weightings.sigmoid(2.5, 1.5), key=keys(), t=times, dropout=dropout)
        return bound.rate, bound.decoder

    measured, expected, trained = terms(wet_model, False), terms(dry, False), terms(wet_model, True)
    for a, b, c in zip(measured, expected, trained, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.all(a != c)


def test_the_warm_up_touches_the_encoder_alone_and_no_value(small_config, model, images):
    weighting = weightings.sigmoid(2.5, 1.5)
    times = (jnp.linspace(0.1, 0.9, 4), jnp.linspace(0.9, 0.2, 4))

    @eqx.filter_jit
    def gradients(model, scale, decoder_weight):
        def objective(model):
            bound, _ = model.bound(images, weighting, key=keys(), t=times, prior_gradient=scale)
            return jnp.sum(bound.rate + decoder_weight * bound.decoder)

        return jax.value_and_grad(objective)(model)

    value_0, off = gradients(model, jnp.asarray(0.0), 0.0)
    value_1, on = gradients(model, jnp.asarray(1.0), 0.0)
    assert float(value_0) == pytest.approx(float(value_1), rel=1e-6)
    assert float(optax.tree.norm(off.encoder)) == 0
    assert float(optax.tree.norm(on.encoder)) > 0
    for a, b in zip(jax.tree.leaves(off.prior), jax.tree.leaves(on.prior), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # The decoder's term reaches the encoder through z_0 and the prior not at all.
    _, decoder_only = gradients(model, jnp.asarray(0.0), 1.0)
    assert float(optax.tree.norm(decoder_only.encoder)) > 0


def test_training_minimises_bits_per_pixel_of_the_sum(small_config, model, images):
    batch = {"image": jnp.asarray((images + 1) * 127.5, jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    loss = eqx.filter_jit(autoencoder_loss(small_config))
    value, metrics = loss(model, None, batch, draws(), jnp.asarray(100))
    assert float(value) == pytest.approx(float(metrics["rate"] + metrics["decoder"]), rel=1e-5)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    bound, _ = eqx.filter_jit(model.bound)(
        x,
        small_config.decoder_weighting,
        key=diffusion.split_keys(draws().keys, 2)[1],
        t=(draws().times(0), draws().times(1)),
    )
    # One divisor for both terms: pixels · ln 2, with 16·16 pixels whatever the channels.
    assert float(value) == pytest.approx(float(jnp.mean(bound.total)) / (256 * math.log(2)), rel=1e-4)
    spread = np.asarray(eqx.filter_jit(model.encoder)(x)).std(axis=0).mean()
    assert float(metrics["latent_std"].std) == pytest.approx(spread, rel=1e-4)


def test_the_two_terms_draw_their_times_apart():
    both = draws(64)
    assert np.abs(both.times(0) - both.times(1)).min() > 1e-4
    assert abs(np.corrcoef(both.times(0), both.times(1))[0, 1]) < 0.5  # 4 standard deviations of independent ones


def test_training_drops_out(small_config, images):
    """Every term of the losses: the weights do not depend on it, so that without it nothing would change."""
    dry = small_config.model.base
    wet = dataclasses.replace(dry, block=dataclasses.replace(dry.block, dropout=0.5))
    batch = {"image": jnp.asarray((images + 1) * 127.5, jnp.uint8), "label": jnp.zeros(4, jnp.int32)}

    def values(network):
        sizes = dataclasses.replace(small_config.model, prior=network, decoder=network, base=network)
        config = dataclasses.replace(small_config, model=sizes)
        model = shaken(UnifiedLatents((16, 16, 3), sizes, key=KEY))
        base = shaken(make_base(model, sizes, CLASSES, key=KEY))
        _, first = eqx.filter_jit(autoencoder_loss(config))(model, None, batch, draws(), jnp.asarray(9))
        second, _ = eqx.filter_jit(base_loss(config, 256))(base, model, batch, draws(), jnp.asarray(0))
        return np.array([first["rate"], first["decoder"], second])

    assert np.all(np.abs(values(wet) / values(dry) - 1) > 1e-4)  # float32 rounds at 1e-6


def test_labels_are_dropped_as_often_as_it_is_set(small_config, model, images):
    base = shaken(make_base(model, small_config.model, CLASSES, key=jax.random.key(1)))
    z_clean, label = eqx.filter_jit(model.encoder)(images), jnp.asarray([0, 1, 2, 0])

    def value(rate, label):
        loss = eqx.filter_jit(base_loss(dataclasses.replace(small_config, label_dropout=rate), 256))
        return float(loss(base, model, {"mean": z_clean, "label": label}, draws(), jnp.asarray(0))[0])

    always, never = value(1.0, label), value(0.0, label)
    assert always == pytest.approx(value(0.0, jnp.full(4, NO_LABEL)), rel=1e-5)
    assert always != pytest.approx(never, rel=1e-3)


def test_stage_2_is_the_sigmoid_weighted_loss_between_the_prior_s_ends(small_config, model, images):
    """By hand: λ from 5 to −10 by a cosine around b = 1, w = sigmoid(1 − λ), bits per pixel of 16·16 pixels."""
    config = dataclasses.replace(small_config, base_bias=1.0, label_dropout=0.0)
    base = shaken(make_base(model, config.model, CLASSES, key=jax.random.key(1)))
    label = jnp.asarray([0, 1, 2, 0])
    z_clean = eqx.filter_jit(model.encoder)(images)
    value, _ = eqx.filter_jit(base_loss(config, 16 * 16))(
        base, model, {"mean": z_clean, "label": label}, draws(), jnp.asarray(0)
    )
    t = np.asarray(draws().times(0), np.float64)
    angle = lambda logsnr: math.atan(math.exp(-0.5 * (logsnr - 1.0)))  # noqa: E731
    low, width = angle(5.0), angle(-10.0) - angle(5.0)
    logsnr = 1.0 - 2 * np.log(np.tan(low + width * t))
    slope = 4 * width / np.sin(2 * (low + width * t))
    loss_keys = diffusion.split_keys(diffusion.split_keys(draws().keys, 3)[1], 2)
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(sign * logsnr)))[:, None, None, None] for sign in (-1, 1))
    z_t = jnp.asarray(alpha * z_clean + sigma * diffusion.normal(loss_keys[0], z_clean), jnp.float32)
    z_hat = eqx.filter_jit(base)(z_t, jnp.asarray(logsnr, jnp.float32), Conditions(label))
    error = np.sum((np.asarray(z_clean, np.float64) - np.asarray(z_hat)) ** 2, axis=(1, 2, 3))
    nats = slope * np.exp(logsnr) / 2 / (1 + np.exp(logsnr - 1)) * error
    # float32 rounds z_t near 1e-7, which the error of the least noisy example feels at 1e-3 at most.
    assert float(value) == pytest.approx(nats.mean() / (256 * math.log(2)), rel=1e-3)


def test_stage_2_leaves_the_encoder_alone_and_drops_labels(small_config, model, images):
    base = make_base(model, small_config.model, CLASSES, key=jax.random.key(1))
    batch = {"image": jnp.asarray((images + 1) * 127.5, jnp.uint8), "label": jnp.asarray([0, 1, 2, 0])}

    def objective(pair):
        return base_loss(small_config, 16 * 16)(pair[0], pair[1], batch, draws(), jnp.asarray(0))[0]

    to_base, to_encoder = eqx.filter_jit(eqx.filter_grad(objective))((base, model))
    assert float(optax.tree.norm(eqx.filter(to_base, eqx.is_array))) > 0
    assert float(optax.tree.norm(eqx.filter(to_encoder, eqx.is_array))) == 0
    labels = {"label": jnp.zeros(4000, jnp.int32)}
    dropped = dropped_conditions(labels, keys(4000), 0.1, CLASSES).label
    assert dropped is not None
    # The share has a standard error of 0.005.
    assert abs(float((dropped == NO_LABEL).mean()) - 0.1) < 0.02
    assert set(np.unique(dropped)) == {0, NO_LABEL}
    assert dropped_conditions(labels, keys(4000), 0.1, ConditionSpec()).label is None


def test_an_example_is_the_same_in_any_batch(model):
    """Keys belong to examples, noise on the way included: batch sizes 3 and 8 give the same latents and
    images, up to float32 reassociation."""
    config = SampleConfig(num_steps=2, solver="ancestral", decoder_num_steps=2, decoder_churn=1.0)

    def images(index, *, keys):
        latents = sample_latents(model.prior, model.latent_schedule, config, keys=keys)
        return decode(model, latents.z, config, keys=keys).z

    rows = np.zeros(5, np.int32)
    first, second = (in_batches(images, rows, batch_size=size, key=jax.random.key(7)) for size in (3, 8))
    assert first.shape == (5, 16, 16, 3)
    np.testing.assert_allclose(first, second, atol=1e-4)
    np.testing.assert_allclose(
        in_batches(images, rows[:2], batch_size=3, key=jax.random.key(7), start=3), first[3:], atol=1e-4
    )
    assert np.abs(first[0] - first[1]).max() > 0.1


def test_guidance_needs_a_label_and_counts_twice(small_config, model):
    base = make_base(model, small_config.model, CLASSES, key=jax.random.key(1))
    config = SampleConfig(num_steps=3, solver="heun")
    with pytest.raises(ValueError, match="towards a label"):
        sample_latents(base, model.latent_schedule, config, keys=keys(), guidance_scale=2.0)
    label = jnp.asarray([0, 1, 2, 0])
    guided = sample_latents(
        base, model.latent_schedule, config, keys=keys(), conditions=Conditions(label), guidance_scale=2.0
    )
    assert int(guided.nfe) == 3 * 2 * 2
    # Within [−1, 5] of a grid −10, −5, 0, 5: at 0 from both sides and at 5.
    limited = dataclasses.replace(config, guidance_interval=(-1.0, 5.0))
    part = sample_latents(
        base, model.latent_schedule, limited, keys=keys(), conditions=Conditions(label), guidance_scale=2.0
    )
    assert int(part.nfe) == 3 * 2 + 3
    assert example_keys(KEY, 2, 1)[0] == example_keys(KEY, 0, 3)[2]


def test_collapse_is_told_loudly_once_and_not_without_reason():
    watch = CollapseWatch(Config(name="x"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(10, {"latent_std": 0.01, "rate": 0.0})  # still in the warm-up
        watch(300, {"latent_std": 0.3, "rate": 0.3})
        watch(300, {"latent_std": 0.042, "rate": 0.1})  # half of the noise is e^(−5/2) / 2 = 0.0410
    with pytest.warns(UserWarning, match=r"THE LATENT HAS COLLAPSED at step 400.*--loss-factor"):
        watch(400, {"latent_std": 0.040, "rate": 0.001})
    assert watch.collapsed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(500, {"latent_std": 0.02, "rate": 0.001})
    # An encoder of variance adds noise of its own, of which that of the best channel counts: √(0.082² + 1).
    of_variance = CollapseWatch(Config(name="x"))
    with pytest.warns(UserWarning, match=r"standard deviation over images, 0\.490, is below half .* 1\.003"):
        of_variance(400, {"latent_std": 0.49, "encoder_std": 1.0, "rate": 0.001})


def test_a_spread_is_that_of_the_whole_however_it_is_divided():
    x = np.random.default_rng(0).normal(3.0, 0.5, (8, 3, 2)).astype(np.float32)
    parts = [Spread.of(jnp.asarray(part)) for part in x[:, None]]
    whole = jax.tree.map(lambda *each: sum(each) / 8, *parts)
    assert float(whole.std) == pytest.approx(x.std(axis=0).mean(), rel=1e-5)
    assert float(Spread.of(jnp.ones((2, 3))).std) == 0


def test_pieces_of_a_batch_log_what_the_batch_does(small_config):
    """Of one example each, which has no spread of its own."""
    batch = {
        "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)), jnp.uint8),
        "label": jnp.zeros(4, jnp.int32),
    }
    found = []
    for pieces in (1, 4):
        train = dataclasses.replace(small_config.train, batch_size=4, accumulate=pieces)
        optimizer = make_optimizer(train)
        mesh = make_mesh(devices=jax.devices()[:1])
        step = make_step(autoencoder_loss(small_config), optimizer, train, key=KEY, mesh=mesh)
        _, metrics = step((None, batch), runs.stage1_state(small_config))
        found.append({name: float(metrics[name]) for name in ("latent_std", "rate", "loss")})
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    by_hand = np.asarray(eqx.filter_jit(runs.stage1_state(small_config).model.encoder)(x)).std(axis=0).mean()
    assert found[0]["latent_std"] == pytest.approx(by_hand, rel=1e-4)
