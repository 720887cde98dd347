"""The latents that stage 2 reads are those that it would have encoded."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import runs
from ulx.data import cache
from ulx.data.pixels import to_float
from ulx.latents import encoded
from ulx.nn.conditions import ConditionSpec
from ulx.stages import base_loss, make_base
from ulx.training import Draws


@pytest.fixture(scope="module")
def model(small_config):
    return runs.stage1_state(small_config).model


@pytest.fixture(scope="module")
def latents(model, small_dataset, tmp_path_factory):
    return encoded(small_dataset, model, tmp_path_factory.mktemp("latents"), batch_size=5, flip=False)


def test_loss_and_gradient_are_those_of_encoding_the_batch(small_config, small_dataset, model, latents):
    rng = np.random.default_rng(0)
    move = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    base = jax.tree.map(move, make_base(model, small_config.model, ConditionSpec(num_classes=3), key=jax.random.key(1)))
    rows = [3, 11, 0, 7]
    examples = [
        {name: np.stack([data.train[i][name] for i in rows]) for name in data.train[0]}
        for data in (small_dataset, latents)
    ]
    draws = Draws(keys=jax.random.split(jax.random.key(2), 4), step_key=jax.random.key(3))

    @eqx.filter_jit
    def value_and_grad(batch):
        loss = lambda base: base_loss(small_config, 16 * 16)(base, model, batch, draws, jnp.asarray(0))[0]  # noqa: E731
        return eqx.filter_value_and_grad(loss)(base)

    (online, online_grad), (cached, cached_grad) = map(value_and_grad, examples)
    assert set(examples[1]) == {"mean", "label"}
    # Batches of 5 and of 4 round differently in float32.
    assert float(cached) == pytest.approx(float(online), rel=1e-5)
    for a, b in zip(jax.tree.leaves(cached_grad), jax.tree.leaves(online_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_every_image_is_there_once_in_order(small_dataset, model, latents):
    """12 images in batches of 5: the last batch is filled up, and the filling is gone."""
    images = np.stack([example["image"] for example in small_dataset.train])
    found = np.stack([example["mean"] for example in latents.train])
    np.testing.assert_allclose(found, model.encoder(jnp.asarray(to_float(images))), atol=1e-5)
    np.testing.assert_array_equal(latents.train.labels, small_dataset.train.labels)
    assert latents.validation is small_dataset.validation


def test_flipped_images_are_encoded_not_flipped_latents(small_dataset, model, latents, tmp_path):
    both = encoded(small_dataset, model, tmp_path, batch_size=5, flip=True)
    assert len(both.train) == 24
    images = np.stack([example["image"][:, ::-1] for example in small_dataset.train])
    mirrored = np.stack([both.train[12 + i]["mean"] for i in range(12)])
    np.testing.assert_allclose(mirrored, model.encoder(jnp.asarray(to_float(images))), atol=1e-5)
    np.testing.assert_array_equal(both.train[3]["mean"], latents.train[3]["mean"])
    assert both.train[15]["label"] == both.train[3]["label"]
    assert both.fingerprint != latents.fingerprint


def test_the_fingerprint_knows_data_and_encoder(small_dataset, model, latents, tmp_path):
    """So that a checkpoint's position in one encoder's latents is refused in another's."""
    other = dataclasses.replace(small_dataset, fingerprint="other")
    other_data = encoded(other, model, tmp_path / "data", batch_size=12, flip=False)
    moved = eqx.tree_at(lambda m: m.encoder.project_out.bias, model, replace_fn=lambda bias: bias + 1e-3)
    other_encoder = encoded(small_dataset, moved, tmp_path / "encoder", batch_size=12, flip=False)
    same = encoded(small_dataset, model, tmp_path / "same", batch_size=12, flip=False)
    assert same.fingerprint == latents.fingerprint
    assert len({same.fingerprint, other_data.fingerprint, other_encoder.fingerprint}) == 3


def test_latents_of_another_encoder_or_other_data_are_refused(small_dataset, model, tmp_path):
    encoded(small_dataset, model, tmp_path, batch_size=12, flip=False)
    moved = eqx.tree_at(lambda m: m.encoder.project_out.bias, model, replace_fn=lambda bias: bias + 1e-3)
    with pytest.raises(ValueError, match=r"holds another preparation \(encoder "):
        encoded(small_dataset, moved, tmp_path, batch_size=12, flip=False)
    with pytest.raises(ValueError, match=r"holds another preparation \(mirrored False -> True\)"):
        encoded(small_dataset, model, tmp_path, batch_size=12, flip=True)
    other = dataclasses.replace(small_dataset, fingerprint="other")
    with pytest.raises(ValueError, match=r"holds another preparation \(data "):
        encoded(other, model, tmp_path, batch_size=12, flip=False)


def test_nothing_is_encoded_twice_and_what_was_interrupted_goes_on(
    small_dataset, model, latents, tmp_path, monkeypatch
):
    class Torn:
        """A source that fails at one image, the first time."""

        def __init__(self):
            self.read, self.whole = [], False

        def __len__(self):
            return len(small_dataset.train)

        def __getitem__(self, index):
            self.read.append(index)
            if index == 9 and not self.whole:
                raise RuntimeError("pulled the plug")
            return small_dataset.train[index]

    monkeypatch.setattr(cache, "SHARD_EXAMPLES", range(4, 5))  # three shards of four
    source = Torn()
    dataset = dataclasses.replace(small_dataset, train=dataclasses.replace(small_dataset.train, source=source))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        encoded(dataset, model, tmp_path, batch_size=4, flip=False)
    source.read, source.whole = [], True
    found = encoded(dataset, model, tmp_path, batch_size=4, flip=False)
    assert sorted(source.read) == [8, 9, 10, 11]
    source.read = []
    again = encoded(dataset, model, tmp_path, batch_size=4, flip=False)
    assert source.read == []
    assert found.fingerprint == again.fingerprint == latents.fingerprint
    for i in range(12):
        assert again.train[i]["label"] == latents.train[i]["label"]
        np.testing.assert_allclose(again.train[i]["mean"], latents.train[i]["mean"], atol=1e-5)  # batches of 4 and of 5
