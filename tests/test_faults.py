"""Every fault we can cause in a training: what happens, and that nothing is lost (`test_kills` for the whole job)."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import runs
from ulx.checkpoint import Checkpoints
from ulx.config import TrainConfig, to_json
from ulx.data.cache import Recipe, each, prepare_in
from ulx.data.source import Records
from ulx.data.split import Item
from ulx.guard import Guard, NonFiniteError, SpikeError
from ulx.metrics_log import MetricsLog, read_metrics
from ulx.processes import INTERRUPTED, PREEMPTED
from ulx.sharding import make_mesh, place
from ulx.snapshots import Snapshots
from ulx.training import Interrupted, TrainState, fit, make_optimizer, make_step

ROOT = Path(__file__).parents[1]
FULL = 100_000
"""Bytes of a file where a disk is full: less than a checkpoint has, more than a test prints."""


# A small training: a line through points.


class Line(eqx.Module):
    weight: jax.Array


class Points:
    """Batch k holds the points of k alone."""

    def __init__(self) -> None:
        self.given = 0
        self.bad: dict[int, Any] = {}
        """Batches that are something else, or a function to be called for them."""

    def __next__(self) -> dict[str, np.ndarray]:
        x = np.random.default_rng(self.given).standard_normal((8, 1)).astype(np.float32)
        bad = self.bad.get(self.given)
        if callable(bad):
            bad()
        elif bad is not None:
            x = np.full_like(x, bad)
        self.given += 1
        return {"x": x}

    def get_state(self) -> dict[str, Any]:
        return {"given": self.given}

    def set_state(self, state: dict[str, Any], /) -> None:
        self.given = state["given"]


def distance(model, frozen, batch, draws, step, control):
    # Wide arrays, so that a checkpoint has files worth damaging; a spread over examples, as real losses have.
    loss = jnp.mean((model.weight.mean() * batch["x"] - 2 * batch["x"]) ** 2 + 0.1 * batch["x"] ** 2)
    return loss, {"loss": loss}


def trained(
    folder: Path, batches: Points | None = None, *, on_log=lambda step, metrics: None, facts=None, **options: Any
) -> TrainState:
    """Up to `steps`, from the newest checkpoint in the folder, if there is one."""
    settings = {
        "steps": 40,
        "batch_size": 8,
        "warmup_steps": 0,
        "learning_rate": 0.01,
        "log_every": 1,
        "save_every": 10,
    }
    config = TrainConfig(**(settings | options))
    optimizer, mesh = make_optimizer(config), make_mesh()
    batches = batches or Points()
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    state = place(TrainState(Line(jnp.asarray(weight)), optimizer), mesh)
    guard = Guard.of(state.model, config)
    with Checkpoints(folder / "checkpoints", facts, keep_best=config.keep_best) as checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.restore(state, {"data": batches, "guard": guard})
        with MetricsLog(folder / "toy.jsonl", resume_step=int(state.step)) as log:
            return fit(
                state,
                make_step(distance, optimizer, config, key=jax.random.key(0), mesh=mesh),
                None,
                batches,
                config,
                guard=guard,
                mesh=mesh,
                checkpoints=checkpoints,
                snapshots=Snapshots(folder / "snapshots", ()),
                log=log,
                name="toy",
                on_log=on_log,
            )


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def logged(folder: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "toy.jsonl")]


@pytest.fixture
def quiet(tmp_path) -> tuple[Path, TrainState]:
    """A training that nothing happens to."""
    return tmp_path / "quiet", trained(tmp_path / "quiet")


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to write further into a file, as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def saves_at_once(monkeypatch) -> None:
    """What is saved is written, or refused, before the next step, so that a test knows which it was."""
    save = Checkpoints.save

    def at_once(self, *args, **options) -> None:
        save(self, *args, **options)
        if self._hashing is not None:  # another thread waits for it: this one would be told what is wrong but once
            self._hashing.join()

    monkeypatch.setattr(Checkpoints, "save", at_once)


def raise_at(step: int, error: Exception) -> Callable[[int, dict[str, float]], None]:
    def on_log(number: int, metrics: dict[str, float]) -> None:
        if number == step:
            raise error

    return on_log


class CrashError(Exception):
    pass


# Checkpoints.


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


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
    trained(folder, steps=41, facts=runs.facts(small_config))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        seen: list[dict] = []
        state = TrainState(Line(jnp.zeros((256, 256))), make_optimizer(TrainConfig(steps=41)))
        checkpoints.restore(state, {"data": Points()}, check=seen.append)
    (facts,) = seen
    assert facts["config"] == json.loads(to_json(small_config))
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["positions"]["data"] == {"given": 41}
    assert len(facts["positions"]["guard"]["losses"]) == 41
    runs.check_facts(facts, dataclasses.replace(small_config, resume=True, fsdp=1))
    with pytest.raises(ValueError, match=r"other settings:\n  seed: 0 -> 1\n  loss_factor: 1.5 -> 1.7\n"):
        runs.check_facts(facts, dataclasses.replace(small_config, seed=1, loss_factor=1.7))
    facts["versions"]["jax"] = "0.0.1"
    with pytest.warns(UserWarning, match=f"rounding from here on: jax 0.0.1 -> {jax.__version__}"):
        runs.check_facts(facts, small_config)


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


def test_the_log_cannot_be_written(quiet, tmp_path):
    folder = tmp_path / "full"
    with contextlib.ExitStack() as full:

        def fill(step: int, metrics: dict[str, float]) -> None:
            if step == 25:
                full.enter_context(no_file_above((folder / "toy.jsonl").stat().st_size + 10))

        with pytest.raises(OSError, match=r"cannot write .*toy\.jsonl: .*--resume"):
            trained(folder, on_log=fill)
    assert bits(trained(folder)) == bits(quiet[1])
    assert logged(folder) == logged(quiet[0])


# Training that goes wrong.


def test_divergence_goes_back_and_on_with_other_batches(quiet, tmp_path):
    """Batch 24, of the 25th step, is not a number: from step 20 on with batch 26, as one who never saw 20 to 25."""
    batches = Points()
    batches.bad = {24: np.nan}
    with pytest.warns(UserWarning, match=r"not finite at step 25: loss.*Back to step 20, and on with other batches"):
        state = trained(tmp_path, batches, rollbacks=1)
    assert int(state.step) == 40
    # The step after the bad one was under way already: its batch is gone too.
    assert batches.given == 46
    assert [step for step, _ in logged(tmp_path)] == list(range(1, 41))

    class Later(Points):
        def set_state(self, state: dict[str, Any], /) -> None:
            self.given = 26

    with pytest.raises(CrashError):
        trained(tmp_path / "other", on_log=raise_at(25, CrashError()))
    assert bits(trained(tmp_path / "other", Later())) == bits(state) != bits(quiet[1])
    assert logged(tmp_path) == logged(tmp_path / "other")


def test_divergence_without_rollbacks_ends_the_run(tmp_path):
    batches = Points()
    batches.bad = {24: np.nan}
    with pytest.raises(NonFiniteError, match="not finite at step 25") as error:
        trained(tmp_path, batches)
    assert error.value.step == 25
    assert steps_of(tmp_path) == [10, 20]
    # Where it diverges again at once, there is nothing more to go back with.
    batches = Points()
    batches.bad = {24: np.nan, 27: np.nan}
    with pytest.warns(UserWarning, match="Back to step 20"), pytest.raises(NonFiniteError, match="step 22"):
        trained(tmp_path / "twice", batches, rollbacks=1)


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


def test_a_spike_is_warned_of_or_gone_back_from(tmp_path):
    """It begins with the 80th step, whose checkpoint is therefore no good."""
    bad = {number: 20.0 for number in range(79, 84)}
    batches = Points()
    batches.bad = dict(bad)
    with pytest.warns(UserWarning, match=r"^the loss leapt at step 80: .* after .* before$"):
        state = trained(tmp_path / "warned", batches, steps=100)
    assert (int(state.step), batches.given) == (100, 100)
    batches = Points()
    batches.bad = dict(bad)
    with pytest.warns(UserWarning, match=r"the loss leapt at step 80: .* Back to step 70, and on with other batches"):
        state = trained(tmp_path / "back", batches, steps=100, rollbacks=1)
    assert int(state.step) == 100
    highest = [max(loss for _, loss in logged(tmp_path / name)[10:]) for name in ("back", "warned")]
    assert highest[0] < 20 < highest[1]


def test_a_run_that_is_resumed_within_a_spike_judges_as_if_it_was_not(tmp_path):
    """It crashes at the spike's fourth step, after the checkpoint of its first. What the guard has seen is in that."""

    def run(folder: Path, **options: Any) -> TrainState:
        batches = Points()
        batches.bad = {number: 20.0 for number in range(79, 84)}
        return trained(folder, batches, steps=100, rollbacks=1, **options)

    with pytest.warns(UserWarning, match="Back to step 70"):
        whole = run(tmp_path / "whole")
    with pytest.raises(CrashError):
        run(tmp_path / "parts", on_log=raise_at(83, CrashError()))
    assert steps_of(tmp_path / "parts") == [70, 80]
    with pytest.warns(UserWarning, match="leapt at step 80: .* Back to step 70"):
        parts = run(tmp_path / "parts")
    assert bits(parts) == bits(whole)
    with Checkpoints(tmp_path / "parts" / "checkpoints") as checkpoints:
        spent = Guard([], 0, 10.0, 1)
        checkpoints.restore(whole, {"data": Points(), "guard": spent})
        assert spent.rollbacks == 0  # it has gone back once, and may not again


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


