import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ulx.data.pipeline import ordered_batches, train_batches, validation_batches
from ulx.data.pixels import to_float, to_uint8
from ulx.data.source import Dataset, InMemory, Split


def dataset(count, fingerprint="f", shape=(4, 6, 3), held_out=5):
    """`count` images of noise; the label is the example's index, so that a batch tells who is in it."""

    def split(size):
        images = np.random.default_rng(size).integers(0, 256, (size, *shape), np.uint8)
        labels = np.arange(size, dtype=np.int32)
        return Split(InMemory({"image": images, "label": labels}), tuple(f"{i}.png" for i in range(size)), labels)

    return Dataset("noise", 4, ("all",), split(count), split(held_out), fingerprint)


def labels(batches, count):
    return np.concatenate([next(batches)["label"] for _ in range(count)])


def same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize(("count", "batch_size"), [(37, 8), (32, 8), (37, 1), (5, 16)])
def test_every_epoch_sees_each_example_once(count, batch_size):
    """Epochs follow each other inside batches, so no example is dropped; also when a batch exceeds the data set."""
    epochs = 6
    drawn = labels(train_batches(dataset(count), batch_size=batch_size, seed=3), -(-epochs * count // batch_size))
    orders = drawn[: epochs * count].reshape(epochs, count)
    for order in orders:
        assert sorted(order) == list(range(count))
    assert len({tuple(order) for order in orders}) == epochs


def test_the_order_is_shuffled_well():
    """Neighbours in an epoch are no neighbours in the data: their mean distance is n/3 under a uniform order."""
    order = labels(train_batches(dataset(1000), batch_size=100, seed=0), 10)
    # The standard deviation of |i − j| is n/√18 = 236; the mean of 999 (weakly dependent) ones deviates by 7.5.
    assert abs(np.abs(np.diff(order)).mean() - 1000 / 3) < 4 * 7.5


def test_batches_hold_what_the_source_holds():
    data = dataset(20)
    batch = next(train_batches(data, batch_size=6, seed=1))
    assert batch["image"].dtype == np.uint8
    assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (6,))
    for image, label in zip(batch["image"], batch["label"], strict=True):
        np.testing.assert_array_equal(image, data.train[int(label)]["image"])


def test_seeds_share_no_epoch():
    epochs = [labels(train_batches(dataset(30), batch_size=30, seed=seed), 4).reshape(4, 30) for seed in range(4)]
    assert len({tuple(order) for seed in epochs for order in seed}) == 16
    same_seed = labels(train_batches(dataset(30), batch_size=30, seed=2), 4).reshape(4, 30)
    np.testing.assert_array_equal(same_seed, epochs[2])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_each_batch(count):
    """Side by side their pieces are the batch of one process alone: disjoint, complete, the same flips."""
    arguments = {"batch_size": 8, "seed": 5, "flip": True}
    alone = train_batches(dataset(21), **arguments)
    shared = [train_batches(dataset(21), **arguments, shard_index=i, shard_count=count) for i in range(count)]
    for _ in range(7):
        pieces = [next(batches) for batches in shared]
        assert all(len(piece["label"]) == 8 // count for piece in pieces)
        same(next(alone), {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})


@pytest.mark.parametrize("given", [0, 1, 7])
def test_a_saved_position_gives_the_same_following_batches(given):
    arguments = {"batch_size": 8, "seed": 5, "flip": True}
    batches = train_batches(dataset(21), **arguments)
    for _ in range(given):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))  # what a checkpoint makes of it
    resumed = train_batches(dataset(21), **arguments)
    next(resumed)  # a position of its own, to be left
    resumed.set_state(state)
    for _ in range(6):
        same(next(batches), next(resumed))
    assert resumed.get_state() == batches.get_state()


