"""Prepare examples once, keep them as ArrayRecord shards, and know whether what is kept can be trusted.

    <cache>/openmoji-32px-1f0c…/train-00000-of-00004.arrayrecord     the records
                                train-00000-of-00004.json            what is in them, and their sha256
                                recipe.json                          what is being made, written first
                                manifest.json                        all of it, written last

A shard is written under a temporary name and renamed when whole, so a file that has its final name is finished: an
interrupted preparation goes on from there, and two processes preparing at once only repeat each other's work. A
shard whose size or hash is not the recorded one is named, and made anew. In the cache the directory's name holds a hash
of everything that the records depend on, so other settings never meet an old one; any of it may be deleted. A directory
of the user's choice (`prepare_in`) says in recipe.json what is being made there, and nothing else is put beside it.
"""

import hashlib
import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ulx.aside import AsideError, remove_left, write_aside
from ulx.data import record
from ulx.data.extras import optional
from ulx.data.source import Dataset, Records, Split, check_resolution
from ulx.data.split import Item
from ulx.processes import all_agree, share
from ulx.progress import Progress

__all__ = ["Made", "Prepared", "Recipe", "UnreadableError", "cache_root", "each", "open_in", "prepare", "prepare_in"]

RECIPE = "recipe.json"
FORMAT = 1  # of the records and the manifest; a change makes every cache anew
WRITER_OPTIONS = "group_size:1,zstd:3"  # one record a chunk: Grain reads them in random order
SHARD_BYTES = 64 * 2**20  # of examples, before compression: what an interruption may cost, and what is held in memory
SHARD_EXAMPLES = range(16, 1025)  # how many a shard may hold
HASHED_BYTES = 2 * 2**30  # caches up to this size are hashed when opened (seconds); larger ones by size alone
SIGHT_SECONDS = 60  # until what another process wrote is seen, on a network drive


class UnreadableError(ValueError):
    """This example cannot be made, and why. The others can."""


Made = tuple[dict[str, np.ndarray], str | None] | UnreadableError
"""An example without its label, and a remark for the user or None; or why there is none."""


@dataclass(frozen=True)
class Recipe:
    """How to make a data set.

    `settings` must hold (as JSON) everything that the records depend on: it names the cache.
    `items` gives the training and validation examples to make; it is asked only when something must be made.
    `make` makes those of the given names, in that order; `each` is one from a function that makes a single one.
    `example_bytes` is about the size of one.
    """

    name: str
    resolution: int
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    items: Callable[[], tuple[Sequence[Item], Sequence[Item]]]
    make: Callable[[Sequence[str]], Iterator[Made]]
    example_bytes: int
    unit: str = "images"
    compressed_by: str | None = None
    """Who compresses, and the version, where all shards are to be of one: what is made already is good as it is."""
    attribution: str = ""

    def __post_init__(self) -> None:
        check_resolution(self.resolution)

    @property
    def key(self) -> str:
        """Hash of all that decides the content."""
        return _digest([FORMAT, self.name, self.resolution, self.class_names, self.settings])

    @property
    def described(self) -> dict[str, Any]:
        """The same, to be told what differs."""
        content = {"format": FORMAT, "name": self.name, "resolution": self.resolution}
        return content | {"class_names": list(self.class_names)} | json.loads(json.dumps(dict(self.settings)))


def each(
    load: Callable[[str], tuple[dict[str, np.ndarray], str | None]], workers: int | None = None
) -> Callable[[Sequence[str]], Iterator[Made]]:
    """`Recipe.make` of a function that makes one example, in so many threads (by default as many as there are cores).

    It raises `UnreadableError` for an example that cannot be made.
    """

    def load_or_say(name: str) -> Made:
        try:
            return load(name)
        except UnreadableError as error:
            return error
        except Exception as error:
            error.add_note(f"while preparing {name}")
            raise

    def make(names: Sequence[str]) -> Iterator[Made]:
        count = workers or os.cpu_count() or 1
        with ThreadPoolExecutor(count, "ulx-prepare") as pool:
            waiting: deque[Future[Made]] = deque()
            try:
                for name in names:
                    waiting.append(pool.submit(load_or_say, name))
                    if len(waiting) > 2 * count:  # what is made and not yet written is held in memory
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return make


