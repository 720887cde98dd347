"""Given frames: what networks, losses and samplers see of a clip, and that they see nothing else of it."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import runs
from ulx.data.source import Dataset, InMemory, Split
from ulx.diffusion import per_example_keys
from ulx.frames import given_frames, given_shape, padded
from ulx.generate import decode, extend, sample_latents
from ulx.latents import encoded
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViT, UViTConfig
from ulx.stages import autoencoder_loss, base_loss, given_or_dropped
from ulx.training import Draws

KEY = jax.random.key(0)
SHAPE = (4, 16, 16, 3)
NETWORK = UViTConfig(patch=1, channels=(16,), blocks=(1,), block=BlockConfig(head_size=16))


def moved(module, seed=0):
    """Every weight away from zero: an untrained network predicts nothing."""
    rng = np.random.default_rng(seed)
    move = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: move(leaf) if eqx.is_inexact_array(leaf) else leaf, module)


@pytest.fixture(scope="module")
def model(clip_config):
    return moved(runs.stage1_state(clip_config).model)


@pytest.fixture(scope="module")
def base(clip_config, model):
    return moved(runs.stage2_state(clip_config, model, ConditionSpec(num_classes=1)).model, seed=1)


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)


def draws(size: int) -> Draws:
    return Draws(keys=per_example_keys(KEY, size), step_key=jax.random.key(1))


def test_the_first_frames_as_they_are_and_a_mask(clips):
    x = jnp.asarray(clips[:3] / np.float32(127.5) - 1)
    found = np.asarray(given_frames(x, jnp.asarray([0, 1, 3])))
    assert found.shape[1:] == given_shape(SHAPE) == (4, 16, 16, 4)
    for clip, count in zip(range(3), (0, 1, 3), strict=True):
        np.testing.assert_array_equal(found[clip, :count, ..., :3], x[clip, :count])
        assert (found[clip, :count, ..., 3] == 1).all()
        assert not found[clip, count:].any()
    np.testing.assert_array_equal(given_frames(padded(x[:, :2], 4), 2), given_frames(x, 2))
    with pytest.raises(ValueError, match=r"not of examples of shape \(8, 8, 3\)"):
        given_shape((8, 8, 3))


def test_no_frames_are_a_mask_of_zeros():
    """What a network does without frames is what it was trained to do when they were dropped."""
    network = moved(UViT((2, 4, 4, 3), NETWORK, conditions=ConditionSpec(frames_shape=(4, 8, 8, 4)), key=KEY))
    z, level = jax.random.normal(KEY, (2, 2, 4, 4, 3)), jnp.zeros(2)
    none = network(z, level)
    np.testing.assert_allclose(network(z, level, Conditions(frames=jnp.zeros((2, 4, 8, 8, 4)))), none, atol=1e-6)
    some = given_frames(jax.random.normal(jax.random.key(2), (2, 4, 8, 8, 3)), jnp.asarray([2, 0]))
    change = np.abs(network(z, level, Conditions(frames=some)) - none).max((1, 2, 3, 4))
    assert change[0] > 1e-2
    assert change[1] < 1e-5


def test_every_step_of_time_is_given_all_frames_at_its_place():
    """Blocks that do nothing yet (their gates are 0) leave what goes in: a given patch shows at its own place, at all
    steps of time, each alike but its own, which is given it once more."""
    network = UViT((3, 4, 4, 2), NETWORK, conditions=ConditionSpec(frames_shape=(6, 8, 8, 4)), key=KEY)
    network = eqx.tree_at(lambda network: network.project_out, network, replace_fn=moved)
    z, level = jax.random.normal(KEY, (1, 3, 4, 4, 2)), jnp.zeros(1)
    frames = given_frames(jax.random.normal(jax.random.key(2), (1, 6, 8, 8, 3)), 4)
    # In frame 2, the first of the second step, the patch of 2×2 pixels at place (1, 3).
    others = frames.at[0, 2, 2:4, 6:8, :3].add(1.0)
    one, other = (network(z, level, Conditions(frames=each)) for each in (frames, others))
    change = np.abs(other - one).max(axis=-1)[0]
    assert (change[:, 1, 3] > 1e-3).all()
    change[:, 1, 3] = 0
    assert not change.any()

    # What it adds, by the weights: of each step the pixels and masks of its two frames, 2×2 of them.
    patches = frames.reshape(1, 3, 2, 4, 2, 4, 2, 4).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(3, 4, 4, 32)
    own = patches @ network.frames.weight
    history = jnp.concatenate(list(patches), axis=-1) @ network.history.weight
    x = network.project_in(z)[0] + own + history[None] + network.frames.bias + network.position
    by_hand = network.project_out((x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6))
    np.testing.assert_allclose(one[0], by_hand, atol=2e-5)  # float32


def test_a_network_without_frames_refuses_them():
    network = UViT((2, 4, 4, 3), NETWORK, key=KEY)
    with pytest.raises(ValueError, match="built to be given no frames"):
        network(jnp.zeros((1, 2, 4, 4, 3)), jnp.zeros(1), Conditions(frames=jnp.zeros((1, 4, 8, 8, 4))))


def test_frames_of_another_shape_than_a_whole_clip_are_refused():
    network = UViT((2, 4, 4, 3), NETWORK, conditions=ConditionSpec(frames_shape=(4, 8, 8, 4)), key=KEY)
    with pytest.raises(ValueError, match=re.escape("given frames of shape (4, 8, 8, 4)") + ".* got .2, 8, 8, 4"):
        network(jnp.zeros((1, 2, 4, 4, 3)), jnp.zeros(1), Conditions(frames=jnp.zeros((1, 2, 8, 8, 4))))


def test_frames_are_dropped_at_the_rate_asked_for():
    x = jnp.ones((4000, 2, 1, 1, 1))
    keys = per_example_keys(KEY, 4000)
    given = np.asarray(given_or_dropped(x, keys, 1, 0.3))[:, 0, 0, 0, 1]
    assert given.mean() == pytest.approx(0.7, abs=0.03)  # four standard errors
    assert given_or_dropped(x, keys, 0, 0.3) is None
    assert np.asarray(given_or_dropped(x, keys, 1, 0.0))[..., 1].sum() == 4000


@pytest.mark.parametrize("rate", [1e-9, 1.0])
def test_stage_1_s_decoder_sees_the_given_frames_and_the_rate_does_not(clip_config, model, clips, rate):
    """The bound by hand with and without frames: the same rate, another decoder term."""
    batch = {"image": jnp.asarray(clips), "label": jnp.zeros(6, jnp.int32)}

    @eqx.filter_jit
    def found(model, config):
        return autoencoder_loss(config)(model, None, batch, draws(6), jnp.asarray(10))[1]

    without = dataclasses.replace(clip_config, frames_dropout=1.0)
    changed = found(model, dataclasses.replace(clip_config, frames_dropout=rate))
    none = found(model, without)
    assert float(changed["rate"]) == pytest.approx(float(none["rate"]), rel=1e-6)
    assert (abs(float(changed["decoder"]) - float(none["decoder"])) > 1e-4) == (rate < 1)


def test_stage_2_on_cached_latents_is_stage_2_on_clips(clip_config, model, base, clips, tmp_path):
    labels = np.zeros(6, np.int32)
    names = tuple("abcdef")
    split = Split(InMemory({"image": clips, "label": labels}), names, labels)
    cached = encoded(
        Dataset("clips", 16, ("clips",), split, split, "f"), model, tmp_path, batch_size=4, flip=False, first=2
    )
    kept = [cached.train[i] for i in range(6)]
    assert kept[0]["first"].shape == (2, 16, 16, 3)
    latents = {name: jnp.stack([example[name] for example in kept]) for name in kept[0]}
    loss = base_loss(dataclasses.replace(clip_config, base_frames_dropout=0.5), 4 * 16 * 16)
    given = dataclasses.replace(clip_config, base_frames_dropout=1e-9)

    @eqx.filter_jit
    def value(loss, frozen, batch):
        return loss(base, frozen, batch, draws(6), jnp.asarray(0))[0]

    online = value(loss, model, {"image": jnp.asarray(clips), "label": jnp.asarray(labels)})
    assert float(value(loss, None, latents)) == pytest.approx(float(online), rel=1e-5)
    assert float(value(base_loss(given, 4 * 16 * 16), None, latents)) != pytest.approx(float(online), rel=1e-4)


def test_samples_follow_the_given_frames_alone(clip_config, model, base, clips):
    x = jnp.asarray(clips[:2] / np.float32(127.5) - 1)
    later = x.at[:, 2:].set(0.0)
    keys = per_example_keys(KEY, 2)

    def sampled(clip):
        told = Conditions(frames=given_frames(clip, 2))
        z_0 = sample_latents(base, model.latent_schedule, clip_config.sample, keys=keys, conditions=told).z
        return decode(model, z_0, clip_config.sample, keys=keys, conditions=told).z

    np.testing.assert_array_equal(sampled(x), sampled(later))
    assert np.abs(sampled(x) - sampled(x.at[:, 1].set(0.0))).max() > 1e-3


def test_a_rolled_window_is_given_the_last_frames(clip_config, model, base, clips):
    """By hand: the next clip, given the last two frames, adds two; and again."""
    x = jnp.asarray(clips[:2] / np.float32(127.5) - 1)
    keys = per_example_keys(KEY, 2)
    found = extend(model, base, x, 7, clip_config.sample, given=2, keys=keys)
    assert found.shape == (2, 7, 16, 16, 3)
    by_hand = x
    for window in (1, 2):
        pairs = jax.vmap(lambda key, i=window: jax.random.split(jax.random.fold_in(key, i)))(keys)
        frames = jnp.concatenate([by_hand[:, -2:], jnp.zeros((2, 2, 16, 16, 3))], axis=1)
        mask = jnp.zeros((2, 4, 16, 16, 1)).at[:, :2].set(1)
        told = Conditions(frames=jnp.concatenate([frames, mask], axis=-1))
        z_0 = sample_latents(base, model.latent_schedule, clip_config.sample, keys=pairs[:, 0], conditions=told).z
        clip = decode(model, z_0, clip_config.sample, keys=pairs[:, 1], conditions=told).z
        by_hand = jnp.concatenate([by_hand, clip[:, 2:]], axis=1)
    np.testing.assert_allclose(found, by_hand[:, :7], atol=1e-6)
    np.testing.assert_array_equal(extend(model, base, x, 3, clip_config.sample, given=2, keys=keys), x[:, :3])
    with pytest.raises(ValueError, match="of 4 frames, 5 cannot be given to a model of 4 frames a clip"):
        extend(model, base, x, 7, clip_config.sample, given=5, keys=keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"source": "openmoji", "clips": False}},
            "model.given_frames=2, but --data.source openmoji has no clips",
        ),
        ({"single_stage": True}, "single_stage generates with the stage-1 prior, which is given no frames"),
        ({"data": {"frames": 2}}, "must leave some of a clip's 2 frames"),
        ({"frames_dropout": 1.5}, "frames_dropout must be in"),
        ({"base_frames_dropout": -0.1}, "base_frames_dropout must be in"),
    ],
)
def test_settings_that_cannot_be(clip_config, changes, message):
    data = dataclasses.replace(clip_config.data, **changes.pop("data", {})) if "data" in changes else clip_config.data
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(clip_config, data=data, **changes)
