"""Results with a row for each example, as they come: collected in memory, or stored on disk, where they need none and
an interruption loses one batch.

A `Store` is a folder of unfinished work. What it holds is only good for the same work, so it knows the facts that the
results follow from, and begins anew with others.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ulx import processes
from ulx.aside import write_aside

__all__ = ["Collected", "Store", "Stored"]

Leaf = Shaped[np.ndarray, "_n ..."]
"""Some rows of one of the arrays that a result consists of."""

FACTS = "facts.json"


class Collected:
    """Rows in memory."""

    done = 0

    def __init__(self) -> None:
        self._parts: list[Sequence[Leaf]] = []

    def append(self, leaves: Sequence[Leaf]) -> None:
        """The next rows of every array."""
        self._parts.append(leaves)

    def leaves(self) -> list[Leaf]:
        """All rows of every array."""
        return [np.concatenate(parts) for parts in zip(*self._parts, strict=True)]


class Stored:
    """Rows in `.npy` files, one for each array, and a note of how many are done. The first process writes them."""

    def __init__(self, folder: Path, name: str, total: int):
        self.done, self._arrays, self._total = 0, 0, total
        self._stem, self._note = folder / name.replace(" ", "-"), folder / f"{name.replace(' ', '-')}.json"
        try:
            found = json.loads(self._note.read_text("utf-8"))
        except (FileNotFoundError, ValueError):  # none, or what a machine that went down left of one
            found = {}
        if found.get("total") == total:
            self.done, self._arrays = found["done"], found["arrays"]
        processes.all_agree(True)  # all have read the note before the first changes it

    def _file(self, array: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{array}.npy")

    def append(self, leaves: Sequence[Leaf]) -> None:
        """The next rows of every array, on disk when this returns.

        Raises OSError where there is no room for them; what was there before is good, and so is the next try.
        """
        self._arrays = len(leaves)
        if processes.is_first():
            try:
                for array, leaf in enumerate(leaves):
                    self._write(self._file(array), leaf)
                self._remember(self.done + len(leaves[0]))
            except OSError as error:
                raise OSError(
                    f"{self._note.parent}: {error.strerror or error}: what was there before is kept, and the same "
                    "command goes on with it"
                ) from error
        self.done += len(leaves[0])

    def _write(self, path: Path, leaf: Leaf) -> None:
        with open(path, "r+b" if self.done else "wb") as file:
            if self.done:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                file.seek(self.done * leaf[0].nbytes, os.SEEK_CUR)
                file.truncate()  # of a batch that was interrupted
            else:
                # The header is that of the whole array, which the file is when all rows are there.
                facts = {"descr": leaf.dtype.str, "fortran_order": False, "shape": (self._total, *leaf.shape[1:])}
                np.lib.format.write_array_header_1_0(file, facts)
            file.write(np.ascontiguousarray(leaf).data)
            file.flush()
            os.fsync(file.fileno())

    def _remember(self, done: int) -> None:
        with write_aside(self._note) as aside:
            aside.write_text(json.dumps({"total": self._total, "done": done, "arrays": self._arrays}), "utf-8")

    def leaves(self) -> list[Leaf]:
        """All rows of every array, mapped from disk, read-only. Raises ValueError while some are missing."""
        if self.done < self._total:
            raise ValueError(f"{self._stem} has {self.done} of {self._total} rows")
        processes.all_agree(True)  # all are there before the others look for them
        return [np.load(self._file(array), mmap_mode="r", allow_pickle=False) for array in range(self._arrays)]


@dataclass(frozen=True)
class Store:
    """Where results are kept until the work is done; without a folder, in memory."""

    folder: Path | None = None

    @classmethod
    def begin(cls, folder: Path, facts: Mapping[str, Any]) -> "Store":
        """Goes on with what the folder holds of the same facts (JSON values), and clears it of what is of others."""
        text = json.dumps(facts, indent=1, sort_keys=True)

        def prepare() -> None:
            known = folder / FACTS
            if not known.exists() or known.read_text("utf-8") != text:
                if folder.exists():
                    print(f"{folder} is of other weights, settings or code: it begins anew")
                    _remove(folder)
                folder.mkdir(parents=True)
                with write_aside(known) as aside:
                    aside.write_text(text, "utf-8")

        processes.first(prepare)
        return cls(folder)

    def rows(self, name: str | None, total: int) -> Collected | Stored:
        """Those of that name, with what was done of them before; in memory without a name or a folder.

        `total` is how many there will be: rows of another total are not those, and begin anew.
        """
        return Collected() if name is None or self.folder is None else Stored(self.folder, name, total)

    def finish(self) -> None:
        """Removes the folder: the work is done, and saved elsewhere."""
        if (folder := self.folder) is not None:
            processes.first(lambda: _remove(folder))


def _remove(folder: Path) -> None:
    """The facts first: what an interruption leaves of the rest is then nobody's, and cleared."""
    (folder / FACTS).unlink(missing_ok=True)
    shutil.rmtree(folder)
