"""A training of a second: a line through points, with what can happen to it."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ulx.checkpoint import Checkpoints
from ulx.config import TrainConfig
from ulx.guard import Guard
from ulx.metrics_log import MetricsLog, read_metrics
from ulx.sharding import make_mesh, place
from ulx.snapshots import Snapshots
from ulx.training import TrainState, fit, make_optimizer, make_step


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


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
