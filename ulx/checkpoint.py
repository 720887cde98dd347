"""Checkpoints by Orbax: the training state and the data iterator together, written asynchronously and atomically."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import grain
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

__all__ = ["Checkpoints"]

State = TypeVar("State", bound=eqx.Module)


class Checkpoints:
    """The checkpoints of one stage: `save`, `restore`, `latest`. Keeps the newest two."""

    def __init__(self, directory: Path):
        self.manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    @property
    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: eqx.Module, batches: Iterator[Any], wait: bool = False) -> None:
        """Save in the background; with `wait`, return when it is on disk. Does nothing if the step is saved already."""
        if step not in self.manager.all_steps():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_fields(state)),
                    data=grain.checkpoint.CheckpointSave(batches),
                ),
            )
        if wait:
            self.manager.wait_until_finished()

    def restore(self, state: State, batches: Iterator[Any] | None = None, step: int | None = None) -> State:
        """`state` with the arrays of a checkpoint (by default the newest); `batches` is moved to where it was saved.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint's arrays are not those of `state`, another configuration's for example.
        """
        step = self.latest if step is None else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.manager.directory}")
        fields = _fields(state)
        paths, _ = jax.tree_util.tree_flatten_with_path(fields)
        wanted = {_name(path): ocp.utils.to_shape_dtype_struct(leaf) for path, leaf in paths}
        try:
            args: dict[str, Any] = {"state": ocp.args.StandardRestore(self._as_on_disk(step, wanted))}
            if batches is not None:
                args["data"] = grain.checkpoint.CheckpointRestore(batches)
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self.manager.directory} does not fit this model: {error}"
            ) from error
        read = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]}
        found = jax.tree_util.tree_map_with_path(lambda path, _: read[_name(path)], fields)
        arrays = eqx.tree_at(
            lambda s: [getattr(s, name) for name in found], eqx.filter(state, eqx.is_array), list(found.values())
        )
        return eqx.combine(arrays, state)

    def _as_on_disk(self, step: int, wanted: Mapping[str, Any]) -> PyTree:
        """The wanted arrays in the checkpoint's own tree. It may lack parts that hold none: Orbax compares these too,
        and a module that got a new one, left empty, would no longer fit. Raises ValueError for other arrays."""
        with ocp.StandardCheckpointer() as reader:
            metadata = reader.metadata(self.manager.directory / str(step) / "state")
        leaves, structure = jax.tree_util.tree_flatten_with_path(metadata.item_metadata.tree)
        there = [_name(path) for path, _ in leaves]
        if set(there) != set(wanted):
            other = sorted(set(there) ^ set(wanted))
            raise ValueError(f"{len(other)} arrays are in one of them alone, such as {other[0]}")
        return structure.unflatten([wanted[name] for name in there])

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fields(state: eqx.Module) -> dict[str, PyTree]:
    """The arrays of the state's fields. One that holds none is left out: checkpoints from before it was there still
    fit."""
    arrays = eqx.filter(state, eqx.is_array)
    fields = {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays)}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}


def _name(path: tuple[Any, ...]) -> str:
    """Of an array, by its place: the same in a module, in the dicts and lists of a checkpoint, and in an old one."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path)
