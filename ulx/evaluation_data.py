"""Which examples an evaluation is on, what the models are told of them, and what else its results follow from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8

import ulx
from ulx.config import Config, EvaluateConfig
from ulx.data.source import Dataset, Split
from ulx.denoiser import Denoiser
from ulx.latents import weights_hash
from ulx.metrics.copies import spread_over
from ulx.models import UnifiedLatents
from ulx.nn.conditions import ConditionSpec
from ulx.rows import Store
from ulx.runner import Told
from ulx.text.encoders import TextEncoder
from ulx.text.examples import Prompts

__all__ = ["evaluation_facts", "examples", "held_out_examples", "held_out_rows", "mean_image", "rows_like", "told_of"]

ELSEWHERE = ("name", "runs", "resume")
"""Settings that say where a run lies."""
MEASURES = ("inception_weights", "inception_resize", "lpips", "clip_weights")
"""Those that ask for more numbers of the same images."""

READ = 64
"""Examples that are read before they are kept."""
AVERAGED = 8192
"""Training images of which the mean is taken; of a larger set, so many spread over it."""

Images = UInt8[np.ndarray, "..."]
"""Images `n h w c`, or clips `n t h w c`."""


def held_out_rows(dataset: Dataset, options: EvaluateConfig) -> list[int]:
    """Which held-out examples are measured on: all of them, or as many as are asked for."""
    return spread_over(len(dataset.validation), options.held_out or len(dataset.validation))


def held_out_examples(
    dataset: Dataset, options: EvaluateConfig, store: Store = Store()
) -> tuple[Images, Int32[np.ndarray, " n"]]:
    """Those held-out images, which the store keeps, and their labels."""
    held_out, rows = dataset.validation, held_out_rows(dataset, options)
    return examples(held_out, rows, store, name="held-out"), held_out.labels[rows]


def examples(
    split: Split,
    rows: Sequence[int] | Int[np.ndarray, " m"],
    store: Store = Store(),
    *,
    name: str | None = None,
) -> Images:
    """Those images, or clips, kept in the store under the name."""
    into = store.rows(name, len(rows))
    for begin in range(into.done, len(rows), READ):
        into.append([np.stack([split[int(row)]["image"] for row in rows[begin : begin + READ]])])
    return into.leaves()[0]


def mean_image(dataset: Dataset) -> UInt8[np.ndarray, "..."]:
    """Of the training images, or clips, rounded."""
    rows = spread_over(len(dataset.train), AVERAGED)
    total = np.zeros(dataset.train[0]["image"].shape)
    for i in rows:
        total += dataset.train[i]["image"]
    return (total / len(rows)).round().astype(np.uint8)


def rows_like(split: Split, count: int, seed: int) -> Int[np.ndarray, " m"]:
    """Examples drawn anew, so that classes and captions are as frequent among them as in the split."""
    return np.random.default_rng(seed).choice(len(split), count)


def told_of(
    split: Split, rows: Sequence[int] | Int[np.ndarray, " m"], spec: ConditionSpec, text: TextEncoder | None
) -> Told:
    """What a model of that spec is told of those examples."""
    captions = None
    if spec.text_channels and text is not None and split.captions is not None:
        captions = Prompts(text, [split.captions[row] for row in rows])
    return Told(split.labels[np.asarray(rows)] if spec.num_classes else None, captions)


def evaluation_facts(
    model: UnifiedLatents, base: Denoiser, dataset: Dataset, config: Config, text: TextEncoder | None = None
) -> dict[str, Any]:
    """What the images, latents and rates of an evaluation follow from: with the same facts they are the same."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ELSEWHERE}
    settings["evaluate"] = {name: value for name, value in settings["evaluate"].items() if name not in MEASURES}
    code, root = hashlib.sha256(), Path(ulx.__file__).parent
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return {
        "weights": weights_hash((model, base)),
        "data": dataset.fingerprint,
        "text": None if text is None else text.definition,
        "config": settings,
        "code": code.hexdigest(),
    }
