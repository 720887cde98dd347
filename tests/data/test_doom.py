"""Walks through Doom: the same for the same seed and index, in any order and process, and moving."""

import pickle

import numpy as np
import pytest

from ulx.data import DataConfig, open_dataset
from ulx.data.doom import Walks, open_doom
from ulx.data.pipeline import train_batches

pytest.importorskip("vizdoom", reason="pip install --no-deps vizdoom==1.3.2")


def test_a_clip_follows_from_its_seed_and_index_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walks = Walks(frames=8, resolution=32, length=10, seed=0)
    first = {index: walks[index]["image"] for index in (3, 0, 7)}
    again = pickle.loads(pickle.dumps(walks))
    for index in (7, 3, 0):
        np.testing.assert_array_equal(again[index]["image"], first[index])
    assert first[3].shape == (8, 32, 32, 3)
    assert first[3].dtype == np.uint8
    assert walks[3]["label"] == 0
    assert not np.array_equal(Walks(8, 32, 10, seed=1)[3]["image"], first[3])
    assert not list(tmp_path.iterdir())  # the game's settings are not written where we are
    with pytest.raises(IndexError):
        walks[10]


def test_a_longer_clip_goes_on_from_the_shorter_one_and_a_sharper_one_shows_the_same():
    short, long = (Walks(frames, 32, 10, 0)[5]["image"] for frames in (6, 12))
    np.testing.assert_array_equal(long[:6], short)
    sharp = Walks(6, 64, 10, 0)[5]["image"]
    coarse = sharp.reshape(6, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(coarse - short).mean() < 12  # of 255: bicubic against the mean of four, on brick walls


def test_they_move_and_differ():
    clips = [Walks(16, 32, 20, 0)[index]["image"].astype(float) for index in range(12)]
    steps = [np.abs(np.diff(clip, axis=0)).mean() for clip in clips]
    assert np.median(steps) > 1
    assert len({clip.tobytes() for clip in clips}) == 12
    assert all(clip.std() > 5 for clip in clips)


def test_the_data_set():
    dataset = open_doom(32, frames=4, limit=100)
    assert (len(dataset.train), len(dataset.validation)) == (97, 3)
    assert not np.array_equal(dataset.train[0]["image"], dataset.validation[0]["image"])
    assert dataset.fingerprint != open_doom(32, frames=5, limit=100).fingerprint
    assert len(open_doom(32).validation) == 2048
    with pytest.raises(ValueError, match="at least one frame"):
        open_doom(32, frames=0)


def test_workers_give_the_same_batches():
    dataset = open_dataset(DataConfig("vizdoom", clips=True, frames=4, limit=50))
    here = next(train_batches(dataset, batch_size=4, seed=0))
    there = train_batches(dataset, batch_size=4, seed=0, workers=1)
    np.testing.assert_array_equal(next(there)["image"], here["image"])
    there.close()
