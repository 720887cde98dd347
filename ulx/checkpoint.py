"""Checkpoints by Orbax: the training state, where the data stands, and the run's settings, together.

They are written in the background and renamed when whole, by all processes of a run together. When one is whole, the
hashes of its files are put beside them: what cannot be read, or is not what was written, is put aside when it is
noticed, and the one before it is taken.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ulx.aside import write_aside
from ulx.processes import all_agree, are_connected, first, is_first

__all__ = ["Checkpoints", "Position", "versions"]

State = TypeVar("State", bound=eqx.Module)

KEPT = 2
"""The newest ones, that is: the one before is for when the newest cannot be read."""
HASHES, OLDER = "sha256.json", "data"
"""Beside a checkpoint's arrays; where the data stood, as ulx wrote it before 2026-11-26."""
PACKAGES = ("ulx", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "grain", "numpy")


@runtime_checkable
class Position(Protocol):
    """An iterator that can say where it stands, as JSON values, and be put there."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


class _DamagedError(Exception):
    """A checkpoint cannot be read, and why. All processes are told so, or this one alone has noticed."""

    def __init__(self, reason: str, *, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


def versions() -> dict[str, str]:
    """Of Python and of the packages on which a training's numbers depend."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


class Checkpoints:
    """The checkpoints of one stage: `save`, `restore`, `latest`. Keeps the newest two, and if `keep_best` the one of
    the lowest loss. `facts` (JSON values: the run's settings) are saved with each. What a stopped run left half written
    is removed, unless it is `read_only`: the run may be under way."""

    def __init__(
        self,
        directory: Path,
        facts: Mapping[str, Any] | None = None,
        *,
        keep_best: bool = False,
        read_only: bool = False,
    ):
        self.directory = directory.absolute()
        self.about = dict(facts or {})
        newest = LatestN(KEPT)
        best = BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([newest, best]) if keep_best else newest,
            best_fn=(lambda metrics: metrics["loss"]) if keep_best else None,
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)
        self._hashing: threading.Thread | None = None
        self._saving: int | None = None

    @property
    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the lowest loss of those there, or None where it was not asked for (`keep_best`)."""
        return self.manager.best_step()

    def has_before(self, step: int) -> bool:
        """Whether one of an earlier step is there, written to its end."""
        self._finish_and_warn()
        return any(saved < step for saved in self.manager.all_steps())

    def back_before(self, step: int, state: State) -> tuple[State, int]:
        """`state` with the arrays of the newest good checkpoint of an earlier step, and that step; later ones are
        deleted. Raises as `restore`."""
        self._finish_and_warn()
        found, good = self._newest(state, [saved for saved in self.manager.all_steps() if saved < step])[:2]
        for later in self.manager.all_steps():
            if later > good:
                self.manager.delete(later)
        return found, good

    def save(
        self,
        step: int,
        state: eqx.Module,
        positions: Mapping[str, Position],
        *,
        wait: bool = False,
        loss: float | None = None,
    ) -> None:
        """Save in the background; with `wait`, return when it is on disk. Does nothing if the step is saved already.

        `positions` are what else must go on where it was, by name: the data, for one.

        What goes wrong in the background is a warning when the next one is saved. Raises OSError, naming the newest
        checkpoint that is good, if with `wait` it cannot be written.
        """
        problem = self._begin(step, state, positions, loss)
        if problem is None and wait:
            problem = self._finish()
        if problem is None:
            return
        newest = "there is none before it" if self.latest is None else f"the newest good one is of step {self.latest}"
        said = f"the state of step {step} could not be saved in {self.directory} ({problem}); {newest}. Make room there"
        if wait:
            raise OSError(f"{said}, then go on with --resume")
        warnings.warn(f"{said}: training goes on, and tries again at the next checkpoint", stacklevel=2)

    def _finish_and_warn(self) -> None:
        """Waits for the save before; warns if it failed."""
        problem = self._finish()
        if problem is not None:
            said = f"the checkpoint of step {self._saving} in {self.directory} was not written ({problem})"
            warnings.warn(f"{said}: make room there; training goes on", stacklevel=4)

    def _begin(self, step: int, state: eqx.Module, positions: Mapping[str, Position], loss: float | None) -> str | None:
        """Starts to save; returns what went wrong so far."""
        self._finish_and_warn()
        if step in self.manager.all_steps():
            return None
        self._saving = step
        # Copied: they are written in the background, while the positions go on.
        places = copy.deepcopy({name: position.get_state() for name, position in positions.items()})
        facts = self.about | {"versions": versions(), "positions": places}
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), facts=ocp.args.JsonSave(facts)),
                metrics=None if loss is None else {"loss": loss},
            )
        except (OSError, ValueError) as error:
            return _reason(error)
        if is_first():
            self._hashing = threading.Thread(target=self._write_hashes, args=(step,), name="ulx-hashes")
            self._hashing.start()
        return None

    def _finish(self) -> str | None:
        """Waits for what is written in the background; returns what went wrong with it."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:  # TensorStore says of a full disk that a value is out of range
            return _reason(error)
        finally:
            if self._hashing is not None:
                self._hashing.join()
                self._hashing = None
        return None

    def restore(
        self,
        state: State,
        positions: Mapping[str, Position] | None = None,
        step: int | None = None,
        *,
        check: Callable[[dict[str, Any]], None] = lambda facts: None,
    ) -> State:
        """`state` with the arrays of a checkpoint (by default the newest); `positions` are put where they were saved.

        With these, when training goes on, `check` is shown what was saved beside the arrays, and raises where they must
        not be used. A checkpoint that is damaged is named in a warning and passed over; when training goes on, it is
        put aside as STEP.damaged once another one was read.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint's arrays are not those of `state`, another configuration's for example; or all
                that there are, or the one that was asked for, are damaged.
            OSError: one of several processes alone cannot read it.
        """
        steps = self.manager.all_steps() if step is None else [step]
        found, number, facts, damaged = self._newest(state, steps)
        if positions is not None:
            if not facts:
                raise ValueError(
                    f"the checkpoint of step {number} in {self.directory} was saved by an older ulx: its weights can "
                    "be used, but not trained on. Train anew under another --name"
                )
            check(facts)
            for name, position in positions.items():
                position.set_state(facts["positions"][name])
            for bad in damaged:
                self._put_aside(bad)
        return found

    def _newest(self, state: State, steps: Iterable[int]) -> tuple[State, int, dict[str, Any], list[int]]:
        """Arrays, step and facts of the newest of these that can be read, and those that cannot before it."""
        steps = sorted(steps, reverse=True)
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        damaged: list[int] = []
        for number in steps:
            try:
                found, facts = self._read(number, state)
            except _DamagedError as error:
                said = f"the checkpoint of step {number} in {self.directory} is damaged: {error}"
                if are_connected() and not error.agreed:
                    # The others may have read it. To go on without them would be to wait for each other for ever.
                    raise OSError(f"{said}. If it stays so, remove it: the one before it is taken then") from error
                damaged.append(number)
                if number == steps[-1]:
                    others = f". So are those of {', '.join(map(str, damaged[:-1]))}" if len(damaged) > 1 else ""
                    raise ValueError(f"{said}{others}. Nothing was changed; train anew under another --name") from error
                warnings.warn(f"{said}. Taking the one before it", stacklevel=3)
            else:
                return found, number, facts, damaged
        raise AssertionError  # the last one was read, or raised

    def _facts(self, step: int) -> dict[str, Any]:
        if (self.directory / str(step) / OLDER).is_dir():
            return {}
        args = ocp.args.Composite(facts=ocp.args.JsonRestore())
        try:
            return self.manager.restore(step, args=args)["facts"]
        except Exception as error:
            raise _DamagedError(_reason(error)) from error

    def _read(self, step: int, state: State) -> tuple[State, dict[str, Any]]:
        self._check_hashes(step)
        facts = self._facts(step)
        fields = _fields(state)
        paths, _ = jax.tree_util.tree_flatten_with_path(fields)
        wanted = {_name(path): ocp.utils.to_shape_dtype_struct(leaf) for path, leaf in paths}
        try:
            on_disk = self._as_on_disk(step, wanted)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} does not fit this model: {error}"
            ) from error
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(on_disk))
            restored = self.manager.restore(step, args=args)["state"]
        except Exception as error:  # of any kind, down to plain Exception
            raise _DamagedError(_reason(error)) from error
        read = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]}
        found = jax.tree_util.tree_map_with_path(lambda path, _: read[_name(path)], fields)
        arrays = eqx.tree_at(
            lambda s: [getattr(s, name) for name in found], eqx.filter(state, eqx.is_array), list(found.values())
        )
        return eqx.combine(arrays, state), facts

    def _as_on_disk(self, step: int, wanted: Mapping[str, Any]) -> PyTree:
        """The wanted arrays in the checkpoint's own tree. It may lack parts that hold none: Orbax compares these too,
        and a module that got a new one, left empty, would no longer fit. Raises ValueError for other arrays."""
        try:
            with ocp.StandardCheckpointer() as reader:
                metadata = reader.metadata(self.directory / str(step) / "state").item_metadata.tree
        except Exception as error:
            raise _DamagedError(_reason(error)) from error
        leaves, structure = jax.tree_util.tree_flatten_with_path(metadata)
        there = {_name(path): leaf for path, leaf in leaves}
        if there.keys() != wanted.keys():
            other = sorted(there.keys() ^ wanted.keys())
            raise ValueError(f"{len(other)} arrays are in one of them alone, such as {other[0]}")
        for name, array in wanted.items():
            if tuple(there[name].shape) != array.shape:
                raise ValueError(f"{name} has shape {tuple(there[name].shape)} there and {array.shape} here")
        return structure.unflatten([wanted[name] for name in there])

    def _write_hashes(self, step: int) -> None:
        """When all processes have written theirs of a checkpoint, by the first. Without them it can be used too."""
        with contextlib.suppress(OSError, ValueError):
            self.manager.wait_until_finished()
            folder = self.directory / str(step)
            hashes = _hashes(folder)
            with write_aside(folder / HASHES) as aside:
                aside.write_text(json.dumps(hashes))

    def _check_hashes(self, step: int) -> None:
        """Raises _DamagedError, for all processes alike, if a file is not the one that was written. Those of a
        checkpoint that a crash left without hashes are taken as they are."""
        problem = self._changed(self.directory / str(step)) if is_first() else None
        if not all_agree(problem is None):
            raise _DamagedError(problem or "as the first process says", agreed=True)

    def _changed(self, folder: Path) -> str | None:
        """What is not as its hash says, or None."""
        try:
            written = json.loads((folder / HASHES).read_text())
        except (OSError, ValueError):
            return None
        try:
            found = _hashes(folder)
        except OSError as error:
            return _reason(error)
        changed = [name for name, digest in written.items() if found.get(name) != digest]
        return f"{changed[0]} is {'changed' if changed[0] in found else 'gone'}" if changed else None

    def _put_aside(self, step: int) -> None:
        def rename() -> None:
            names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged.{i}" for i in itertools.count(2)))
            free = next(name for name in names if not (self.directory / name).exists())
            (self.directory / str(step)).rename(self.directory / free)

        first(rename)
        self.manager.reload()

    def close(self) -> None:
        """Raises OSError if what is still being written in the background cannot be."""
        problem = self._close()
        if problem is not None:
            raise OSError(f"the last checkpoint in {self.directory} was not written: {problem}")

    def _close(self) -> str | None:
        problem = self._finish()
        with contextlib.suppress(OSError, ValueError):  # it says again what has just been said
            self.manager.close()
        return problem

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:  # that is what is to be said
            self._close()


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(HASHES):
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _reason(error: BaseException) -> str:
    """In a few words: TensorStore says all it was asked for, and the system's reason somewhere in it."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _fields(state: eqx.Module) -> dict[str, PyTree]:
    """The arrays of the state's fields. One that holds none is left out: checkpoints from before it was there still
    fit."""
    arrays = eqx.filter(state, eqx.is_array)
    fields = {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays)}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}


def _name(path: tuple[Any, ...]) -> str:
    """Of an array, by its place: the same in a module, in the dicts and lists of a checkpoint, and in an old one."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path)
