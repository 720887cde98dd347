"""One interface for classes, captions and given frames: what it promises, and that a model learns by each of them."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ulx.config import SampleConfig
from ulx.denoiser import Denoiser
from ulx.diffusion import per_example_keys
from ulx.frames import given_frames
from ulx.generate import in_batches, sample_latents
from ulx.losses import diffusion_loss
from ulx.nn.attention import attend
from ulx.nn.conditions import NO_LABEL, Conditions, ConditionSpec, Text
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViT, UViTConfig
from ulx.schedules import cosine
from ulx.stages import dropped_conditions
from ulx.weightings import sigmoid

KEY = jax.random.key(0)
SHAPE = (2, 4, 4, 3)
"""Of a clip of two frames."""
NETWORK = UViTConfig(patch=(1, 2, 2), channels=(32,), blocks=(2,), block=BlockConfig(head_size=16))
STEPS = 400
EVERYTHING = ConditionSpec(num_classes=4, text_channels=6, frames_shape=(2, 4, 4, 4))


def moved(module, seed: int = 0, by: float = 0.1):
    """Weights away from zero: an untrained network predicts nothing."""
    rng = np.random.default_rng(seed)
    move = lambda leaf: leaf + by * rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: move(leaf) if eqx.is_inexact_array(leaf) else leaf, module)


def texts(count: int, length: int = 5, seed: int = 0) -> Text:
    """Captions of 1, 2, … tokens."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < 1 + np.arange(count)[:, None] % length
    return Text(jnp.asarray(rng.standard_normal((count, length, 6)), jnp.float32), jnp.asarray(mask))


def told(count: int) -> Any:
    """Everything. (Any: its parts may be None to the type checker.)"""
    frames = given_frames(jax.random.normal(KEY, (count, *SHAPE)), 1)
    return Conditions(jnp.arange(count) % 4, texts(count), frames)


@pytest.fixture(scope="module")
def network() -> UViT:
    return moved(UViT(SHAPE, NETWORK, conditions=EVERYTHING, key=KEY))


@pytest.fixture(scope="module")
def call(network):
    z, level = jax.random.normal(jax.random.key(1), (3, *SHAPE)), jnp.asarray([-3.0, 0.0, 3.0])
    return eqx.filter_jit(lambda conditions: network(z, level, conditions))


@pytest.mark.parametrize("kind", ["label", "text", "frames"])
def test_a_missing_condition_is_that_of_no_example(call, kind):
    """What a batch is not given at all is what examples are not given one by one."""
    everything: Any = told(3)
    none = {
        "label": jnp.full(3, NO_LABEL),
        "text": Text(everything.text.tokens, jnp.zeros((3, 5), bool)),
        "frames": jnp.zeros((3, 2, 4, 4, 4)),
    }[kind]
    without = call(dataclasses.replace(everything, **{kind: None}))
    np.testing.assert_allclose(call(dataclasses.replace(everything, **{kind: none})), without, atol=1e-6)
    assert (np.abs(call(everything) - without).max((1, 2, 3, 4)) > 1e-3).all()