def test_a_signal_in_the_last_step_stops_the_run(quiet, tmp_path):
    stop = lambda step, metrics: os.kill(os.getpid(), signal.SIGTERM) if step == 40 else None  # noqa: E731
    with pytest.raises(Interrupted, match="stopped after step 40, which is saved") as stopped:
        trained(tmp_path / "stopped", on_log=stop)
    assert stopped.value.number == signal.SIGTERM
    assert bits(trained(tmp_path / "stopped")) == bits(quiet[1])


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", PREEMPTED), ("SIGINT", INTERRUPTED)])
def test_sigterm_outside_training_asks_to_be_started_again(number, status):
    script = f"""
        import os, signal, time
        from ulx.command_line import run_together

        def work():
            os.kill(os.getpid(), signal.{number})
            time.sleep(30)

        run_together(work)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status
    assert "Traceback" not in ended.stderr
    assert "stopped" in ended.stderr


def test_what_is_a_spike():
    """Five losses in a row, ten deviations above the last ones: not four, not nine, and not a slow rise."""
    norms, rng = np.ones(1), np.random.default_rng(0)
    usual = rng.standard_normal(300)

    def shown(after: list[float], spike: float = 10.0) -> None:
        watch = Guard(["a"], 0, spike)
        for step, loss in enumerate([*usual, *after], 1):
            watch.passes(step, {"loss": loss}, norms)

    with pytest.raises(SpikeError, match="step 301: 20 to 20, after"):
        shown([20.0] * 5)
    shown([20.0] * 4 + [0.0])
    shown([8.0] * 20)
    shown([20.0] * 9, spike=0)
    shown(list(np.linspace(0, 100, 2000)))


# What hangs. A program of its own, since it is ended.

HANGS = """
    import sys, time
    from pathlib import Path
    import test_faults
    from ulx.command_line import run_command

    batches = test_faults.Points()
    if sys.argv[1] == "loader":
        batches.bad = {24: lambda: time.sleep(100)}
    else:
        import jax

        def distance(*given, honest=test_faults.distance):
            loss, metrics = honest(*given)
            wait = lambda step: time.sleep(100 if step == 24 else 0)
            jax.debug.callback(wait, given[4], ordered=False)
            return loss, metrics

        test_faults.distance = distance
    run_command(lambda: test_faults.trained(Path(sys.argv[2]), batches, hang_minutes=0.1))
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loader", "reading the batch for step 25 of toy has taken more than 6s"),
        ("step", "step 25 of toy has taken"),
    ],
)
def test_a_hang_ends_the_program(quiet, tmp_path, what, message):
    folder = tmp_path / "hangs"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(HANGS), what, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert ended.returncode == PREEMPTED, ended.stderr
    assert re.search(message, ended.stderr)
    assert "--resume goes on" in ended.stderr
    assert "ulx/training.py" in ended.stderr or "test_faults.py" in ended.stderr  # where it stood
    assert steps_of(folder) == [10, 20]
    assert bits(trained(folder)) == bits(quiet[1])


