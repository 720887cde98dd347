"""Snapshots of the averages that training tracks (`ulx.ema`): a file for each of some steps, float32 weights alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from jaxtyping import PyTree

from ulx import ema
from ulx.aside import write_aside
from ulx.processes import is_first
from ulx.sharding import on_host

__all__ = ["Snapshots"]


class Snapshots:
    """The snapshots of one stage: `save`, `steps`, `average`. STEP.npz holds WIDTH/PATH/OF/THE/ARRAY for each array."""

    def __init__(self, directory: Path, sigma_rels: Sequence[float]):
        self.directory = directory
        self.sigma_rels = tuple(sigma_rels)

    @property
    def steps(self) -> list[int]:
        """The steps that are stored, in order."""
        return sorted(int(file.stem) for file in self.directory.glob("*.npz"))

    def save(self, step: int, averages: Sequence[PyTree]) -> None:
        """Store the averages after a step, one for each σ_rel. A file of that step is replaced; none is ever half. Of
        several processes the first alone writes."""
        arrays = {
            name: on_host(leaf)
            for sigma_rel, average in zip(self.sigma_rels, averages, strict=True)
            for name, leaf in zip(_names(sigma_rel, average), jax.tree.leaves(average), strict=True)
        }
        if not is_first():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with write_aside(self._file(step)) as aside, aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def average(self, sigma_rel: float, like: PyTree) -> tuple[PyTree, int, float]:
        """The average of width `sigma_rel` that ends at the newest snapshot, shaped like the averages themselves.

        Returns it with its step and `Synthesis.error`.

        Raises:
            FileNotFoundError: nothing is stored.
            ValueError: `sigma_rel` is out of range, or a file cannot be read or does not hold these arrays.
        """
        steps = self.steps
        if not steps:
            raise FileNotFoundError(f"no snapshots in {self.directory}")
        found = ema.synthesis(
            np.tile(np.array(self.sigma_rels, float), len(steps)),
            np.repeat(np.array(steps), len(self.sigma_rels)),
            sigma_rel=sigma_rel,
            step=steps[-1],
        )
        return ema.combined(self._read(steps, like), found.weights), steps[-1], found.error

    def _read(self, steps: Sequence[int], like: PyTree) -> Iterator[PyTree]:
        """The averages of every step, one at a time."""
        structure, shapes = jax.tree.structure(like), [leaf.shape for leaf in jax.tree.leaves(like)]
        for file in map(self._file, steps):
            try:
                with np.load(file, allow_pickle=False) as stored:
                    for sigma_rel in self.sigma_rels:
                        leaves = [stored[name] for name in _names(sigma_rel, like)]
                        if [leaf.shape for leaf in leaves] != shapes:
                            raise ValueError("its arrays have other shapes than this model's")
                        yield jax.tree.unflatten(structure, leaves)
            except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
                raise ValueError(f"{file} is no snapshot of this model: {error}") from error

    def _file(self, step: int) -> Path:
        return self.directory / f"{step:08d}.npz"


def _names(sigma_rel: float, average: PyTree) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(average)]
    return [f"{sigma_rel}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path in paths]
