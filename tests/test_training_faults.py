"""What can go wrong in a training: what happens, and that nothing is lost (`test_kills` for the whole job)."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_training import CrashError, Points, bits, logged, no_file_above, raise_at, steps_of, trained

from ulx import training
from ulx.checkpoint import Checkpoints
from ulx.data.cache import Recipe, each, prepare_in
from ulx.data.source import Records
from ulx.data.split import Item
from ulx.guard import Guard, NonFiniteError, SpikeError
from ulx.processes import INTERRUPTED, PREEMPTED
from ulx.training import Interrupted, TrainState
from ulx.watchdog import Watchdog

ROOT = Path(__file__).parents[1]


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
        assert not spent.may_go_back  # it has gone back once, and may not again
        more = Guard([], 0, 10.0, 2)
        checkpoints.restore(whole, {"data": Points(), "guard": more})
        assert more.may_go_back  # unless it is allowed to


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
    import small_training
    from ulx.command_line import run_command

    batches = small_training.Points()
    if sys.argv[1] == "loader":
        batches.bad = {24: lambda: time.sleep(100)}
    else:
        import jax

        def distance(*given, honest=small_training.distance):
            loss, metrics = honest(*given)
            wait = lambda step: time.sleep(100 if step == 24 else 0)
            jax.debug.callback(wait, given[4], ordered=False)
            return loss, metrics

        small_training.distance = distance
    run_command(lambda: small_training.trained(Path(sys.argv[2]), batches, hang_minutes=0.1))
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
    assert "ulx/training.py" in ended.stderr or "small_training.py" in ended.stderr  # where it stood
    assert steps_of(folder) == [10, 20]
    assert bits(trained(folder)) == bits(quiet[1])


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


def test_slower_compiling_elsewhere_is_no_hang(tmp_path, monkeypatch):
    """Nobody's first step begins, and is timed, before all have compiled."""
    met, ended = [], []

    def others_compile(flag: bool) -> bool:
        if not met:
            time.sleep(2)
        met.append(flag)
        return flag

    monkeypatch.setattr(training, "all_agree", others_compile)
    monkeypatch.setattr(Watchdog, "_give_up", lambda self, what: ended.append(what))
    trained(tmp_path, steps=1, hang_minutes=1 / 60, on_log=lambda step, metrics: met.append("logged"))
    assert met[:2] == [True, "logged"]
    assert ended == []


def test_what_hangs_after_a_step_is_a_hang(tmp_path, monkeypatch):
    """As what asks a device does, which the step under way keeps: another process has stopped."""
    ended = []
    monkeypatch.setattr(Watchdog, "_give_up", lambda self, what: ended.append(what))
    trained(tmp_path, steps=3, hang_minutes=1 / 60, on_log=lambda step, metrics: time.sleep(3 * (step == 3)))
    assert set(ended) == {"step 3 of toy"}


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