# Data.


def prepared(folder: Path) -> Records:
    names = [str(i) for i in range(20)]
    recipe = Recipe(
        name="numbers",
        resolution=8,
        class_names=("all",),
        settings={},
        items=lambda: ([Item(name, 0) for name in names], []),
        make=each(lambda name: ({"x": np.random.default_rng(int(name)).random((20, 100))}, None)),
        example_bytes=16000,
    )
    source = prepare_in(folder, recipe).dataset.train.source
    assert isinstance(source, Records)
    return source


def test_a_corrupt_record_is_named_and_the_state_saved(quiet, tmp_path):
    """It is damaged while the training runs; mended by the command that prepared it."""
    records, folder = prepared(tmp_path / "data"), tmp_path / "training"
    (shard,) = (tmp_path / "data").glob("*.arrayrecord")
    good = shard.read_bytes()

    def read() -> None:
        for index in range(len(records)):
            assert records[index]["x"].shape == (20, 100)

    read()
    content = bytearray(good)
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    shard.write_bytes(content)
    records = Records([str(shard)], [20])  # opened anew, as by a worker
    batches = Points()
    batches.bad = {24: read}
    with pytest.raises(OSError, match=rf"record \d+ of {shard} cannot be read .*--resume"):
        trained(folder, batches)
    assert steps_of(folder) == [20, 24]
    with pytest.warns(UserWarning, match="is corrupt .*making it anew"):
        records = prepared(tmp_path / "data")
    assert shard.read_bytes() == good
    batches = Points()
    batches.bad = {24: None}
    assert bits(trained(folder, batches)) == bits(quiet[1])


def test_the_table_of_faults_names_tests():
    table = re.findall(r"^\| .* \|$", (ROOT / "ulx" / "README.md").read_text(), re.MULTILINE)
    rows = [row for row in table if "`test_" in row]
    written = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) >= 15
    for row in rows:
        for name in re.findall(r"`(test_\w+)`", row):
            assert f"def {name}(" in written, row