def test_a_position_survives_a_checkpoint(tmp_path):
    batches = train_batches(dataset(21), batch_size=8, seed=5)
    labels(batches, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        expected = labels(batches, 4)
        manager.wait_until_finished()
        resumed = train_batches(dataset(21), batch_size=8, seed=5)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    np.testing.assert_array_equal(labels(resumed, 4), expected)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 6}, "seed 6 -> 5"),
        ({"batch_size": 4}, "batch_size 4 -> 8"),
        ({"flip": True}, "flip True -> False"),
        ({"dataset": dataset(21, fingerprint="g")}, "fingerprint 'g' -> 'f'"),
        ({"dataset": dataset(22)}, "examples 22 -> 21"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_position_in_other_batches_is_refused(other, named):
    state = train_batches(**({"dataset": dataset(21), "batch_size": 8, "seed": 5} | other)).get_state()
    batches, undisturbed = (train_batches(dataset(21), batch_size=8, seed=5) for _ in range(2))
    labels(batches, 2)
    labels(undisturbed, 2)
    with pytest.raises(ValueError, match=f"the saved position is one in other training batches .*{named}"):
        batches.set_state(state)
    np.testing.assert_array_equal(labels(batches, 3), labels(undisturbed, 3))


def test_workers_give_the_same_batches_and_may_change(tmp_path):
    """Two workers continue what none began, and the other way round."""
    data, arguments = dataset(21), {"batch_size": 4, "seed": 5, "flip": True}
    alone = train_batches(data, **arguments)
    start = [next(alone) for _ in range(3)]
    state = alone.get_state()
    rest = [next(alone) for _ in range(6)]

    helped = train_batches(data, **arguments, workers=2)
    helped.set_state(state)
    for expected in rest[:4]:
        same(next(helped), expected)
    middle = helped.get_state()
    helped.close()
    assert middle["batches"] == 7
    back = train_batches(data, **arguments)
    back.set_state(middle)
    for expected in rest[4:]:
        same(next(back), expected)
    assert len(start) == 3


def test_half_are_flipped_anew_in_each_epoch():
    data, epochs, count = dataset(200), 3, 200
    batches = train_batches(data, batch_size=20, seed=0, flip=True)
    flipped = np.zeros((epochs, count), bool)
    for epoch in range(epochs):
        for _ in range(10):
            batch = next(batches)
            for image, label in zip(batch["image"], batch["label"], strict=True):
                original = data.train[int(label)]["image"]
                flipped[epoch, label] = not np.array_equal(image, original)
                np.testing.assert_array_equal(image, original[:, ::-1] if flipped[epoch, label] else original)
    # 600 fair coins: a standard deviation of 0.02; two epochs agree on half of the examples, give or take 0.035.
    assert abs(flipped.mean() - 0.5) < 4 * 0.0205
    assert abs((flipped[0] == flipped[1]).mean() - 0.5) < 4 * 0.0354


def test_a_clip_is_flipped_as_one():
    data = dataset(16, shape=(5, 4, 6, 3))
    batch = next(train_batches(data, batch_size=16, seed=0, flip=True))
    flipped = 0
    for clip, label in zip(batch["image"], batch["label"], strict=True):
        original = data.train[int(label)]["image"]
        is_flipped = not np.array_equal(clip, original)
        np.testing.assert_array_equal(clip, original[:, :, ::-1] if is_flipped else original)
        flipped += is_flipped
    assert 0 < flipped < 16


@pytest.mark.parametrize(("held_out", "batch_size", "count"), [(10, 4, 1), (8, 4, 1), (3, 4, 1), (10, 4, 2), (9, 8, 4)])
def test_validation_comes_once_in_order_in_one_shape(held_out, batch_size, count):
    data = dataset(2, held_out=held_out)
    shared = [validation_batches(data, batch_size, shard_index=i, shard_count=count) for i in range(count)]
    assert {len(batches) for batches in shared} == {-(-held_out // batch_size)}
    seen = []
    for pieces in zip(*shared, strict=True):
        for piece in pieces:
            assert {len(array) for array in piece.values()} == {batch_size // count}
            for image, label in zip(piece["image"], piece["label"], strict=True):
                np.testing.assert_array_equal(image, data.validation[int(label)]["image"])
            seen += piece["label"][piece["mask"]].tolist()
    assert seen == list(range(held_out))


def test_ordered_batches_of_the_training_images():
    batches = ordered_batches(dataset(7).train, 4)
    assert [batch["label"][batch["mask"]].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6]]
    with pytest.raises(IndexError, match="batch 2 of 2"):
        batches[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "shard_count": 4}, "a batch of 6 cannot be shared evenly by 4"),
        ({"batch_size": 0}, "a batch of 0"),
        ({"batch_size": 4, "shard_index": 2, "shard_count": 2}, "process 2 of 2"),
    ],
)
def test_a_share_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_batches(dataset(8), seed=0, **arguments)
    with pytest.raises(ValueError, match=message):
        validation_batches(dataset(8), **arguments)


def test_rows_names_and_labels_must_agree():
    with pytest.raises(ValueError, match=r"one row per example, got {'image': 3, 'label': 2}"):
        InMemory({"image": np.zeros((3, 2, 2, 3), np.uint8), "label": np.zeros(2, np.int32)})
    with pytest.raises(ValueError, match="got 1 names and 2 labels"):
        Split(InMemory({"label": np.zeros(2, np.int32)}), ("a",), np.zeros(2, np.int32))


@pytest.mark.parametrize("convert", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_pixels_to_values_and_back(convert):
    pixels = np.arange(256, dtype=np.uint8)
    values = to_float(convert(pixels))
    assert values.dtype == np.float32
    # The last bit below 1 is 2^-24; XLA divides by a constant with two roundings, NumPy with one.
    np.testing.assert_allclose(values, (pixels.astype(np.float64) - 127.5) / 127.5, rtol=0, atol=2**-23)
    assert (values[0], values[-1]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(values), pixels)
    np.testing.assert_array_equal(jax.jit(lambda x: to_uint8(to_float(x)))(pixels), pixels)


def test_values_out_of_range_are_clipped_and_others_rounded():
    values = np.array([-7.0, -1.004, 1.004, 9.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 255, 255, 1, 0]
    assert to_uint8(jax.numpy.asarray(values)).tolist() == [0, 0, 255, 255, 1, 0]
