"""What images show, in words: captions for the names of a data set, from one of three places.

* OpenMoji: Unicode's names of the emoji in a language, out of the package `emoji` (BSD). Of the 4,495 drawings 3,953
  have a name; the others are OpenMoji's own, or sequences that Unicode does not recommend.
* Text files beside the images of a folder: `cats/01.txt` for `cats/01.jpg`.
* A table with the columns `path` and `caption` (`ulx.data.caption_table`).

A caption is one line: what stands around it is dropped, and line breaks inside are one space. Images without one are
left out.
"""

import os
import posixpath
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ulx.data.caption_table import Row
from ulx.data.extras import optional
from ulx.data.folder import first_named
from ulx.data.image import SUFFIXES
from ulx.data.openmoji import family
from ulx.data.source import Dataset, Split
from ulx.data.split import digest_of

__all__ = [
    "Found",
    "attached",
    "caption",
    "captioned",
    "check_language",
    "kinds",
    "of_openmoji",
    "of_table",
    "of_text_files",
]

READERS = 16  # threads; what they wait for is a network drive, if anything
FILES_AT_ONCE = 1000  # of one thread: fewer things to wait for than files
_shown = reprlib.Repr()  # of a path in a message: a caption may stand in its place
_shown.maxstring = 80


@dataclass(frozen=True)
class Found:
    """Captions by the names of the images, and why there are not more.

    `bad` names each row or file that cannot be used, with the reason, of the `total` that `where` says. Images may have
    no caption for no fault of any of these: `lacking` says what they lack then, or is "".
    """

    captions: Mapping[str, str]
    bad: tuple[str, ...]
    total: int
    where: str
    lacking: str


def of_openmoji(names: Sequence[str], language: str) -> Found:
    """Of OpenMoji's drawings by their file names. Raises as `check_language`."""
    found = {name: words for name in names if (words := caption(name, language)) is not None}
    return Found(found, (), len(names), "drawings", f"name in {language!r}")


def caption(stem: str, language: str = "en") -> str | None:
    """The name of the drawing with a file name such as `2764` ("red heart"), or None if it has none.

    Raises as `check_language`.
    """
    # The package has every emoji with its presentation selectors and without them.
    emoji = "".join(chr(int(code, 16)) for code in stem.split("-"))
    name = _emoji(language).get(emoji, {}).get(language)
    return None if name is None else name.strip(":").replace("_", " ")


def check_language(language: str) -> None:
    """Raises ValueError for a language that the package `emoji` lacks, ModuleNotFoundError without the package."""
    _emoji(language)


@cache
def _emoji(language: str) -> Mapping[str, Mapping[str, Any]]:
    package = optional("emoji", extra="text")
    if language not in package.LANGUAGES:
        raise ValueError(f"there are no captions in {language!r}: there are {', '.join(package.LANGUAGES)}")
    package.config.load_language(language)
    return package.EMOJI_DATA


def of_text_files(names: Sequence[str], root: Path) -> Found:
    """Of images by their paths under `root`, each with a UTF-8 text file of the same stem in the same folder."""

    def read(first: int) -> list[str | OSError | UnicodeDecodeError]:
        return [_text_of(root / name) for name in names[first : first + FILES_AT_ONCE]]

    found, bad = {}, []
    with ThreadPoolExecutor(READERS, "ulx-captions") as pool:
        texts = (text for part in pool.map(read, range(0, len(names), FILES_AT_ONCE)) for text in part)
        for name, text in zip(names, texts, strict=True):
            if isinstance(text, str) and text:
                found[name] = text
            else:
                bad.append(f"{posixpath.splitext(name)[0]}.txt ({_reason(text)})")
    return Found(found, tuple(bad), len(names), f"text files in {root}", "")


