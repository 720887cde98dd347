"""Shards of more files than may be open at once, and shards that several processes make."""

import itertools
import json
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ulx.data import cache
from ulx.data import source as sources
from ulx.data.cache import Recipe, each, prepare_in
from ulx.data.source import Records
from ulx.data.split import Item

COUNT = 640
"""Examples, in 40 shards of 16."""


def numbers(made: list[str] | None = None) -> Recipe:
    def load(name: str):
        if made is not None:
            made.append(name)
        return {"image": np.full((8, 8, 3), int(name) % 256, np.uint8)}, None

    return Recipe(
        name="numbers",
        resolution=8,
        class_names=("all",),
        settings={},
        items=lambda: ([Item(f"{i:03d}", 0) for i in range(COUNT)], []),
        make=each(load, workers=1),
        example_bytes=2**24,
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    prepare_in(folder, numbers())
    return folder


resource = pytest.importorskip("resource", reason="a system with limits of open files")


def opened(folder: Path) -> Records:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert len(shards) == 40
    return Records([str(folder / shard["file"]) for shard in shards], [len(shard["names"]) for shard in shards])


def files_open_in(folder: Path) -> int:
    handles = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(str(folder) in os.readlink(handle) for handle in handles if handle.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is open is seen on Linux alone")
def test_no_more_shards_are_open_than_may_be(many, monkeypatch):
    """By several threads in any order, and in another process, which gets them pickled. With one file for each shard
    ImageNet's 5,000 would end a training at the system's limit, which is often 1,024."""
    monkeypatch.setattr(sources, "OPEN_FILES", 8)
    records = opened(many)
    order = np.random.default_rng(0).permutation(COUNT)
    for each_one in (records, pickle.loads(pickle.dumps(records))):
        assert len(each_one) == COUNT
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Room for what the readers and their threads hold, and not for all shards.
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, hard))
        try:
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda index, of=each_one: of[index]["image"][0, 0, 0], order.tolist()))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        np.testing.assert_array_equal(found, order % 256)
        assert 0 < files_open_in(many) <= 16


def test_an_example_that_is_not_there(many):
    records = opened(many)
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=f"example {index} of {COUNT}"):
            records[index]
    assert len(Records([], [])) == 0
    with pytest.raises(ValueError, match="1 files and the numbers of records of 2"):
        Records(["one"], [1, 2])


class Several:
    """Processes as threads: what they have to agree on, and whose turn each is."""

    def __init__(self, monkeypatch, count: int):
        self.count, self.barrier = count, threading.Barrier(count)
        self.own, self.flags = threading.local(), [False] * count
        monkeypatch.setattr(cache, "share", self.share)
        monkeypatch.setattr(cache, "all_agree", self.all_agree)

    def share(self, items: Sequence[str]) -> list[str]:
        return list(items[self.own.index :: self.count])

    def all_agree(self, flag: bool) -> bool:
        self.flags[self.own.index] = flag
        self.barrier.wait(timeout=60)
        found = all(self.flags)
        self.barrier.wait(timeout=60)
        return found

    def prepare(self, folder: Path) -> tuple[list[list[str]], list[str]]:
        """What each of them made, and the fingerprints of what they have then."""
        made: list[list[str]] = [[] for _ in range(self.count)]

        def one(index: int) -> str:
            self.own.index = index
            return prepare_in(folder, numbers(made[index]), together=True).dataset.fingerprint

        with ThreadPoolExecutor(self.count) as pool:
            return made, list(pool.map(one, range(self.count)))


def test_several_processes_make_some_shards_each_and_check_only_these(many, tmp_path, monkeypatch):
    several = Several(monkeypatch, 3)
    made, fingerprints = several.prepare(tmp_path)
    assert [len(names) for names in made] == [14 * 16, 13 * 16, 13 * 16]
    assert sorted(itertools.chain(*made)) == [f"{i:03d}" for i in range(COUNT)]
    whole = {path.name: path.read_bytes() for path in many.glob("*.arrayrecord")}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.arrayrecord")} == whole
    assert len(set(fingerprints)) == 1
    # One is damaged, another's notes are gone: whose they are makes the first anew, and nobody reads all of them.
    (tmp_path / "manifest.json").unlink()
    damaged, forgotten = sorted(tmp_path.glob("*.arrayrecord"))[4:6]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    forgotten.with_suffix(".json").unlink()
    hashed: list[str] = []
    original = cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: hashed.append(path.name) or original(path))
    with pytest.warns(UserWarning, match=f"{damaged.name} is corrupt .*: making it anew"):
        made, again = several.prepare(tmp_path)
    assert [len(names) for names in made] == [0, 16, 16]
    assert again == fingerprints
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.arrayrecord")} == whole
    of_final_names = [name for name in hashed if name in whole]
    assert len(of_final_names) == len(set(of_final_names)) == 39  # each once; the one without notes is made anew