def test_a_caption_is_its_tokens_in_any_padding(call):
    """Numbers behind the mask, and how much of it there is, change nothing; those of a token do, in its own image."""
    text: Any = texts(3)
    found = call(Conditions(text=text))
    noise = jax.random.normal(jax.random.key(2), text.tokens.shape)
    padding = jnp.where(text.mask[..., None], text.tokens, 100 * noise)
    np.testing.assert_allclose(call(Conditions(text=Text(padding, text.mask))), found, atol=1e-5)
    longer = Text(jnp.pad(text.tokens, ((0, 0), (0, 3), (0, 0))), jnp.pad(text.mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(call(Conditions(text=longer)), found, atol=1e-5)
    other = Text(text.tokens.at[1, 1].set(noise[1, 1]), text.mask)
    changed = np.abs(call(Conditions(text=other)) - found).max((1, 2, 3, 4))
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() < 1e-6


def test_captions_of_one_mean_differ_by_their_tokens(call):
    """Attention sees tokens, not their mean alone: two and two tokens with the same (normalised) mean."""
    one = jnp.asarray([[1.0, -1, 0, 0, 0, 0], [-1, 1, 0, 0, 0, 0]])
    two = jnp.asarray([[0.0, 0, 0, 1, -1, 0], [0, 0, 0, -1, 1, 0]])
    batch = lambda tokens: Text(jnp.tile(tokens, (3, 1, 1)), jnp.ones((3, 2), bool))  # noqa: E731
    first, second = (call(Conditions(text=batch(tokens))) for tokens in (one, two))
    assert np.abs(first - second).max() > 1e-3


def test_every_weight_of_every_condition_has_a_gradient(network):
    z, level, goal = (
        jax.random.normal(KEY, (3, *SHAPE)),
        jnp.zeros(3),
        jax.random.normal(jax.random.key(3), (3, *SHAPE)),
    )
    # Of one example there is no caption: the learned vector in its place.
    everything = told(3).without(jnp.asarray([False, True, False]))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(network):
        return jnp.sum(network(z, level, everything) * goal)

    for path, leaf in jax.tree.leaves_with_path(gradient(network)):
        name = jax.tree_util.keystr(path)
        # Of labels each that was told, and the null one.
        parts = np.abs(leaf)[[0, 2, 4]] if "labels" in name else np.abs(leaf)[None]
        assert all(part.max() > 1e-6 for part in parts), name


def test_a_network_is_told_what_it_was_built_for():
    z, level = jnp.zeros((1, *SHAPE)), jnp.zeros(1)
    bare = UViT(SHAPE, NETWORK, key=KEY)
    some = told(1)
    for kind, message in (
        ("label", "built without classes"),
        ("text", "built without captions, but got some of 6"),
        ("frames", "built to be given no frames"),
    ):
        with pytest.raises(ValueError, match=message):
            bare(z, level, Conditions(**{kind: getattr(some, kind)}))
    other = UViT(SHAPE, NETWORK, conditions=ConditionSpec(text_channels=8), key=KEY)
    with pytest.raises(ValueError, match="for captions of 8 channels, but got some of 6"):
        other(z, level, Conditions(text=some.text))
    assert jax.tree.leaves(some.known_to(ConditionSpec())) == []
    known = some.known_to(ConditionSpec(text_channels=6))
    assert known.text is some.text
    assert known.label is None
    assert known.frames is None


def test_what_guidance_moves_away_from_has_no_label_and_no_caption_but_the_frames():
    everything = told(3)
    null = everything.without()
    assert null.label.tolist() == [NO_LABEL] * 3
    assert not null.text.mask.any()
    np.testing.assert_array_equal(null.frames, everything.frames)
    some = everything.without(jnp.asarray([True, False, False]))
    assert some.label.tolist() == [NO_LABEL, 1, 2]
    np.testing.assert_array_equal(some.text.mask[1:], everything.text.mask[1:])
    assert not some.text.mask[0].any()
    both = everything.joined(null)
    assert both.label.tolist() == [0, 1, 2, *[NO_LABEL] * 3]
    assert both.text.tokens.shape == (6, 5, 6)


def test_labels_and_captions_are_dropped_together():
    text = texts(4000)
    batch = {"label": jnp.ones(4000, jnp.int32), "text": text.tokens, "text_mask": text.mask}
    dropped: Any = dropped_conditions(batch, per_example_keys(KEY, 4000), 0.2, EVERYTHING)
    gone = np.asarray(dropped.label == NO_LABEL)
    assert gone.mean() == pytest.approx(0.2, abs=0.025)  # four standard errors
    np.testing.assert_array_equal(gone, ~np.asarray(dropped.text.mask).any(1))
    captions: Any = dropped_conditions(batch, per_example_keys(KEY, 4000), 0.2, ConditionSpec(text_channels=6))
    assert captions.label is None
    np.testing.assert_array_equal(captions.text.mask, dropped.text.mask)


def test_masked_attention_is_attention_to_those_that_are_there():
    query, key, value = jax.random.normal(KEY, (3, 2, 5, 2, 4))
    mask = jnp.asarray([[True, False, True, True, False], [False, True, False, False, False]])
    found = attend(query, key, value, mask)
    for row in range(2):
        kept = np.flatnonzero(mask[row])
        alone = attend(query[row : row + 1], key[row : row + 1, kept], value[row : row + 1, kept])
        np.testing.assert_allclose(found[row : row + 1], alone, atol=1e-6)
    reference = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    np.testing.assert_allclose(found, reference, atol=1e-6)


SPECS = {
    "label": ConditionSpec(num_classes=4),
    "text": ConditionSpec(text_channels=6),
    "frames": ConditionSpec(frames_shape=EVERYTHING.frames_shape),
}


@pytest.mark.parametrize("kind", SPECS)
def test_a_tiny_set_is_overfitted_by_each_condition(kind):
    """Four clips of which nothing but the condition tells which is which: after training, each condition brings its own
    clip out of noise. The same training and sampling with nothing told does not, so it is the condition that does."""
    clips = np.asarray(jax.random.normal(jax.random.key(5), (4, *SHAPE)))
    # Frames of other clips: were they part of the answer, a copy would do.
    first = given_frames(jax.random.normal(jax.random.key(6), (4, *SHAPE)), 1)
    everything = Conditions(jnp.arange(4), texts(4), first)
    schedule, weighting, sampler = cosine(5.0, -7.0), sigmoid(bias=0.0), SampleConfig(num_steps=12, solver="euler")
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))
    times = lambda tree: jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 8), tree)  # noqa: E731

    def trained(conditions: Conditions) -> Denoiser:
        denoiser = Denoiser(UViT(SHAPE, NETWORK, conditions=SPECS[kind], key=KEY))
        params, static = eqx.partition(denoiser, eqx.is_inexact_array)

        def loss(params, key):
            denoise = eqx.combine(params, static).given(times(conditions))
            return diffusion_loss(denoise, times(jnp.asarray(clips)), schedule, weighting, key=key).mean()

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(7), STEPS)
        run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
        return eqx.combine(run(params), static)

    def distances(conditions: Conditions) -> np.ndarray:
        """RMS from each sample to each clip."""
        base, keys = trained(conditions), per_example_keys(KEY, 4)
        sampled = sample_latents(base, schedule, sampler, keys=keys, conditions=conditions).z
        difference = np.asarray(sampled)[:, None] / jax.nn.sigmoid(5.0) ** 0.5 - clips[None]
        return np.sqrt((difference**2).mean((2, 3, 4, 5)))

    found = distances(everything.known_to(SPECS[kind]))
    # The latent's own noise has σ = 0.08, and the clips lie √2 apart.
    assert np.diag(found).max() < 0.3, found
    assert found[~np.eye(4, dtype=bool)].min() > 1.1
    assert np.diag(distances(Conditions())).max() > 0.8


def test_rows_are_trees_of_what_can_be_indexed():
    """Arrays, and what makes something of the rows when it is asked."""

    class Late:
        asked: list = []  # noqa: RUF012

        def __len__(self):
            return 5

        def __getitem__(self, rows):
            self.asked.append(rows.tolist())
            return {"double": 2.0 * jnp.asarray(rows)}

    def work(tree, *, keys):
        return {"sum": tree["late"]["double"] + tree["plain"]}

    late = Late()
    found = in_batches(work, {"late": late, "plain": np.arange(5.0)}, batch_size=2, key=KEY)
    np.testing.assert_array_equal(found["sum"], 3.0 * np.arange(5))
    assert late.asked == [[0, 1], [2, 3], [4, 4]]
