"""What a data set is to the rest of ulx: two splits of examples that can be read in any order.

An example is a dict of arrays: `image`, uint8 `h w 3`, or `t h w 3` of a clip, and `label`, int32. A cached latent is
an example with other fields, and nothing here or in the pipeline needs to know.
"""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from ulx.data import record

__all__ = [
    "Chosen",
    "Dataset",
    "Drawn",
    "Example",
    "InMemory",
    "OneClass",
    "Records",
    "Source",
    "Split",
    "check_resolution",
    "drawn",
    "one_class",
]

RESOLUTIONS = range(8, 1025)
OPEN_FILES = 128
"""Shards of a split that are held open at once, beside those that threads are reading: many systems let a process open
1,024 files, and ImageNet has 5,000 shards. To open one again takes little beside decoding, on a local disk."""

Example = dict[str, np.ndarray]


def check_resolution(resolution: int) -> None:
    """Raises `ValueError` for a size that images cannot be prepared at."""
    if resolution not in RESOLUTIONS:
        raise ValueError(
            f"--data.resolution {resolution}: must be from {RESOLUTIONS.start} to {RESOLUTIONS.stop - 1} pixels"
        )


@runtime_checkable
class Source(Protocol):
    """Random access to examples; must survive pickling, since loader workers are processes of their own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Drawn(Source, Protocol):
    """One whose examples are drawn when training: pieces of longer videos, say, of which `source[index]` is one."""

    def draw(self, index: int, rng: np.random.Generator, /) -> Example: ...


class Chosen:
    """Some of a source's examples: those of the given numbers."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, tuple(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        return drawn(self.source, self.indices[index], rng)


class OneClass:
    """A source without its labels: all are 0."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.source[index] | {"label": np.zeros((), np.int32)}

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        return drawn(self.source, index, rng) | {"label": np.zeros((), np.int32)}


def one_class(dataset: "Dataset") -> "Dataset":
    """Without its classes: there is one, "all"."""

    def without(split: "Split") -> "Split":
        return replace(split, source=OneClass(split.source), labels=np.zeros_like(split.labels))

    fingerprint = hashlib.sha256(f"one class of {dataset.fingerprint}".encode()).hexdigest()
    parts = {"train": without(dataset.train), "validation": without(dataset.validation)}
    return replace(dataset, class_names=("all",), fingerprint=fingerprint, **parts)


def drawn(source: Source, index: int, rng: np.random.Generator) -> Example:
    return source.draw(index, rng) if isinstance(source, Drawn) else source[index]


class InMemory:
    """Examples that are rows of arrays: `InMemory({"image": images, "label": labels})`.

    Raises `ValueError` when the arrays differ in length.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"every field needs one row per example, got {lengths}")
        self.arrays = dict(arrays)
        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}


class Records:
    """Examples in ArrayRecord files, shard after shard; `counts` are the records of each file.

    The arrays it gives are read-only views of the record's bytes: copying is left to whoever batches them. May be read
    by several threads, and sent to another process. Raises OSError, naming the file, for a record that is no longer
    what was written: each has a hash.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        if len(paths) != len(counts):
            raise ValueError(f"{len(paths)} files and the numbers of records of {len(counts)}")
        self.paths, self.ends = list(paths), list(itertools.accumulate(counts))
        self._open_files()

    def _open_files(self) -> None:
        # One that no thread reads from any more is closed as it is dropped.
        self._reader = lru_cache(OPEN_FILES)(_reader)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "ends": self.ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_files()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = bisect.bisect_right(self.ends, index)
        number = index - (self.ends[shard - 1] if shard else 0)
        try:
            return record.unpack(self._reader(self.paths[shard]).read([number])[0])
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"record {number} of {self.paths[shard]} cannot be read ({reason}): give the command that prepared it "
                "again (a cache is mended whenever it is opened), and go on with --resume"
            ) from error


def _reader(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32 * 1024)


@dataclass(frozen=True)
class Split:
    """Examples with what a report wants to know of them without reading any: `names[i]` (file stem or relative
    path) and `labels[i]` belong to `source[i]`, and so does `captions[i]`, if they have captions. Raises `ValueError`
    where there are not as many of each."""

    source: Source
    names: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    captions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.source) == len(self.names) == len(self.labels):
            raise ValueError(
                f"a split needs a name and a label for each of its {len(self.source)} examples, "
                f"got {len(self.names)} names and {len(self.labels)} labels"
            )
        if self.captions is not None and len(self.captions) != len(self.names):
            raise ValueError(
                f"a split with captions needs one for each of its {len(self.names)} examples, got {len(self.captions)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def __iter__(self) -> Iterator[Example]:
        return (self.source[index] for index in range(len(self)))

    def chosen(self, indices: Sequence[int]) -> "Split":
        """Those examples alone, in the order given."""
        return Split(
            Chosen(self.source, indices),
            tuple(self.names[index] for index in indices),
            self.labels[np.asarray(indices, np.intp)],
            None if self.captions is None else tuple(self.captions[index] for index in indices),
        )


@dataclass(frozen=True)
class Dataset:
    """Training and validation examples, and what they are.

    `fingerprint` is a hash of the prepared examples, their names and classes: runs and checkpoints store it, so that a
    run continued on other data is noticed, while the same data in another place is the same. `attribution` is the
    credit that pictures of the data must carry, or "".
    """

    name: str
    resolution: int
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    fingerprint: str
    attribution: str = ""

    def mapped(self, change: Callable[[Source], Source]) -> "Dataset":
        """With both sources changed: to decode what they hold, say."""
        train, validation = (replace(split, source=change(split.source)) for split in (self.train, self.validation))
        return replace(self, train=train, validation=validation)

    def class_counts(self) -> dict[str, tuple[int, int]]:
        """Examples of each class in (train, validation)."""
        train, validation = (
            np.bincount(split.labels, minlength=len(self.class_names)) for split in (self.train, self.validation)
        )
        return {name: (int(train[i]), int(validation[i])) for i, name in enumerate(self.class_names)}
