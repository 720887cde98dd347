import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import array_record.python.array_record_module as array_record_module
import numpy as np
import pytest

from ulx import aside
from ulx.data.cache import Recipe, UnreadableError, cache_root, each, open_in, prepare, prepare_in
from ulx.data.split import Item

TRAIN = [Item(f"t{i:03d}", i % 3) for i in range(100)]
VALIDATION = [Item(f"v{i:03d}", i % 3) for i in range(20)]
PER_SHARD = 16  # the fewest: `example_bytes` below claims that examples are large


class Loader:
    """Makes an example from the digits of its name and remembers whom it made; some it cannot make."""

    def __init__(self, unreadable=(), stop_at=None):
        self.unreadable, self.stop_at, self.made = unreadable, stop_at, []

    def __call__(self, name):
        if name == self.stop_at:
            raise RuntimeError("pulled the plug")
        self.made.append(name)
        if name in self.unreadable:
            raise UnreadableError("is torn")
        return {"image": content(name)}, "is round" if name.endswith("7") else None


def content(name):
    return np.full((8, 8, 3), int(name[1:]), np.uint8)


def recipe(load, settings=None, **changes):
    fields = {
        "name": "numbers",
        "resolution": 8,
        "class_names": ("zero", "one", "two"),
        "settings": settings or {},
        "items": lambda: (TRAIN, VALIDATION),
        "make": each(load),
        "example_bytes": 2**24,
    }
    return Recipe(**(fields | changes))


def shards(root):
    return sorted(root.rglob("*.arrayrecord"))