def _text_of(image: Path) -> str | OSError | UnicodeDecodeError:
    try:
        return _one_line(image.with_suffix(".txt").read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        return error


def _reason(text: str | OSError | UnicodeDecodeError) -> str:
    if isinstance(text, str):
        return "is empty"
    if isinstance(text, UnicodeDecodeError):
        return "is not UTF-8"
    return "is not there" if isinstance(text, FileNotFoundError) else f"{text.strerror}"


def of_table(
    names: Sequence[str], rows: Sequence[Row], table: str, *, root: Path | None = None, limited: bool = False
) -> Found:
    """Of images by the rows of a table, which are counted from 1.

    `root` is the folder of the images, if they are files: a row may name one that is not there. Of an image with
    several rows the first is taken. `limited` says that the names are not those of all images: rows of others are
    passed over.
    """
    known, found, bad = frozenset(names), {}, []
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            bad.append(f"row {number} ({row})")
            continue
        # "./a.png" is "a.png"
        path, words = posixpath.normpath(row[0]), _one_line(row[1])
        if not row[0].strip():
            reason = "has no path"
        elif not words:
            reason = "has no caption"
        elif path in found:
            reason = f"names {_shown.repr(path)} again"
        elif path in known:
            found[path] = words
            continue
        elif root is not None and not os.path.isfile(root / path):
            reason = f"names {_shown.repr(path)}, which is not there"
        elif limited and path.lower().endswith(SUFFIXES):
            continue
        else:
            reason = f"names {_shown.repr(path)}, which is no image of the data set"
        bad.append(f"row {number} ({reason})")
    return Found(found, tuple(bad), len(rows), f"rows of {table}", f"caption in {table}")


def _one_line(text: str) -> str:
    return " ".join(line for part in text.splitlines() if (line := part.strip()))


def captioned(dataset: Dataset, captions: Mapping[str, str], *, reason: str = "") -> Dataset:
    """The examples that have a caption, in their order, with it; `captions` are by the examples' names.

    Raises `ValueError` for a split that has none, with the `reason` if there is one to give.
    """
    parts: dict[str, Split] = {}
    for name in ("train", "validation"):
        split: Split = getattr(dataset, name)
        chosen = split.chosen([index for index, example in enumerate(split.names) if example in captions])
        if not len(chosen):
            message = f"of {len(split)} {name} examples not one has a caption"
            raise ValueError(f"{message}: {reason}" if reason else message)
        parts[name] = replace(chosen, captions=tuple(captions[example] for example in chosen.names))
    pairs = ([name, captions[name]] for split in parts.values() for name in split.names)
    return replace(dataset, fingerprint=digest_of(chain([dataset.fingerprint], pairs)), **parts)


def attached(
    dataset: Dataset,
    find: Callable[[Sequence[str]], Found],
    on_unreadable: Literal["skip", "refuse"] = "skip",
) -> Dataset:
    """`captioned` by what is found for the names of all examples.

    What cannot be used is named and counted in a warning, or with "refuse" in a `ValueError`; examples that merely lack
    a caption are counted in the warning.
    """
    names = [*dataset.train.names, *dataset.validation.names]
    found, said = find(names), []
    if found.bad:
        message = f"{len(found.bad)} of {found.total} {found.where} cannot be used: {first_named(found.bad)}"
        if on_unreadable == "refuse":
            raise ValueError(f"{message}. Repair or remove them, or leave them out with --data.on-unreadable skip")
        said.append(message)
    without = len(names) - len(found.captions)
    if without and found.lacking:
        said.append(f"{without} of {len(names)} images have no {found.lacking}")
    with_captions = captioned(dataset, found.captions, reason=". ".join(said))
    if said:
        warnings.warn(f"{'. '.join(said)}. They are left out", stacklevel=3)
    return with_captions


def kinds(source: str, split: Split) -> tuple[str, ...]:
    """What each example shows, as far as a retrieval score is concerned: two of one kind are equally right.

    Of `--data.source openmoji` it is the family, of any other the caption itself: a `ValueError` if it has none.
    """
    if source == "openmoji":
        return tuple(map(family, split.names))
    if split.captions is None:
        raise ValueError(f"the data of --data.source {source} has no captions: add --data.captions")
    return split.captions
