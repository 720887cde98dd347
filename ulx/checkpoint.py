"""Checkpoints by Orbax: the training state and the data iterator together, written asynchronously and atomically."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import grain
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

__all__ = ["Checkpoints"]

State = TypeVar("State", bound=PyTree)


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

    def save(self, step: int, state: PyTree, batches: Iterator[Any], wait: bool = False) -> None:
        """Save in the background; with `wait`, return when it is on disk. Does nothing if the step is saved already."""
        if step not in self.manager.all_steps():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(eqx.filter(state, eqx.is_array)),
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
        arrays, static = eqx.partition(state, eqx.is_array)
        wanted: dict[str, Any] = {
            "state": ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays))
        }
        if batches is not None:
            wanted["data"] = grain.checkpoint.CheckpointRestore(batches)
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**wanted))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self.manager.directory} does not fit this model: {error}"
            ) from error
        return eqx.combine(restored["state"], static)

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
