"""Captions where a run wants them: as fields of examples to train on, and as rows of images to be made.

Every caption of a data set is embedded once, into a file in the run's folder (`embedded`), and read from there. Prompts
that are no caption of it need the encoder itself (`open_encoder`, `Remembered`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ulx.data.source import Dataset, Example, Source, drawn
from ulx.nn.conditions import Text
from ulx.text import bert
from ulx.text.encoders import Embedded, MiniLM, TextEncoder
from ulx.text.precomputed import Precomputed, cached
from ulx.text.wordpiece import readable

__all__ = [
    "Prompts",
    "Remembered",
    "TextConfig",
    "WithText",
    "captions_of",
    "channels_of",
    "check_prompts",
    "embedded",
    "open_encoder",
    "with_text",
]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    encoder: str = "minilm"
    """What embeds captions: minilm, the packaged sentence encoder, or a safetensors file with any other encoder's
    embeddings of them (`ulx.text.precomputed` says how to write one)."""
    length: int = 32
    """Tokens of a caption: longer ones are cut off."""

    def __post_init__(self):
        if self.length < 3:
            raise ValueError(f"length must be at least 3, a token between its two marks, got {self.length}")
        if self.encoder != "minilm" and not self.encoder.endswith(".safetensors"):
            raise ValueError(f"encoder is minilm or the path of a .safetensors file, got {self.encoder!r}")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ValueError for one without a word: it is no caption, and not what a model was trained on without one."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"a prompt is empty: {list(prompts)}; to sample without a caption, give none")


def open_encoder(config: TextConfig) -> TextEncoder:
    """Raises as `MiniLM` and `Precomputed` do."""
    if config.encoder == "minilm":
        return MiniLM(config.length)
    return Precomputed(Path(config.encoder), config.length)


def channels_of(config: TextConfig) -> int:
    """Numbers of a token's embedding; MiniLM is not opened for it."""
    return bert.CHANNELS if config.encoder == "minilm" else open_encoder(config).channels


def captions_of(dataset: Dataset) -> set[str]:
    """All captions of a data set. Raises ValueError for one without."""
    if dataset.train.captions is None or dataset.validation.captions is None:
        raise ValueError(f"{dataset.name} has no captions to embed")
    return {*dataset.train.captions, *dataset.validation.captions}


def embedded(dataset: Dataset, encoder: TextEncoder, folder: Path) -> Precomputed:
    """The embeddings of all captions of a data set: those of a file, where the encoder is one, or made once and kept in
    `folder`.

    Raises ValueError for a data set without captions, or a file that lacks one, and as `precomputed.cached` does.
    """
    captions = captions_of(dataset)
    if isinstance(encoder, Precomputed):
        encoder.require(captions)
        return encoder
    return cached(encoder, captions, folder)


class Remembered:
    """A text encoder that looks captions up in a file, and embeds those that are not there."""

    def __init__(self, file: Precomputed, encoder: TextEncoder):
        self.file, self.encoder = file, encoder
        self.length, self.channels, self.definition = encoder.length, encoder.channels, encoder.definition

    def __call__(self, captions: Sequence[str]) -> Embedded:
        if all(readable(caption) in self.file.captions for caption in captions):
            return self.file(captions)
        return self.encoder(captions)


class Prompts:
    """Captions that are embedded when rows of them are asked for: `prompts[rows]` is their `Text`."""

    def __init__(self, encoder: TextEncoder, captions: Sequence[str]):
        self.encoder, self.captions = encoder, tuple(captions)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: slice | Int[np.ndarray, " m"]) -> "Text | Prompts":
        if isinstance(rows, slice):
            return Prompts(self.encoder, self.captions[rows])
        tokens, mask = self.encoder([self.captions[row] for row in rows])
        return Text(jnp.asarray(tokens), jnp.asarray(mask))


class WithText:
    """A source whose examples have their captions' embeddings too: `text`, float32 `n c`, and `text_mask`, bool `n`."""

    def __init__(self, source: Source, captions: Sequence[str], path: Path, length: int):
        self.source, self.captions, self.path, self.length = source, tuple(captions), path, length
        self._embeddings: Precomputed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_embeddings": None}  # an open file goes to no loader's worker: each opens its own

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.source[index] | self._text(index)

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        return drawn(self.source, index, rng) | self._text(index)

    def _text(self, index: int) -> Example:
        if self._embeddings is None:
            self._embeddings = Precomputed(self.path, self.length)
        tokens, mask = self._embeddings([self.captions[index]])
        return {"text": tokens[0], "text_mask": mask[0]}


def with_text(dataset: Dataset, text: Precomputed | None) -> Dataset:
    """A captioned data set whose training examples hold their captions' embeddings; as it is without `text`."""
    train = dataset.train
    if text is None or train.captions is None:
        return dataset
    source = WithText(train.source, train.captions, text.path, text.length)
    return dataclasses.replace(dataset, train=dataclasses.replace(train, source=source))
