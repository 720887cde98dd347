"""Work that is interrupted goes on where it stopped, with the same results; what is of other work is not taken for its
own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from stand_ins import Corner

from ulx import evaluation, job, runs
from ulx.evaluation_data import evaluation_facts
from ulx.generate import in_batches
from ulx.metrics import reference
from ulx.metrics.entries import as_json
from ulx.metrics.features import features
from ulx.metrics.frechet import Moments
from ulx.metrics.reference import training_moments
from ulx.metrics_log import MetricsLog
from ulx.progress import Progress
from ulx.rows import Store
from ulx.runner import Runner, Told

KEY = jax.random.key(5)


class Stopped(Exception):
    pass


def part(first: int, count: int) -> list[np.ndarray]:
    """Rows of an array of pairs and of one of bytes."""
    index = np.arange(first, first + count)
    return [np.stack([index, index**2], axis=1).astype(np.float32), index.astype(np.uint8)]


def test_rows_are_found_again_without_those_of_a_batch_that_was_cut_off(tmp_path):
    store = Store.begin(tmp_path / "unfinished", {"seed": 0})
    rows = store.rows("two arrays", 7)
    rows.append(part(0, 3))
    whole = (tmp_path / "unfinished" / "two-arrays.0.npy").stat().st_size
    rows.append(part(3, 2))
    note = tmp_path / "unfinished" / "two-arrays.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"done": 3}))  # as if stopped before the note
    with pytest.raises(ValueError, match="has 3 of 7 rows"):
        store.rows("two arrays", 7).leaves()

    again = Store.begin(tmp_path / "unfinished", {"seed": 0}).rows("two arrays", 7)
    assert again.done == 3
    again.append(part(3, 1))
    assert (tmp_path / "unfinished" / "two-arrays.0.npy").stat().st_size == whole + 8
    again.append(part(4, 3))
    for found, expected in zip(again.leaves(), part(0, 7), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert isinstance(found, np.memmap)
        assert found.dtype == expected.dtype
        assert not found.flags.writeable
    # Another number of rows is other work, and so is another name.
    assert store.rows("two arrays", 8).done == store.rows("another", 7).done == 0
    note.write_text("")  # as a machine that went down may leave it
    assert store.rows("two arrays", 7).done == 0


def test_other_facts_begin_anew_and_the_end_leaves_nothing(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "unfinished"
    Store.begin(folder, {"seed": 0, "weights": "a"}).rows("x", 2).append([np.zeros(1)])
    assert Store.begin(folder, {"weights": "a", "seed": 0}).rows("x", 2).done == 1
    assert capsys.readouterr().out == ""
    store = Store.begin(folder, {"seed": 1, "weights": "a"})
    assert store.rows("x", 2).done == 0
    assert "begins anew" in capsys.readouterr().out
    # Stopped while it is removed, it is nobody's.
    store.rows("x", 2).append([np.zeros(1)])
    with monkeypatch.context() as patch:
        patch.setattr("ulx.rows.shutil.rmtree", lambda folder: (folder / "x.0.npy").unlink())
        store.finish()
    store = Store.begin(folder, {"seed": 1, "weights": "a"})
    assert store.rows("x", 2).done == 0
    store.finish()
    assert not folder.exists()
    Store().finish()


def test_a_full_disk_is_named_and_what_was_there_is_good(tmp_path, monkeypatch):
    store = Store.begin(tmp_path / "unfinished", {})
    rows = store.rows("x", 4)
    rows.append([np.arange(2.0)])
    with monkeypatch.context() as patch:

        def full(descriptor: int):
            raise OSError(28, "No space left on device")

        patch.setattr("ulx.rows.os.fsync", full)
        with pytest.raises(OSError, match=r"unfinished: No space left on device: .* goes on with it"):
            rows.append([np.arange(2.0, 4.0)])
    again = store.rows("x", 4)
    assert again.done == 2
    again.append([np.arange(2.0, 4.0)])
    np.testing.assert_array_equal(again.leaves()[0], np.arange(4.0))


def test_batches_go_on_where_they_stopped(tmp_path):
    """Rows 0 to 4 of 7 in batches of two were done: with batches of three the rest is two calls, and the same to the
    bit."""
    rows = np.arange(7.0, dtype=np.float32)
    calls = []

    def noisy(x, *, keys):
        calls.append(x.shape)
        return {"noisy": x[:, None] + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys), "plain": x}

    expected = in_batches(noisy, rows, batch_size=2, key=KEY)

    def stop(done: int) -> None:
        if len(calls) == 2:
            raise Stopped

    store = Store.begin(tmp_path / "unfinished", {})
    calls.clear()
    with pytest.raises(Stopped):
        in_batches(noisy, rows, batch_size=2, key=KEY, on_batch=stop, into=store.rows("x", 7))
    calls.clear()
    found = in_batches(noisy, rows, batch_size=3, key=KEY, into=store.rows("x", 7))
    assert len(calls) == 1
    calls.clear()
    once_more = in_batches(noisy, rows, batch_size=3, key=KEY, into=store.rows("x", 7))
    assert len(calls) == 1  # traced for its structure, not computed
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
        np.testing.assert_array_equal(once_more[name], values)


def test_features_go_on_where_they_stopped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    seen = []

    def network(x):
        jax.debug.callback(lambda: seen.append(1))
        return x[:, 0, 0]

    expected = features(network, images, 2)
    into = Store.begin(tmp_path / "unfinished", {}).rows("x", 7)
    into.append([expected[:4]])
    jax.effects_barrier()
    seen.clear()
    found = features(network, images, 2, into=into)
    jax.effects_barrier()
    assert len(seen) == 2
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(features(network, images, 2, into=into), expected)
    left = features(network, iter([]), 2, total=7, into=into)
    np.testing.assert_array_equal(left, expected)


def test_progress_counts_the_rate_of_what_is_left(capsys):
    with Progress("work", total=100) as progress:
        progress.skip(90)
        progress.began -= 5.0
        progress.advance(5)
    assert "95/100 it  1 it/s  5s elapsed, 5s left" in capsys.readouterr().err


def test_moments_of_the_training_set_go_on_where_they_stopped(small_dataset, tmp_path, monkeypatch):
    """Stopped after two of three batches, of which the first was kept."""
    expected = training_moments(small_dataset, Corner(), str(tmp_path / "at once"), 5)
    batches = reference.feature_batches
    asked = []

    def stopping(network, images, *args, **kwargs):
        for i, batch in enumerate(batches(network, images, *args, **kwargs)):
            asked.append(len(batch))
            if i == 1:
                raise Stopped
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(reference, "feature_batches", stopping)
        patch.setattr(reference, "EVERY", 0.0)
        with pytest.raises(Stopped):
            training_moments(small_dataset, Corner(), str(tmp_path), 5)
    (begun,) = (tmp_path / "moments").glob("*.npz")

    # What was begun with another network is not taken for this one's.
    other = Corner(definition="another")
    begun.rename(begun.with_name(begun.name + ".aside"))
    whole = training_moments(small_dataset, other, str(tmp_path), 5)
    assert whole.count == 12
    begun.with_name(begun.name + ".aside").rename(begun)

    read = []
    train = small_dataset.train

    class Counted:
        def __len__(self):
            return len(train)

        def __getitem__(self, index):
            read.append(index)
            return train.source[index]

    counted = dataclasses.replace(small_dataset, train=dataclasses.replace(train, source=Counted()))
    found = training_moments(counted, Corner(), str(tmp_path), 5)
    assert read == list(range(5, 12))
    assert found.count == expected.count == 12
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.m2, expected.m2)
    assert not begun.exists()
    assert isinstance(found, Moments)


@pytest.fixture
def cheap(monkeypatch, small_dataset, tmp_path):
    monkeypatch.setattr(evaluation, "networks", lambda config: ([Corner()], None, None))
    monkeypatch.setenv("ULX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cheap")
def test_an_evaluation_that_was_stopped_goes_on_and_says_the_same(
    trained_run, copy_of, small_dataset, monkeypatch, capsys
):
    """Stopped before the base model's latents were decoded, twice; then the samples of the prior, the reconstructions
    and all that went before are not made again. All is as without a store."""
    run, path = runs.load(trained_run), copy_of(trained_run)
    for stage in ("stage1", "stage2"):
        with MetricsLog(path / f"{stage}.jsonl") as log:
            log.write(6, {"loss": 2.0, "rate": 1.0, "decoder": 1.0, "latent_std": 0.5})
    config = dataclasses.replace(run.config, evaluate=dataclasses.replace(run.config.evaluate, flow_images=0))
    base = run.base
    assert base is not None
    measure = lambda: job.measure(path, run.model, base, small_dataset, config)  # noqa: E731
    in_memory = evaluation.evaluate(run.model, base, small_dataset, config)
    expected, pictures = json.loads(as_json(in_memory.metrics)), in_memory.pictures

    decoded, plain = [], Runner.decode

    def counted(stop: str | None):
        def decode(self, latents, purpose, told=None, *, name=None):
            decoded.append((name, self.store.rows(name, len(latents)).done))
            if stop is not None and name == stop:
                raise KeyboardInterrupt
            return plain(self, latents, purpose, Told() if told is None else told, name=name)

        return decode

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "decode", counted("base samples"))
            with pytest.raises(KeyboardInterrupt):
                measure()
    unfinished = path / "evaluation" / "unfinished"
    note = unfinished / "prior-samples.json"  # and one batch of another kind was lost
    note.write_text(json.dumps(json.loads(note.read_text()) | {"done": 4}))
    decoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "decode", counted(None))
        capsys.readouterr()
        measure()
    assert "begins anew" not in capsys.readouterr().out
    assert [done for name, done in decoded if name == "reconstructions"] == [5]
    assert [done for name, done in decoded if name == "prior samples"] == [4]
    assert [done for name, done in decoded if name == "base samples"] == [0]
    found = json.loads((path / "evaluation" / "metrics.json").read_text())
    assert {name: found[name] for name in expected} == expected
    again = dict(np.load(path / "evaluation" / "pictures.npz"))
    assert again.keys() == pictures.keys()
    for name, values in pictures.items():
        np.testing.assert_array_equal(again[name], values)
    assert not unfinished.exists()


def test_facts_change_with_all_that_results_follow_from(trained_run, small_dataset, tmp_path, monkeypatch):
    run = runs.load(trained_run)
    model, base, config = run.model, run.base, run.config
    assert base is not None
    facts = lambda **others: evaluation_facts(  # noqa: E731
        **({"model": model, "base": base, "dataset": small_dataset, "config": config} | others)
    )
    known = facts()
    assert json.loads(json.dumps(known, sort_keys=True)) == json.loads(json.dumps(facts(), sort_keys=True))
    options = lambda **others: dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **others))  # noqa: E731
    # Where it lies, and what is measured of the same images, change none of these.
    for same in (dataclasses.replace(config, name="other", resume=True), options(lpips=True, inception_weights="file")):
        assert facts(config=same) == known
    moved = jax.tree.map(lambda leaf: leaf + 1e-3 if hasattr(leaf, "dtype") else leaf, base)
    sampler = dataclasses.replace(config, sample=dataclasses.replace(config.sample, num_steps=3))
    for other in (
        facts(base=moved),
        facts(config=sampler),
        facts(config=dataclasses.replace(config, seed=1)),
        facts(config=options(held_out=3)),
        facts(dataset=dataclasses.replace(small_dataset, fingerprint="another")),
    ):
        assert other != known
    code = tmp_path / "ulx"
    code.mkdir()
    (code / "__init__.py").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("ulx.__file__", str(code / "__init__.py"))
        first = facts()["code"]
        (code / "samplers.py").write_text("x = 1")
        assert facts()["code"] != first