@dataclass(frozen=True)
class Prepared:
    """A data set with what its preparation had to say: (name, reason) of each example left out, (name, remark) of
    some that went in."""

    dataset: Dataset
    refused: tuple[tuple[str, str], ...]
    remarks: tuple[tuple[str, str], ...]


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else `$ULX_CACHE_DIR`, else the user's cache directory of this platform."""
    chosen = cache_dir or os.environ.get("ULX_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(optional("platformdirs").user_cache_dir("ulx"))


def prepare(recipe: Recipe, cache_dir: str | os.PathLike[str] | None = None) -> Prepared:
    """Open the cache of `recipe`; whatever of it is missing or damaged is made first: see `prepare_in`."""
    return prepare_in(cache_root(cache_dir) / f"{recipe.name}-{recipe.resolution}px-{recipe.key[:16]}", recipe)


def prepare_in(directory: Path, recipe: Recipe, *, together: bool = False) -> Prepared:
    """What `recipe` makes, in this directory; whatever of it is missing or damaged is made first, and if `together`
    each process of a run makes some of the shards, in a directory that all of them see.

    Raises `ValueError` for a directory in which another recipe is followed, `OSError` (no space, no permission;
    finished shards stay) and whatever `recipe.items` raises.
    """
    manifest = _read_json(directory / "manifest.json")
    good = manifest is not None and not _any_problem(directory, manifest["shards"])
    if together:
        good = all_agree(good)
    if manifest is None or not good:
        manifest = _build(recipe, directory, manifest, together)
    else:
        _check_recipe(recipe, directory)
    return _open(directory, manifest)


def open_in(directory: Path) -> tuple[Prepared, dict[str, Any]]:
    """What was prepared in a directory, and the settings of its recipe.

    Raises `FileNotFoundError` for a preparation that is not there or not finished, `ValueError` for a damaged shard.
    """
    manifest = _read_json(directory / "manifest.json")
    if manifest is None:
        if (directory / RECIPE).exists():
            what = "its preparation is not finished: give its command again, and it goes on"
        else:
            what = (
                "it is not prepared data. Raw files are prepared once, by python -m ulx.data.prepare imagenet or "
                f"kinetics600 --root {directory} --out ANOTHER_FOLDER, or read as they are with --data.source folder"
            )
        raise FileNotFoundError(f"no manifest.json in {directory}: {what}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{directory} was prepared by another version of ulx: prepare it anew")
    for shard in manifest["shards"]:
        problem = _problem(directory, shard, hashed=False)
        if problem is not None:
            raise ValueError(f"{directory / shard['file']} {problem}: give the command that prepared it again")
    return _open(directory, manifest), manifest["settings"]


def _check_recipe(recipe: Recipe, directory: Path) -> None:
    """Raises `ValueError` if something else is being made here, naming what differs."""
    saved = _read_json(directory / RECIPE)
    if saved is None:
        return
    now = recipe.described
    other = {name: (saved.get(name), now[name]) for name in now if saved.get(name) != now[name]}
    if other:
        changes = ", ".join(f"{name} {_short(was)} -> {_short(wanted)}" for name, (was, wanted) in other.items())
        raise ValueError(
            f"{directory} holds another preparation ({changes}): choose another folder, or repeat that one"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _open(directory: Path, manifest: dict[str, Any]) -> Prepared:
    shards = manifest["shards"]

    def split(name: str) -> Split:
        parts = [shard for shard in shards if shard["split"] == name]
        return Split(
            Records([str(directory / part["file"]) for part in parts], [len(part["names"]) for part in parts]),
            tuple(name for part in parts for name in part["names"]),
            np.array([label for part in parts for label in part["labels"]], np.int32),
        )

    return Prepared(
        Dataset(
            name=manifest["name"],
            resolution=manifest["resolution"],
            class_names=tuple(manifest["class_names"]),
            train=split("train"),
            validation=split("validation"),
            fingerprint=manifest["fingerprint"],
            attribution=manifest["attribution"],
        ),
        refused=tuple((name, reason) for shard in shards for name, reason in shard["refused"]),
        remarks=tuple((name, remark) for shard in shards for name, remark in shard["remarks"]),
    )


def _build(recipe: Recipe, directory: Path, manifest: dict[str, Any] | None, together: bool) -> dict[str, Any]:
    """Make the shards that are missing or damaged, then the manifest."""
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        remove_left(directory)
        _check_recipe(recipe, directory)
        saved, by = _read_json(directory / RECIPE), recipe.compressed_by
        if saved is None:
            _write_json(directory / RECIPE, recipe.described | {"compressed_by": by})
        elif (before := saved.get("compressed_by")) and by and before != by:
            raise ValueError(
                f"{directory} was begun with {before}, and this is {by}, whose bytes may differ: install that to go "
                "on, or choose another folder"
            )
    known = {shard["file"]: shard for shard in manifest["shards"]} if manifest else {}
    plan = _plan(recipe)
    mine = share(list(plan)) if together else list(plan)
    found = {file: known.get(file) or _read_json((directory / file).with_suffix(".json")) for file in mine}
    what = f"{recipe.name} {recipe.resolution}px"
    finished = _good(directory, {file: shard for file, shard in found.items() if shard is not None}, f"check {what}")

    total = sum(len(plan[file][1]) for file in mine)
    start = sum(len(plan[file][1]) for file in mine if file in finished)
    with Progress(f"prepare {what}", total, unit=recipe.unit, start=start) as progress:
        for file in mine:
            if file not in finished:
                finished[file] = _write_shard(recipe, directory / file, *plan[file], progress)
    if together:
        all_agree(True)  # all are done
        finished |= {file: _made_elsewhere(directory / file, known.get(file)) for file in plan if file not in finished}

    shards = [finished[file] for file in plan]
    manifest = {
        "format": FORMAT,
        "name": recipe.name,
        "resolution": recipe.resolution,
        "class_names": list(recipe.class_names),
        "settings": dict(recipe.settings),
        "attribution": recipe.attribution,
        "counts": {
            split: sum(len(shard["names"]) for shard in shards if shard["split"] == split)
            for split in ("train", "validation")
        }
        | {"left out": sum(len(shard["refused"]) for shard in shards)},
        # Of the content alone: the same images prepared elsewhere, or by another ArrayRecord, have the same.
        "fingerprint": _digest([recipe.class_names, [[shard["content"], shard["names"]] for shard in shards]]),
        "shards": shards,
    }
    with _writing(directory):
        _write_json(directory / "manifest.json", manifest)
    return manifest


def _good(directory: Path, found: dict[str, dict[str, Any]], description: str) -> dict[str, dict[str, Any]]:
    """Those of the shards that are as they were written, by their hashes."""
    if not found:
        return {}
    good = {}
    with Progress(description, len(found), unit="shards") as progress:
        for file, shard in found.items():
            problem = _problem(directory, shard)
            if problem is None:
                good[file] = shard
            else:
                warnings.warn(f"{directory / file} {problem}: making it anew", stacklevel=5)
            progress.advance()
    return good


def _made_elsewhere(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """What another process made, or found to be as it is `known`. On a network drive it may take a while to be seen."""
    for _ in range(SIGHT_SECONDS):
        shard = _read_json(path.with_suffix(".json")) or known
        if shard is not None:
            return shard
        time.sleep(1)
    raise FileNotFoundError(f"{path} was made by another process, and is not here: let all see the same folder")


def _plan(recipe: Recipe) -> dict[str, tuple[str, Sequence[Item]]]:
    """Shard file -> its split and the examples that belong in it."""
    fewest, most = SHARD_EXAMPLES.start, SHARD_EXAMPLES.stop - 1
    per_shard = max(fewest, min(most, SHARD_BYTES // recipe.example_bytes))
    plan = {}
    for split, items in zip(("train", "validation"), recipe.items(), strict=True):
        chunks = [items[i : i + per_shard] for i in range(0, len(items), per_shard)]
        for i, chunk in enumerate(chunks):
            plan[f"{split}-{i:05d}-of-{len(chunks):05d}.arrayrecord"] = (split, chunk)
    return plan


def _write_shard(
    recipe: Recipe,
    path: Path,
    split: str,
    items: Sequence[Item],
    progress: Progress,
) -> dict[str, Any]:
    """Make one shard; returns what is known of it. Leaves nothing behind when it fails."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shard: dict[str, Any] = {"file": path.name, "split": split, "names": [], "labels": []}
    shard |= {"refused": [], "remarks": []}
    content = hashlib.sha256()
    # What `recipe.make` raises is not of the disk: of writing alone is said what to do.
    with _writing(path.parent, (AsideError,)), write_aside(path) as aside:
        with _writing(path.parent):
            writer = ArrayRecordWriter(str(aside), WRITER_OPTIONS)
        try:
            for item, outcome in zip(items, recipe.make([item.name for item in items]), strict=True):
                if isinstance(outcome, UnreadableError):
                    shard["refused"].append([item.name, str(outcome)])
                else:
                    example, remark = outcome
                    packed = record.pack(example | {"label": np.asarray(item.label, np.int32)})
                    content.update(packed)
                    with _writing(path.parent):
                        writer.write(packed)
                    shard["names"].append(item.name)
                    shard["labels"].append(item.label)
                    if remark:
                        shard["remarks"].append([item.name, remark])
                progress.advance()
        finally:
            with _writing(path.parent):
                writer.close()
        with _writing(path.parent):
            shard |= {"content": content.hexdigest(), "bytes": aside.stat().st_size, "sha256": _sha256(aside)}
    with _writing(path.parent):
        _write_json(path.with_suffix(".json"), shard)
    return shard


def _problem(directory: Path, shard: Mapping[str, Any], hashed: bool = True) -> str | None:
    """What is wrong with the shard on disk, or None."""
    path = directory / shard["file"]
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"has {size} bytes, not the {shard['bytes']} that were written"
    if hashed and _sha256(path) != shard["sha256"]:
        return "is corrupt (its sha256 is not the one that was written)"
    return None


def _any_problem(directory: Path, shards: Sequence[Mapping[str, Any]]) -> bool:
    hashed = sum(shard["bytes"] for shard in shards) <= HASHED_BYTES
    return any(_problem(directory, shard, hashed) for shard in shards)


@contextmanager
def _writing(directory: Path, kinds: tuple[type[Exception], ...] = (OSError, RuntimeError)) -> Iterator[None]:
    """Says where writing failed and what to do. ArrayRecord reports a full disk as a `RuntimeError`."""
    try:
        yield
    except kinds as error:
        raise OSError(
            f"cannot write the data cache in {directory}: {error}. Make room or allow writing there, or choose "
            "another place (--out of a preparation, else --data.cache-dir or ULX_CACHE_DIR). Finished shards are kept "
            "and used next time."
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is nothing, or nothing readable: it is then made anew."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        warnings.warn(f"{path} is corrupt: making it anew", stacklevel=2)
        return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