def test_every_example_comes_back_with_its_name_and_label(tmp_path):
    prepared = prepare(recipe(Loader()), tmp_path)
    for split, items in [(prepared.dataset.train, TRAIN), (prepared.dataset.validation, VALIDATION)]:
        assert split.names == tuple(item.name for item in items)
        assert split.labels.tolist() == [item.label for item in items]
        for item, example in zip(items, split, strict=True):
            np.testing.assert_array_equal(example["image"], content(item.name))
            assert example["label"] == item.label
            assert (example["label"].dtype, example["label"].shape) == (np.int32, ())
    assert prepared.dataset.class_counts() == {"zero": (34, 7), "one": (33, 7), "two": (33, 6)}
    assert len(shards(tmp_path)) == -(-100 // PER_SHARD) + -(-20 // PER_SHARD)
    assert [name for name, _ in prepared.remarks] == [n.name for n in [*TRAIN, *VALIDATION] if n.name.endswith("7")]


def test_the_second_time_nothing_is_made(tmp_path):
    first = prepare(recipe(Loader()), tmp_path)
    unused = Loader()
    second = prepare(recipe(unused, items=lambda: pytest.fail("asked for the items")), tmp_path)
    assert unused.made == []
    assert second.dataset.fingerprint == first.dataset.fingerprint
    assert second.remarks == first.remarks


@pytest.mark.parametrize(
    "change",
    [{"settings": {"limit": 5}}, {"resolution": 16}, {"class_names": ("a", "b", "c")}, {"name": "others"}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_another_cache(tmp_path, change):
    first = prepare(recipe(Loader()), tmp_path)
    other = Loader()
    second = prepare(recipe(other, **change), tmp_path)
    assert len(other.made) == 120
    # The fingerprint is of what came out: of these, only the names of the classes are part of it.
    assert (second.dataset.fingerprint != first.dataset.fingerprint) == ("class_names" in change)
    again = Loader()
    prepare(recipe(again), tmp_path)
    assert again.made == []


def test_the_fingerprint_tells_contents_apart(tmp_path):
    def other_pixel(name):
        image = content(name)
        image[0, 0, 0] += name == "v013"
        return {"image": image}, None

    relabelled = [Item(name, (label + (name == "t050")) % 3) for name, label in TRAIN]
    renamed = [Item(name.replace("t050", "x050"), label) for name, label in TRAIN]
    recipes = [
        recipe(Loader()),
        recipe(other_pixel),
        recipe(Loader(), items=lambda: (relabelled, VALIDATION)),
        recipe(Loader(), items=lambda: (renamed, VALIDATION)),
        recipe(Loader(["t050"])),
        recipe(Loader(), items=lambda: (TRAIN + VALIDATION, VALIDATION)),
    ]
    prints = {prepare(recipe, tmp_path / str(i)).dataset.fingerprint for i, recipe in enumerate(recipes)}
    assert len(prints) == len(recipes)
    assert prepare(recipe(Loader()), tmp_path / "elsewhere").dataset.fingerprint in prints


def test_an_interrupted_preparation_goes_on_from_its_finished_shards(tmp_path):
    with pytest.raises(RuntimeError, match="pulled the plug") as interruption:
        prepare(recipe(Loader(stop_at="t050")), tmp_path)
    assert "while preparing t050" in interruption.value.__notes__
    assert [path.name for path in shards(tmp_path)] == [f"train-0000{i}-of-00007.arrayrecord" for i in range(3)]
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob("*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}

    rest = Loader()
    resumed = prepare(recipe(rest), tmp_path)
    assert sorted(rest.made) == [item.name for item in [*TRAIN[3 * PER_SHARD :], *VALIDATION]]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = prepare(recipe(Loader()), tmp_path / "at once")
    assert resumed.dataset.fingerprint == whole.dataset.fingerprint
    assert [p.read_bytes() for p in shards(tmp_path / "at once")] == [
        p.read_bytes() for p in shards(tmp_path) if "at once" not in str(p)
    ]


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_length(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(damage_bytes, "is corrupt"), (damage_length, "bytes, not the"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_shard_is_named_and_made_anew(tmp_path, damage, problem, with_manifest):
    first = prepare(recipe(Loader()), tmp_path)
    damaged = shards(tmp_path)[2]
    damage(damaged)
    if not with_manifest:
        next(tmp_path.rglob("manifest.json")).unlink()
    repair = Loader()
    with pytest.warns(UserWarning, match=f"{damaged.name} .*{problem}.* making it anew"):
        second = prepare(recipe(repair), tmp_path)
    assert sorted(repair.made) == [item.name for item in TRAIN[2 * PER_SHARD : 3 * PER_SHARD]]
    assert second.dataset.fingerprint == first.dataset.fingerprint
    np.testing.assert_array_equal(second.dataset.train[40]["image"], content("t040"))


def test_a_damaged_manifest_costs_no_shard(tmp_path):
    first = prepare(recipe(Loader()), tmp_path)
    manifest = next(tmp_path.rglob("manifest.json"))
    manifest.write_text(manifest.read_text()[:-50])
    unused = Loader()
    with pytest.warns(UserWarning, match=r"manifest\.json is corrupt"):
        second = prepare(recipe(unused), tmp_path)
    assert unused.made == []
    assert second.dataset.fingerprint == first.dataset.fingerprint


def test_what_was_refused_is_remembered(tmp_path):
    unreadable = {item.name for item in TRAIN[:PER_SHARD]} | {"t050", "v003"}  # a whole shard, and two more
    for _ in range(2):  # made, then opened
        prepared = prepare(recipe(Loader(unreadable)), tmp_path)
        assert {name for name, _ in prepared.refused} == unreadable
        assert {reason for _, reason in prepared.refused} == {"is torn"}
        assert (len(prepared.dataset.train), len(prepared.dataset.validation)) == (83, 19)
        assert not unreadable & {*prepared.dataset.train.names, *prepared.dataset.validation.names}
        np.testing.assert_array_equal(prepared.dataset.train[0]["image"], content("t016"))
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert manifest["counts"] == {"train": 83, "validation": 19, "left out": 18}


class FullDisk(array_record_module.ArrayRecordWriter):
    """Full after 40 records, told in ArrayRecord's own way: not an OSError."""

    room = 40

    def write(self, record):
        FullDisk.room -= 1
        if FullDisk.room < 0:
            raise RuntimeError("write() failed: No space left on device; writing shard; at byte 65536")
        super().write(record)


def test_a_full_disk_is_one_error_that_names_the_place_and_the_option(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", FullDisk)
        with pytest.raises(OSError, match="No space left on device") as full:
            prepare(recipe(Loader()), tmp_path)
    assert str(tmp_path) in str(full.value)
    assert "--data.cache-dir" in str(full.value)
    assert len(shards(tmp_path)) == 40 // PER_SHARD
    assert not list(tmp_path.rglob("*.tmp"))
    rest = Loader()
    assert len(prepare(recipe(rest), tmp_path).dataset.train) == 100
    assert len(rest.made) == 120 - 40 // PER_SHARD * PER_SHARD


def test_a_disk_that_says_only_at_the_end_that_it_is_full(tmp_path, monkeypatch):
    flush, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 2:  # of the first shard, after recipe.json
            raise OSError(28, "No space left on device")
        flush(file)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"cannot write the data cache .*No space left.*--data.cache-dir"):
            prepare(recipe(Loader()), tmp_path)
    assert not list(tmp_path.rglob("*.arrayrecord*"))


def test_a_disk_that_is_really_full(tmp_path):
    """The same through the real writer: the process may write no file of more than 40 kB."""
    program = """
        import resource, signal, sys
        import numpy as np
        from ulx.data.cache import Recipe, each, prepare
        from ulx.data.split import Item
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        noise = np.random.default_rng(0)
        items = [Item(f"t{i}", 0) for i in range(100)]
        load = lambda name: ({"image": noise.integers(0, 256, (64, 64, 3), np.uint8)}, None)
        try:
            prepare(Recipe("noise", 64, ("all",), {}, lambda: (items, items[:1]), each(load), 2**20), sys.argv[1])
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"cannot write the data cache in {tmp_path}" in message
    assert "File too large" in message
    assert "--data.cache-dir" in message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["recipe.json"]


def test_a_cache_directory_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("I was here first")
    with pytest.raises(OSError, match=r"cannot write the data cache in .*file.*--data\.cache-dir"):
        prepare(recipe(Loader()), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "I was here first"


def test_two_processes_at_once(tmp_path):
    program = """
        import sys, time
        import numpy as np
        from ulx.data.cache import Recipe, each, prepare
        from ulx.data.split import Item
        def load(name):
            time.sleep(0.01)
            return {"image": np.full((8, 8, 3), int(name), np.uint8)}, None
        items = [Item(str(i), 0) for i in range(100)]
        recipe = Recipe("slow", 8, ("all",), {}, lambda: (items, items[:3]), each(load), 2**24)
        dataset = prepare(recipe, sys.argv[1]).dataset
        print(dataset.fingerprint, sum(int(example["image"][0, 0, 0]) for example in dataset.train))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    pipes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [pipe.communicate()[0].split() for pipe in pipes]
    assert [pipe.returncode for pipe in pipes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == str(sum(range(100)))
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_not(tmp_path):
    with pytest.raises(RuntimeError):
        prepare(recipe(Loader(stop_at="t000")), tmp_path)
    (directory,) = tmp_path.iterdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    of_ended, of_here = left = [
        directory / f"train-00000-of-00001.arrayrecord.{aside.where()}.{process}-aa.tmp"  # of a shard of another plan
        for process in (ended.pid, os.getpid())
    ]
    for file in left:
        file.write_bytes(b"half")
    prepare(recipe(Loader()), tmp_path)
    assert of_ended.exists() == (aside.where() == aside.NOWHERE)
    assert of_here.exists()


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ULX_CACHE_DIR", str(tmp_path / "environment"))
    assert cache_root(tmp_path / "argument") == tmp_path / "argument"
    assert cache_root() == tmp_path / "environment"
    monkeypatch.delenv("ULX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root().name == "ulx"
    assert cache_root("~/somewhere") == Path.home() / "somewhere"


def test_a_directory_of_ones_own_is_opened_without_its_recipe(tmp_path):
    made = prepare_in(tmp_path, recipe(Loader(), {"crop": "middle"}))
    found, settings = open_in(tmp_path)
    assert settings == {"crop": "middle"}
    assert found.dataset.fingerprint == made.dataset.fingerprint
    assert found.dataset.class_names == ("zero", "one", "two")
    assert found.dataset.train.names == made.dataset.train.names
    np.testing.assert_array_equal(found.dataset.train[3]["image"], content("t003"))


def test_a_directory_that_is_not_prepared_or_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in .*--root .* --out .*--data\.source folder$"):
        open_in(tmp_path)
    with pytest.raises(RuntimeError):
        prepare_in(tmp_path, recipe(Loader(stop_at="t050")))
    with pytest.raises(FileNotFoundError, match="is not finished: give its command again"):
        open_in(tmp_path)
    prepare_in(tmp_path, recipe(Loader()))
    shard = shards(tmp_path)[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} has \d+ bytes, not the \d+ .*: give the command"):
        open_in(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_a_directory_holds_one_preparation(tmp_path, finished):
    if finished:
        prepare_in(tmp_path, recipe(Loader(), {"crop": "middle"}))
    else:
        with pytest.raises(RuntimeError):
            prepare_in(tmp_path, recipe(Loader(stop_at="t050"), {"crop": "middle"}))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds another preparation \(crop 'middle' -> 'left'\)"):
        prepare_in(tmp_path, recipe(Loader(), {"crop": "left"}))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_made_ahead_of_the_writing_is_bounded():
    """Memory: of many examples no more than twice the workers' number are held, and all come in their order."""
    made = []
    found = each(lambda name: (made.append(name) or {}, name), workers=2)([str(i) for i in range(100)])
    for count in range(100):
        example = next(found)
        assert not isinstance(example, UnreadableError)
        assert example[1] == str(count)
        assert len(made) <= count + 1 + 2 * 2
