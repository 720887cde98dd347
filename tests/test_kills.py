"""The whole job killed and started again, alone and as two processes: nothing is lost, bit for bit."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

from ulx import runs
from ulx.checkpoint import HASHES, Checkpoints
from ulx.config import from_json, to_json
from ulx.metrics_log import read_metrics
from ulx.nn.conditions import ConditionSpec
from ulx.processes import PREEMPTED

WORKER = Path(__file__).parent / "job_worker.py"
STEPS = 40
"""Of each stage of a job."""


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


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
def settings(images, small_config, tmp_path_factory) -> Callable[..., Path]:
    """The file of a configuration of that name: some steps of each stage, a checkpoint every 5, and an evaluation;
    and changes of the training."""
    folder = tmp_path_factory.mktemp("jobs")

    def file(name: str, **changes: Any) -> Path:
        own = {"steps": STEPS, "save_every": 5, "posthoc_ema": (0.05, 0.10)}
        train = dataclasses.replace(small_config.train, **(own | changes))
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
    """Programs are compiled once."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def started(config: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(WORKER), str(config), *arguments]
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
    stage2 = runs.stage2_state(settings, stage1.model, ConditionSpec(num_classes=2))
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


def moment_of(kind: str, folder: Path, rng: np.random.Generator) -> Callable[[], bool]:
    """When to kill a job that has just begun, or begun again."""
    began, stages = time.time(), ("stage1", "stage2")
    before = {stage: lines(folder, stage) for stage in stages}

    def has_opened(stage: str) -> bool:
        """This process, the stage's log: it then restores the state, reads and compiles, if there is anything to do."""
        log = folder / f"{stage}.jsonl"
        return log.exists() and log.stat().st_mtime > began

    def new_lines() -> int:
        return sum(max(0, lines(folder, stage) - before[stage]) for stage in stages if has_opened(stage))

    if kind in ("step", "sigterm"):
        wanted = int(rng.integers(1, 7))
        return lambda: new_lines() >= wanted
    if kind == "save":
        half = lambda: any((folder / "checkpoints").glob("*/*orbax-checkpoint-tmp*"))  # noqa: E731
        return lambda: new_lines() > 0 and half()
    # "data": between a stage's opening and its first step; "evaluation": after the second stage was found finished, or
    # when the numbers are written, with the report's plots still to come.
    stage = "stage2" if kind == "evaluation" or before["stage1"] == STEPS else "stage1"
    until, delay, measured = [], rng.uniform(0, 0.2 if kind == "data" else 0.5), rng.integers(2)

    def later() -> bool:
        if not has_opened(stage) or (kind == "evaluation" and lines(folder, "stage2") < STEPS):
            return False
        if kind == "evaluation" and measured:
            return any((folder / "evaluation").glob("*"))
        until.append(time.monotonic() + delay)
        return time.monotonic() > until[0]

    return later


def drawn() -> np.random.Generator:
    """Another one every time; what it was is shown where the test fails."""
    seed = int(np.random.default_rng().integers(2**31))
    print("np.random.default_rng of", seed)
    return np.random.default_rng(seed)


def killed_and_resumed(config: Path, kinds: list[str], rng: np.random.Generator) -> None:
    folder = config.parent / config.stem
    for kind in kinds:
        moment = moment_of(kind, folder, rng)
        process = started(config)
        wait_for(process, moment)
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
    killed_and_resumed(config, ["step", "save", "sigterm", "evaluation"], drawn())
    assert differing(outcome(config), undisturbed) == []


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_is_the_same(settings, undisturbed):
    """At those moments, and before the first step, in a random order; the evaluation's at the end."""
    rng, config = drawn(), settings("often killed")
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


in_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")


def one_of_two_killed(config: Path, victim: int, stage: str) -> None:
    """The launcher ends the other within its time and says so."""
    process = launched(config)
    wait_for(process, lambda: lines(config.parent / config.stem, stage) > 8)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    died = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - died < 30
    assert process.returncode not in (0, None)
    assert re.search(rf"process {victim} of 2 was killed by signal 9.* --resume goes on", out), out


@in_proc
def test_one_of_two_processes_is_killed(settings, undisturbed):
    """The second, in the first stage. One alone finishes the job."""
    config = settings("two")
    one_of_two_killed(config, 1, "stage1")
    finished(started(config))
    nearly(config, undisturbed)


@in_proc
@pytest.mark.slow
def test_the_first_of_two_processes_is_killed_and_both_are_stopped(settings, undisturbed):
    """In the second stage. SIGTERM to one of them stops both at the same step, which they save."""
    config = settings("stopped")
    folder = config.parent / "stopped"
    one_of_two_killed(config, 0, "stage2")
    process = launched(config)
    begun = lines(folder, "stage2")
    wait_for(process, lambda: lines(folder, "stage2") > begun)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, out
    assert len(re.findall("stopped after step", out)) == 1
    finished(started(config))
    nearly(config, undisturbed)


def test_one_of_two_processes_hangs(settings):
    """The other's watchdog ends it, with the status that asks for another try, and the launcher then ends this one."""
    # The time is several times what a step takes where four processes share two cores. Saves, in which one waits for
    # the other without being watched, are seconds apart, and a save is over when its hashes are written.
    config = settings("hangs", hang_minutes=0.5, steps=2000, save_every=200, posthoc_ema=())
    folder = config.parent / "hangs"
    saved = folder / "checkpoints" / "stage1" / "200" / HASHES
    process = launched(config)
    wait_for(process, saved.exists)
    assert lines(folder, "stage1") < 350
    os.kill(children(process.pid)[1], signal.SIGSTOP)
    hung = time.monotonic()
    out, _ = process.communicate(timeout=160)
    assert time.monotonic() - hung < 100
    assert process.returncode == PREEMPTED, out
    assert re.search(r"error: step \d+ of stage1 has taken more than 30s", out), out
    assert "process 0 of 2 ended with status 75; process 1 stopped" in out
    assert saved.exists()


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
