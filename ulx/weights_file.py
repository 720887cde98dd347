"""A trained run in one file: plain float32 arrays by safetensors, named by their place, with what they belong to.

    encoder.…, prior.…, decoder.…, base.…   the arrays
    metadata["ulx"]                         JSON: format, config and its sha256, data and classes, steps, versions

Any reader of safetensors gets at the arrays; `ulx.load` builds the models from the configuration and fills them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ulx.aside import write_aside
from ulx.data.extras import optional

__all__ = ["WeightsFile", "write"]

FORMAT = 1
"""Raised when an older ulx could not read what is written."""
KEY = "ulx"

Tree = TypeVar("Tree", bound=PyTree)


def write(path: Path, parts: Mapping[str, PyTree], facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Write the arrays of models, `encoder` and so on, aside first; returns them by their names.

    `facts` are JSON values. Raises OSError if the file cannot be written, ModuleNotFoundError without safetensors.
    """
    safetensors = optional("safetensors.numpy", extra="export")
    arrays = {name: np.asarray(leaf, np.float32, order="C") for name, leaf in _arrays(parts)}
    try:
        with write_aside(path) as aside:
            safetensors.save_file(arrays, aside, metadata={KEY: json.dumps({"format": FORMAT, **facts})})
    except optional("safetensors", extra="export").SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return arrays


class WeightsFile:
    """What `write` wrote: `facts`, and `filled`.

    Raises FileNotFoundError, ModuleNotFoundError without safetensors, and ValueError, naming the file, for one that is
    damaged, that ulx did not write, or that a newer ulx did.
    """

    def __init__(self, path: Path):
        self.path = path
        safetensors = optional("safetensors", extra="export")
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        try:
            with safetensors.safe_open(path, framework="np") as file:
                text = (file.metadata() or {}).get(KEY)
                self.arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file, or is damaged ({error}): export the run again") from error
        if text is None:
            raise ValueError(f"{path} was not written by python -m ulx.export: it does not say what its arrays are of")
        self.facts: dict[str, Any] = json.loads(text)
        if self.facts["format"] > FORMAT:
            raise ValueError(
                f"{path} was written by ulx {self.facts['versions']['ulx']}: this one is too old to read it"
            )

    def filled(self, parts: Mapping[str, Tree]) -> dict[str, Tree]:
        """The models with the file's arrays. Raises ValueError unless it has exactly theirs."""
        wanted = dict(_arrays(parts))
        if wanted.keys() != self.arrays.keys():
            missing, more = sorted(wanted.keys() - self.arrays.keys()), sorted(self.arrays.keys() - wanted.keys())
            told = [f"lacks {len(missing)}, such as {missing[0]}"] if missing else []
            told += [f"has {len(more)} too many, such as {more[0]}"] if more else []
            raise ValueError(f"{self.path} does not hold the arrays of its configuration: it {' and '.join(told)}")
        for name, leaf in wanted.items():
            array = self.arrays[name]
            if array.shape != leaf.shape or array.dtype != np.float32:
                raise ValueError(
                    f"{self.path}: {name} is {array.dtype} {array.shape}, its configuration has float32 {leaf.shape}"
                )

        def fill(path: tuple[Any, ...], leaf: Any) -> Any:
            if not eqx.is_inexact_array(leaf):
                return leaf
            return jnp.asarray(self.arrays[_name(path)], leaf.dtype)

        return jax.tree_util.tree_map_with_path(fill, dict(parts))


def _arrays(parts: Mapping[str, PyTree]) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(parts)):
        if eqx.is_inexact_array(leaf):
            yield _name(path), leaf


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
