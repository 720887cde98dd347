"""From a data set to batches, by Grain.

Training draws one endless stream: every epoch is all the examples in an order of its own, and the next epoch follows
where the last one ends, inside a batch if need be. Batch `k` is a fixed piece of that stream, whatever the number of
workers or processes: process `i` of `n` gets the `i`-th of `n` equal pieces of it. So the state of the iterator is the
number of batches it has given, and a run resumes on another machine with the very batches it would have seen. What is
drawn of an example (a piece of a video, its mirror image) belongs to its place in that stream too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from ulx.data.source import Dataset, Drawn, Example, Source, Split, drawn

__all__ = ["OrderedBatches", "TrainBatches", "ordered_batches", "train_batches", "validation_batches"]

# Grain counts in elements, which are whole batches here: its defaults (16 threads, 500 elements) would fill memory.
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
WORKER_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    flip: bool = False,
    workers: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> "TrainBatches":
    """Endless shuffled batches: dicts of arrays with a leading axis of `batch_size / shard_count` examples.

    `batch_size` is that of all processes together. It may exceed the data set: a batch then holds some examples
    twice, since it spans epochs. `flip` mirrors half of the images, anew in each epoch. `workers` processes read
    ahead (0: threads of this one); a script that asks for them needs the `if __name__ == "__main__"` guard, since
    they start by importing it. Raises `ValueError` for a batch size that the processes cannot share.
    """
    return TrainBatches(
        dataset.train.source,
        settings={
            "fingerprint": dataset.fingerprint,
            "examples": len(dataset.train),
            "batch_size": batch_size,
            "seed": seed,
            "flip": flip,
        },
        workers=workers,
        shard=_Shard.checked(batch_size, shard_index, shard_count),
    )


class _Shard(NamedTuple):
    """This process's piece of every batch."""

    index: int
    count: int
    size: int

    @classmethod
    def checked(cls, batch_size: int, index: int, count: int) -> "_Shard":
        if batch_size < 1 or batch_size % count:
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {count} process(es)")
        if not 0 <= index < count:
            raise ValueError(f"process {index} of {count}: the index must be below the count")
        return cls(index, count, batch_size // count)


class TrainBatches(grain.DatasetIterator):
    """The iterator that `train_batches` gives. Goes into a checkpoint by `grain.checkpoint.CheckpointSave`."""

    def __init__(self, source: Source, settings: dict[str, Any], workers: int, shard: _Shard):
        super().__init__()
        self.iterator: grain.DatasetIterator | None = None
        self.settings, self.workers = settings, workers
        # Grain shuffles epoch e by seed + e: spread the seeds, or seed 0's second epoch would be seed 1's first.
        shuffle_seed, draw_seed = np.random.SeedSequence(settings["seed"]).generate_state(2)
        stream = grain.MapDataset.range(len(source)).shuffle(int(shuffle_seed)).repeat()
        if settings["flip"] or isinstance(source, Drawn):
            stream = stream.random_map(_Draw(source, settings["flip"]), seed=int(draw_seed))
        else:
            stream = stream.map(source.__getitem__)
        # Without a remainder to count, since the stream's length is Python's largest integer.
        self.batches = stream.batch(shard.size, drop_remainder=True)[shard.index :: shard.count]
        self.given = 0

    def __next__(self) -> Example:
        if self.iterator is None:  # only now: workers take seconds to start, and set_state may come first
            self.iterator = self._start()
        batch = next(self.iterator)
        self.given += 1
        return batch

    def _start(self) -> grain.DatasetIterator:
        rest = self.batches[self.given :]
        if self.workers == 0:
            return iter(rest.to_iter_dataset(READ_AHEAD))
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, and crash in a program that has none
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
        return iter(rest.to_iter_dataset(WORKER_READ_AHEAD).mp_prefetch(options))

    def get_state(self) -> dict[str, Any]:
        """The number of batches given, and what they were batches of."""
        return {"batches": self.given, **self.settings}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after the batches that `state` counts. Raises `ValueError` if it counts other batches than these:
        then nothing would be the same as in the run that saved it."""
        other = {name: (state.get(name), value) for name, value in self.settings.items() if state.get(name) != value}
        if other or "batches" not in state:
            differences = ", ".join(f"{name} {saved!r} -> {now!r}" for name, (saved, now) in other.items())
            raise ValueError(
                f"the saved position is one in other training batches ({differences}): resume with the settings and "
                "data that it was saved with, or start a new run"
            )
        self.close()
        self.given = state["batches"]

    def start_prefetch(self) -> None:
        """Nothing to do: reading ahead begins with the first batch."""

    def close(self) -> None:
        """Stop reading ahead, and the workers."""
        if self.iterator is not None:
            self.iterator.close()
            self.iterator = None


class _Draw(NamedTuple):
    """An example as it is in this epoch. At module level: loader workers import it by name."""

    source: Source
    flip: bool

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        example = drawn(self.source, index, rng)
        if not self.flip or rng.random() < 0.5:
            return example
        return example | {"image": example["image"][..., ::-1, :]}


def validation_batches(
    dataset: Dataset, batch_size: int, *, shard_index: int = 0, shard_count: int = 1
) -> "OrderedBatches":
    """The held-out examples once, in order: see `ordered_batches`."""
    return ordered_batches(dataset.validation, batch_size, shard_index=shard_index, shard_count=shard_count)


def ordered_batches(split: Split, batch_size: int, *, shard_index: int = 0, shard_count: int = 1) -> "OrderedBatches":
    """Every example of `split` once, in its order, as batches of one shape (nothing recompiles).

    Each batch has a field `mask`, bool `b`: False for the copies of the last example that fill the last batch.
    `batch_size` is that of all processes together, as in `train_batches`, and raises the same `ValueError`.
    """
    return OrderedBatches(split, _Shard.checked(batch_size, shard_index, shard_count))


class OrderedBatches(Sequence[Example]):
    """The sequence that `ordered_batches` gives; batches are read when they are asked for."""

    def __init__(self, split: Split, shard: _Shard):
        self.split, self.shard = split, shard

    def __len__(self) -> int:
        return -(-len(self.split) // (self.shard.size * self.shard.count))

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = (index * self.shard.count + self.shard.index) * self.shard.size
        wanted = np.arange(first, first + self.shard.size)
        examples = [self.split[i] for i in np.minimum(wanted, len(self.split) - 1).tolist()]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return batch | {"mask": wanted < len(self.split)}
