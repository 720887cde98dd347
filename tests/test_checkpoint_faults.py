"""Checkpoints that are damaged, or cannot be written: what happens, and that nothing is lost."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from small_training import (
    CrashError,
    Line,
    Points,
    bits,
    cut,
    flip,
    largest,
    logged,
    no_file_above,
    raise_at,
    steps_of,
    trained,
)

from ulx import run_folder
from ulx.checkpoint import Checkpoints
from ulx.config import TrainConfig, to_json
from ulx.training import TrainState, make_optimizer

FULL = 100_000
"""Bytes of a file where a disk is full: less than a checkpoint has, more than a test prints."""


@pytest.fixture
def saves_at_once(monkeypatch) -> None:
    """What is saved is written, or refused, before the next step, so that a test knows which it was."""
    save = Checkpoints.save

    def at_once(self, *args, **options) -> None:
        save(self, *args, **options)
        if self._hashing is not None:  # another thread waits for it: this one would be told what is wrong but once
            self._hashing.join()

    monkeypatch.setattr(Checkpoints, "save", at_once)


@pytest.mark.parametrize(
    ("damage", "hashed"), [(cut, True), (flip, True), (Path.unlink, True), (cut, False), (Path.unlink, False)]
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(quiet, tmp_path, damage, hashed):
    """A cut file, a single bit, a missing file. Without the hashes, which a crash may have left out, a bit within an
    array goes unnoticed."""
    folder, hurt = quiet[0], tmp_path / "hurt"
    with pytest.raises(CrashError):
        trained(hurt, on_log=raise_at(35, CrashError()))
    assert steps_of(hurt) == [20, 30]
    newest = hurt / "checkpoints" / "30"
    if not hashed:
        (newest / "sha256.json").unlink()
    damage(largest(newest))
    with pytest.warns(UserWarning, match=r"checkpoint of step 30 in .* is damaged: .*Taking the one before it"):
        state = trained(hurt)
    assert bits(state) == bits(quiet[1])
    assert logged(hurt) == logged(folder)
    assert (hurt / "checkpoints" / "30.damaged").is_dir()
    # And again: the name is taken.
    cut(largest(hurt / "checkpoints" / "40"))
    (hurt / "checkpoints" / "40.damaged").mkdir()
    with pytest.warns(UserWarning, match="step 40 .* is damaged"):
        assert bits(trained(hurt)) == bits(quiet[1])
    assert (hurt / "checkpoints" / "40.damaged.2" / "state").is_dir()


def test_hashes_that_were_not_written_to_their_end_condemn_nothing(quiet, tmp_path):
    (quiet[0] / "checkpoints" / "40" / "sha256.json").write_text("")
    assert bits(trained(quiet[0])) == bits(quiet[1])


def test_all_checkpoints_damaged(quiet):
    folder, _ = quiet
    for step in steps_of(folder):
        cut(largest(folder / "checkpoints" / str(step)))
    before = sorted((folder / "checkpoints").rglob("*"))
    with (
        pytest.warns(UserWarning, match="step 40 .* is damaged"),
        pytest.raises(ValueError, match=r"step 30 in .* is damaged: .*\. So are those of 40\. Nothing was changed"),
    ):
        trained(folder, steps=50)
    assert sorted((folder / "checkpoints").rglob("*")) == before


def test_looking_at_a_damaged_checkpoint_changes_nothing(quiet):
    folder, state = quiet
    cut(largest(folder / "checkpoints" / "40"))
    before = sorted(folder.rglob("*"))
    with (
        Checkpoints(folder / "checkpoints", read_only=True) as checkpoints,
        pytest.warns(UserWarning, match="step 40 .* is damaged"),
    ):
        assert int(checkpoints.restore(state).step) == 30
    assert sorted(folder.rglob("*")) == before


def test_what_a_kill_left_half_written_is_removed(quiet):
    folder, _ = quiet
    half = folder / "checkpoints" / "50.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest == 40
    assert half.exists()  # the run may be under way
    assert int(trained(folder, steps=45).step) == 45
    assert not half.exists()


def test_a_checkpoint_of_other_settings_is_refused(quiet, small_config):
    folder, _ = quiet
    trained(folder, steps=41, facts=run_folder.facts(small_config))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        seen: list[dict] = []
        state = TrainState(Line(jnp.zeros((256, 256))), make_optimizer(TrainConfig(steps=41)))
        checkpoints.restore(state, {"data": Points()}, check=seen.append)
    (facts,) = seen
    assert facts["config"] == json.loads(to_json(small_config))
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["positions"]["data"] == {"given": 41}
    assert len(facts["positions"]["guard"]["losses"]) == 41
    run_folder.check_facts(facts, dataclasses.replace(small_config, resume=True, fsdp=1))
    with pytest.raises(ValueError, match=r"other settings:\n  seed: 0 -> 1\n  loss_factor: 1.5 -> 1.7\n"):
        run_folder.check_facts(facts, dataclasses.replace(small_config, seed=1, loss_factor=1.7))
    facts["versions"]["jax"] = "0.0.1"
    with pytest.warns(UserWarning, match=f"rounding from here on: jax 0.0.1 -> {jax.__version__}"):
        run_folder.check_facts(facts, small_config)


def test_a_checkpoint_of_an_older_ulx_can_be_used_but_not_trained_on(quiet):
    folder, state = quiet
    for step in steps_of(folder):
        old = folder / "checkpoints" / str(step)
        (old / "sha256.json").unlink()
        shutil.rmtree(old / "facts")
        (old / "data").mkdir()
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        assert bits(checkpoints.restore(state)) == bits(state)
    with pytest.raises(ValueError, match=r"step 40 in .* was saved by an older ulx: its weights can be used"):
        trained(folder, steps=50)


def test_the_best_checkpoint_is_kept(tmp_path):
    """Batches of other points after step 20, that fit the line less: the loss is lowest there."""
    batches = Points()
    batches.bad = {number: 30.0 for number in range(20, 60)}
    trained(tmp_path, batches, steps=60, keep_best=True, spike=0)
    assert steps_of(tmp_path) == [20, 50, 60]
    with Checkpoints(tmp_path / "checkpoints", keep_best=True) as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (20, 60)


def test_disk_full_while_saving(quiet, tmp_path, saves_at_once):
    """Of a training that goes on meanwhile. Room is made before the next checkpoint."""
    folder = tmp_path / "full"
    with contextlib.ExitStack() as full:

        def on_log(step: int, metrics: dict[str, float]) -> None:
            if step == 15:
                full.enter_context(no_file_above(FULL))
            if step == 25:
                full.close()

        with pytest.warns(UserWarning, match=r"checkpoint of step 20 in .* was not written \(File too large\): make"):
            state = trained(folder, on_log=on_log)
    assert steps_of(folder) == [30, 40]
    assert bits(state) == bits(quiet[1])


def test_disk_full_at_the_last_checkpoint(quiet, tmp_path, saves_at_once):
    folder = tmp_path / "full"
    with contextlib.ExitStack() as full:
        fill = lambda step, metrics: full.enter_context(no_file_above(FULL)) if step == 35 else None  # noqa: E731
        with pytest.raises(
            OSError, match=r"state of step 40 could not be saved .*too large.* newest good one is of step 30\. Make"
        ):
            trained(folder, on_log=fill)
    assert steps_of(folder)[-1] == 30
    assert bits(trained(folder)) == bits(quiet[1])
    assert logged(folder) == logged(quiet[0])


def test_going_back_deletes_what_came_later_and_passes_over_what_is_damaged(quiet):
    folder, state = quiet
    trained(folder, steps=50, save_every=5)
    trained(folder, steps=60, save_every=60)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert not checkpoints.has_before(50)
        assert checkpoints.has_before(51)
        found, good = checkpoints.back_before(60, state)
        assert (int(found.step), good, checkpoints.latest) == (50, 50, 50)
    trained(folder, steps=60, save_every=60)
    cut(largest(folder / "checkpoints" / "60"))
    with (
        Checkpoints(folder / "checkpoints") as checkpoints,
        pytest.warns(UserWarning, match="step 60 .* is damaged"),
    ):
        assert checkpoints.back_before(99, state)[1] == 50
    assert steps_of(folder) == [50]


def test_what_is_saved_is_where_things_stood_then(tmp_path):
    """Whoever gives its own list, and goes on while it is written."""

    class Growing:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def get_state(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def set_state(self, state: dict[str, Any], /) -> None:
            self.seen = state["seen"]

    growing, again, state = Growing(), Growing(), trained(tmp_path / "toy", steps=10)
    growing.seen.append(1)
    with Checkpoints(tmp_path / "saved") as checkpoints:
        save = checkpoints.manager.save

        def late(*args: Any, **options: Any) -> Any:
            growing.seen.append(2)
            return save(*args, **options)

        checkpoints.manager.save = late
        checkpoints.save(10, state, {"growing": growing}, wait=True)
        checkpoints.restore(state, {"growing": again})
    assert again.seen == [1]
