"""Token embeddings in a file: any encoder's, made anywhere (T5's, say), or those of captions embedded here once.

A safetensors file with one array `n c` for each caption, the embeddings of its tokens, under the caption itself:

```python
save_file({caption: t5(caption) for caption in captions}, "t5.safetensors")  # safetensors.torch, or .numpy
```

Arrays are of one width and any number of tokens, which are padded or cut off when read; float32, or what becomes so.
Only what is asked for is read, so that the file may be larger than memory.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from ulx.aside import write_aside
from ulx.data.extras import optional
from ulx.processes import in_turn
from ulx.progress import Progress
from ulx.text.encoders import Embedded, TextEncoder
from ulx.text.wordpiece import readable

__all__ = ["Precomputed", "cached", "embed", "write"]

FORMAT = 1
KEY = "ulx"
BATCH = 64


class Precomputed:
    """A text encoder that knows the captions of a file. `length` is by default that of the longest.

    Raises FileNotFoundError, ModuleNotFoundError without safetensors, and ValueError, naming the file and what is
    wrong with it.
    """

    def __init__(self, path: Path, length: int | None = None):
        safetensors = optional("safetensors", extra="text")
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        try:
            self._file = safetensors.safe_open(path, framework="np")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file, or is damaged ({error})") from error
        self.path = path
        shapes = {caption: self._file.get_slice(caption).get_shape() for caption in self._file.keys()}  # noqa: SIM118
        if not shapes:
            raise ValueError(f"{path} has no embeddings")
        self.captions = frozenset(shapes)
        self.channels = _width(path, shapes)
        self.length = length or max(shape[0] for shape in shapes.values())

    @property
    def definition(self) -> str:
        """What the file was written by, or else its sha256."""
        if KEY in self._metadata:
            return json.loads(self._metadata[KEY])["definition"]
        return f"file {self._sha256}"

    @cached_property
    def _sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __call__(self, captions: Sequence[str]) -> Embedded:
        """Raises ValueError, naming the file and the caption, for one that it lacks or that has no finite numbers."""
        captions = [readable(caption) for caption in captions]
        self.require(captions)
        tokens = np.zeros((len(captions), self.length, self.channels), np.float32)
        mask = np.zeros(tokens.shape[:2], bool)
        for row, caption in enumerate(captions):
            found = self[caption][: self.length]
            tokens[row, : len(found)], mask[row, : len(found)] = found, True
        return tokens, mask

    def require(self, captions: Iterable[str]) -> None:
        """Raises ValueError, naming the file and the first of them, for captions that it lacks."""
        missing = [caption for caption in dict.fromkeys(map(readable, captions)) if caption not in self.captions]
        if missing:
            more = f" and of {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(f"{self.path} has no embedding of the caption {_short(missing[0])}{more}")

    def __getitem__(self, caption: str) -> Float32[np.ndarray, "n c"]:
        found = self._file.get_tensor(caption)
        if not np.issubdtype(found.dtype, np.floating) and found.dtype.name != "bfloat16":
            raise ValueError(f"{self.path}: the embedding of {_short(caption)} is {found.dtype}, not of real numbers")
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite below
            found = found.astype(np.float32)
        if not np.isfinite(found).all():
            raise ValueError(f"{self.path}: the embedding of {_short(caption)} is not finite")
        return found

    @property
    def _metadata(self) -> dict[str, str]:
        return self._file.metadata() or {}

    def check(self) -> None:
        """Read all of a file of `write` and compare with its sha256. Raises ValueError if it is another."""
        said = json.loads(self._metadata.get(KEY, "{}"))
        content = _content((caption, self[caption]) for caption in self.captions)
        if said.get("format") != FORMAT or said.get("sha256") != content:
            raise ValueError(f"{self.path} is damaged: it does not hold what was written")


def write(path: Path, embeddings: Mapping[str, Float32[np.ndarray, "_ c"]], definition: str) -> None:
    """Write a file for `Precomputed`, aside first. `definition` says what encoder they are of.

    Raises ValueError for an embedding that is not finite, OSError if the file cannot be written.
    """
    for caption, array in embeddings.items():
        if not np.isfinite(array).all():
            raise ValueError(f"the embedding of {_short(caption)} is not finite ({definition})")
    safetensors = optional("safetensors", extra="text")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"format": FORMAT, "definition": definition, "sha256": _content(embeddings.items())}
    arrays = {caption: np.ascontiguousarray(array) for caption, array in embeddings.items()}
    try:
        with write_aside(path) as aside:
            optional("safetensors.numpy", extra="text").save_file(arrays, aside, metadata={KEY: json.dumps(facts)})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def embed(
    encoder: TextEncoder, captions: Iterable[str], batch_size: int = BATCH
) -> dict[str, Float32[np.ndarray, "_ c"]]:
    """The embeddings of the tokens of each distinct caption, without padding, in batches. They are held in memory."""
    # Captions of like length meet, so that little padding is computed.
    distinct = sorted({readable(caption) for caption in captions}, key=lambda caption: (len(caption), caption))
    found: dict[str, np.ndarray] = {}
    with Progress("embed captions", total=len(distinct), unit="captions") as progress:
        for begin in range(0, len(distinct), batch_size):
            some = distinct[begin : begin + batch_size]
            # The last batch is filled up, so that no shape is compiled for it.
            tokens, mask = encoder(some + some[-1:] * (batch_size - len(some)))
            for caption, row, kept in zip(some, tokens, mask, strict=False):
                found[caption] = row[kept]
            progress.advance(len(some))
    return found


def cached(encoder: TextEncoder, captions: Iterable[str], folder: Path, batch_size: int = BATCH) -> Precomputed:
    """The same, kept in a file of the folder that is named by the encoder and the captions, and made once.

    A damaged file is named in a warning and made anew. Of several processes the first makes it. Raises OSError if it
    cannot be written, and whatever the encoder raises.
    """
    distinct = sorted({readable(caption) for caption in captions})
    key = hashlib.sha256(json.dumps([FORMAT, encoder.definition, encoder.length, distinct]).encode()).hexdigest()
    path = folder / f"text-{key[:16]}.safetensors"

    def kept() -> Precomputed:
        found = Precomputed(path, encoder.length)
        found.check()
        return found

    def work() -> Precomputed:
        with contextlib.suppress(FileNotFoundError):
            try:
                return kept()
            except ValueError as error:
                warnings.warn(f"{error}: making it anew", stacklevel=3)
        write(path, embed(encoder, distinct, batch_size), encoder.definition)
        return Precomputed(path, encoder.length)

    return in_turn(work)


def _width(path: Path, shapes: Mapping[str, list[int]]) -> int:
    """The one width of all arrays."""
    width = next(iter(shapes.values()))[-1:]
    for caption, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{path}: the embedding of {_short(caption)} has shape {shape}, not tokens × channels")
        if shape[1:] != width:
            raise ValueError(f"{path}: the embedding of {_short(caption)} is {shape[1]} wide, others are {width[0]}")
    return width[0]


def _content(embeddings: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for caption, array in sorted(embeddings):
        digest.update(f"{json.dumps(caption)} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else f"{caption[:56]} ...")
