"""Every fault we can cause: what happens, and that nothing is lost. The table of ulx/README.md names these tests."""

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
import time
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
from ulx.config import TrainConfig, from_json, to_json
from ulx.data.cache import Recipe, each, prepare_in
from ulx.data.source import Records
from ulx.data.split import Item
from ulx.guard import Guard, NonFiniteError, SpikeError
from ulx.metrics_log import MetricsLog, read_metrics
from ulx.processes import PREEMPTED
from ulx.sharding import make_mesh, place
from ulx.snapshots import Snapshots
from ulx.training import TrainState, fit, make_optimizer, make_step

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
    with Checkpoints(folder / "checkpoints", facts, keep_best=config.keep_best) as checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.restore(state, batches)
        with MetricsLog(folder / "toy.jsonl", resume_step=int(state.step)) as log:
            return fit(
                state,
                make_step(distance, optimizer, config, key=jax.random.key(0), mesh=mesh),
                None,
                batches,
                config,
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


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(quiet, tmp_path, damage, hashed):
    """A cut file, a single bit, a missing file. Without the hashes, which a crash may have left out, a bit within an
    array would go unnoticed, and is not tried."""
    if damage is flip and not hashed:
        return
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


def test_all_checkpoints_damaged(quiet):
    folder, _ = quiet
    for step in steps_of(folder):
        cut(largest(folder / "checkpoints" / str(step)))
    with (
        pytest.warns(UserWarning, match="step 40 .* is damaged"),
        pytest.raises(ValueError, match=r"step 30 in .* is damaged: .*\. There is no other: train anew"),
    ):
        trained(folder, steps=50)


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
        checkpoints.restore(state, Points(), check=seen.append)
    (facts,) = seen
    assert facts["config"] == json.loads(to_json(small_config))
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["data"] == {"given": 41}
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


def test_disk_full_while_saving(quiet, tmp_path):
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


def test_disk_full_at_the_last_checkpoint(quiet, tmp_path):
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


def test_going_back_deletes_what_came_later(quiet):
    folder, state = quiet
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert (checkpoints.before(40), checkpoints.before(30)) == (30, None)
        assert int(checkpoints.back_to(30, state).step) == 30
        assert checkpoints.latest == 30
    assert steps_of(folder) == [30]


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


STEPS = 40
"""Of each stage of a job."""


# The whole job, killed and started again; alone, and as two processes.


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = folder / str(i % 2)
        path.mkdir(exist_ok=True)
        image.fromarray(pixels).save(path / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def settings(images, small_config, tmp_path_factory) -> Callable[[str], Path]:
    """The file of a configuration of that name: some steps of each stage, a checkpoint every 5, and an evaluation."""
    folder = tmp_path_factory.mktemp("jobs")

    def file(name: str) -> Path:
        train = dataclasses.replace(small_config.train, steps=STEPS, save_every=5, posthoc_ema=(0.05, 0.10))
        data = dataclasses.replace(
            small_config.data, source="folder", path=str(images), cache_dir=str(folder / "cache")
        )
        config = dataclasses.replace(
            small_config,
            name=name,
            runs=str(folder),
            resume=True,
            data=data,
            train=train,
            train_base=train,
            evaluate=dataclasses.replace(small_config.evaluate, flow_images=0),
        )
        path = folder / f"{name}.json"
        path.write_text(to_json(config))
        return path

    return file


def environment(folder: Path) -> dict[str, str]:
    """Programs are compiled badly, quickly and once."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def started(config: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "tests" / "job_worker.py"), str(config), *arguments]
    return subprocess.Popen(
        command,
        env=environment(config.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out[-3000:]
    return out


def lines(folder: Path, stage: str) -> int:
    file = folder / f"{stage}.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def outcome(config: Path) -> dict[str, Any]:
    """All that a job leaves behind, without times."""
    folder, settings = config.parent / config.stem, from_json(config.read_text())
    stage1 = runs.stage1_state(settings)
    stage2 = runs.stage2_state(settings, stage1.model, 2)
    found: dict[str, Any] = {"arrays": {}, "logs": {}}
    for stage, state in (("stage1", stage1), ("stage2", stage2)):
        with Checkpoints(folder / "checkpoints" / stage, read_only=True) as checkpoints:
            assert checkpoints.latest == STEPS
            found["arrays"] |= {(stage, i): array for i, array in enumerate(bits(checkpoints.restore(state)))}
        for file in (folder / "snapshots" / stage).iterdir():
            with np.load(file) as arrays:
                found["arrays"] |= {(stage, file.name, name): arrays[name].tobytes() for name in arrays}
        found["logs"][stage] = [line | {"time": 0} for line in read_metrics(folder / f"{stage}.jsonl")]
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    metrics["cost"] = {name: value for name, value in metrics["cost"].items() if "seconds" not in name}
    with np.load(folder / "evaluation" / "pictures.npz") as pictures:
        found["pictures"] = {name: pictures[name].tobytes() for name in pictures}
    assert (folder / "report.html").exists()
    return found | {"metrics": metrics}


@pytest.fixture(scope="module")
def undisturbed(settings) -> dict[str, Any]:
    config = settings("undisturbed")
    finished(started(config))
    return outcome(config)


def wait_for(process: subprocess.Popen[str], moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not moment():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def moment_of(kind: str, folder: Path, rng: np.random.Generator, begun: tuple[int, int]) -> Callable[[], bool]:
    """When to kill a job that began with so many steps of its stages."""
    done = sum(begun)
    now = lambda: lines(folder, "stage1") + lines(folder, "stage2")  # noqa: E731
    if kind == "data":
        # Somewhere before its first step: opening the data, reading the first batch, compiling.
        until = time.monotonic() + rng.uniform(2, 8)
        return lambda: time.monotonic() > until
    if kind in ("step", "sigterm"):
        wanted = done + int(rng.integers(1, 12))
        return lambda: now() >= wanted
    if kind == "save":
        half = lambda: any((folder / "checkpoints").glob("*/*orbax-checkpoint-tmp*"))  # noqa: E731
        return lambda: now() > done and half()
    until = []  # well within the shortest evaluation seen, of some 10 s

    def in_evaluation() -> bool:
        if lines(folder, "stage2") < STEPS:
            return False
        until.append(time.monotonic() + rng.uniform(0, 5))
        return time.monotonic() > until[0]

    return in_evaluation


def killed_and_resumed(config: Path, kinds: list[str], rng: np.random.Generator) -> None:
    folder = config.parent / config.stem
    for kind in kinds:
        process = started(config)
        begun = lines(folder, "stage1"), lines(folder, "stage2")
        wait_for(process, moment_of(kind, folder, rng, begun))
        if kind == "sigterm":
            process.terminate()
            out, _ = process.communicate(timeout=60)
            assert process.returncode == PREEMPTED, out
            (step,) = re.findall(r"stopped after step (\d+), which is saved; --resume continues", out)
            assert any((folder / "checkpoints" / stage / step).is_dir() for stage in ("stage1", "stage2"))
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
    finished(started(config))


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"{part}: {name}"
        for part in expected
        for name in expected[part]
        if found[part].keys() != expected[part].keys() or found[part][name] != expected[part][name]
    ]


def test_killed_three_times_and_resumed_is_the_same(settings, undisturbed):
    """SIGKILL in a step, in a save, in the evaluation, and once SIGTERM, which saves; then weights, averages, logs,
    samples and numbers are the same bit for bit."""
    config = settings("killed")
    killed_and_resumed(config, ["step", "save", "sigterm", "evaluation"], np.random.default_rng())
    assert differing(outcome(config), undisturbed) == []


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_is_the_same(settings, undisturbed):
    """At those moments, and before the first step, in a random order; the evaluation's at the end."""
    rng, config = np.random.default_rng(), settings("often killed")
    kinds = ["step"] * 6 + ["save"] * 6 + ["data"] * 4
    rng.shuffle(kinds)
    killed_and_resumed(config, [*kinds, *["evaluation"] * 4], rng)
    assert differing(outcome(config), undisturbed) == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def launched(config: Path) -> subprocess.Popen[str]:
    return started(config, launcher=("-m", "ulx.launch", "--processes", "2", "--grace", "20"))


def losses(config: Path) -> np.ndarray:
    folder = config.parent / config.stem
    return np.array(
        [line["loss"] for stage in ("stage1", "stage2") for line in read_metrics(folder / f"{stage}.jsonl")]
    )


def nearly(config: Path, undisturbed: dict[str, Any]) -> None:
    """Those of the undisturbed job, but for sums taken in another order: float32's rounding, carried on by Adam."""
    alone = [line["loss"] for stage in ("stage1", "stage2") for line in undisturbed["logs"][stage]]
    np.testing.assert_allclose(losses(config), alone, rtol=1e-4)
    found = outcome(config)["metrics"]
    for name in ("bits_per_pixel", "bits_per_pixel_base", "psnr"):
        assert found[name]["value"] == pytest.approx(undisturbed["metrics"][name]["value"], rel=1e-3)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_one_of_two_processes_is_killed_or_stopped(settings, undisturbed):
    """The launcher ends the other within its time and says so: of a second process killed in the first stage, and of
    the first one in the second. SIGTERM to one of them stops both at the same step, which they save. One alone finishes
    the job."""
    config = settings("two")
    folder = config.parent / "two"
    for victim, stage in ((1, "stage1"), (0, "stage2")):
        process = launched(config)
        wait_for(process, lambda stage=stage: lines(folder, stage) > 8)
        os.kill(children(process.pid)[victim], signal.SIGKILL)
        died = time.monotonic()
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - died < 30
        assert process.returncode not in (0, None)
        assert re.search(r"process \d of 2 (was killed by signal|ended with status).* --resume goes on", out), out
    process = launched(config)
    begun = lines(folder, "stage2")
    wait_for(process, lambda: lines(folder, "stage2") > begun)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, out
    assert len(re.findall("stopped after step", out)) == 1
    finished(started(config))
    nearly(config, undisturbed)


@pytest.mark.slow
def test_two_processes_do_the_whole_job(settings, undisturbed):
    """Data, the rest of stage 1, which one began, stage 2, latents, evaluation and report."""
    config = settings("both")
    process = started(config)
    wait_for(process, lambda: lines(config.parent / "both", "stage1") > 8)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished(launched(config))
    nearly(config, undisturbed)


def test_the_table_of_faults_names_tests():
    table = re.findall(r"^\| .* \|$", (ROOT / "ulx" / "README.md").read_text(), re.MULTILINE)
    rows = [row for row in table if "`test_" in row]
    written = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) >= 15
    for row in rows:
        for name in re.findall(r"`(test_\w+)`", row):
            assert f"def {name}(" in written, row
