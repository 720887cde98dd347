"""Whether the images of a run with captions show what they were asked for, and what guidance buys and costs.

Prompts are captions of training images, as frequent as there, so that the samples without guidance are those whose
distance `ulx.evaluation` reports. The same prompts and the same noise are sampled at every guidance scale.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from ulx.config import Config
from ulx.data.captions import kinds
from ulx.data.source import Dataset, Split
from ulx.denoiser import Denoiser
from ulx.evaluation_data import examples
from ulx.metrics import clip_score, retrieval
from ulx.metrics.copies import NEAREST_AMONG, spread_over
from ulx.metrics.entries import Metric, frechet, mean
from ulx.metrics.features import FeatureNetwork, features
from ulx.metrics.frechet import Moments
from ulx.models import UnifiedLatents
from ulx.progress import Progress
from ulx.rows import Store
from ulx.runner import Runner, Told
from ulx.text.encoders import TextEncoder
from ulx.text.examples import Prompts

__all__ = ["DEFINITIONS", "Asked", "References", "leave_one_out", "prompted"]

SHOWN, EACH = 16, 3
"""Prompts of each kind on the report, and samples of each."""
CEILING = 2048
"""Of the prompts' own images, so many are measured."""
GUIDED = "guided prompts"
"""The purpose of the noise of what is not sampled for a distance."""

TRAINING = "training images"
DEFINITIONS = {
    retrieval.METRIC: retrieval.DEFINITION,
    "shuffled_prompts": "the retrieval score that is expected of the same images with their prompts shuffled",
    "ceilings": "the retrieval score of the prompts' own images, which do not find themselves, of those whose kind has "
    "others; and of their reconstructions, which may find their originals. With CLIP, its score of the prompts' own "
    "images",
}

Images = UInt8[np.ndarray, "n h w c"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Samples without guidance and the training examples whose captions were their prompts."""

    samples: Images
    rows: Int[np.ndarray, " n"]
    told: Told
    purpose: str
    """Of their noise."""


@dataclasses.dataclass(frozen=True)
class References:
    """Training images among which the nearest one to a sample is sought."""

    rows: list[int]
    kinds: list[str]
    features: Float[np.ndarray, "m d"]

    @classmethod
    def of(cls, dataset: Dataset, network: FeatureNetwork, config: Config, store: Store = Store()) -> "References":
        """All of them; of a large set, `NEAREST_AMONG` spread over it."""
        train = dataset.train
        rows, of_train = spread_over(len(train), NEAREST_AMONG), kinds(config.data.source, train)
        into = store.rows("features of training images", len(rows))
        images = (train[row]["image"][None] for row in rows[into.done :])
        found = features(network, images, total=len(rows), description="features of training images", into=into)
        return cls(rows, [of_train[row] for row in rows], found)


def prompted(
    model: UnifiedLatents,
    base: Denoiser,
    dataset: Dataset,
    text: TextEncoder,
    asked: Asked,
    network: FeatureNetwork,
    references: References,
    trained: Moments,
    config: Config,
    clip: clip_score.Clip | None = None,
    store: Store = Store(),
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Numbers and pictures, for a metrics.json and a report.

    `alignment` holds, for each guidance scale, the retrieval score, the distance to the training images, whose moments
    are `trained`, and with `clip` the CLIP score; what shuffled prompts would give; and as ceilings the scores of the
    prompts' own images (which do not find themselves; left out where no kind has two), and of their reconstructions
    (which may find their originals). `held_out_prompts` are captions of images that the model never saw, guided, whose
    images are sought among all.
    """
    train, held_out = dataset.train, dataset.validation
    options, guidance = config.evaluate, config.sample.guidance_scale if config.can_guide else 1.0
    scales = options.guidance_sweep if config.label_dropout > 0 else ()
    held = spread_over(len(held_out), options.num_samples)
    shown = {
        "training": (train, spread_over(len(train), SHOWN)),
        "held_out": (held_out, spread_over(len(held_out), SHOWN)),
    }
    own = list(options.prompts)
    grid = [caption for split, rows in shown.values() for caption in _captions(split, rows)] + own
    of_train, of_held = (kinds(config.data.source, split) for split in (train, held_out))
    wanted, captions = [of_train[row] for row in asked.rows], _captions(train, asked.rows)

    def seen(images: Images, what: str) -> Float[np.ndarray, "n d"]:
        into = store.rows(f"prompted features {what}", len(images))
        return features(network, images, description=f"features: {what}", into=into)

    def sampled(told: Told, count: int, scale: float, purpose: str, what: str) -> tuple[Images, int]:
        with Progress(f"sample: {what}", total=count, unit="images") as progress:
            # As an array, so that one program is compiled for all scales; 1 needs no guidance, and half of the calls.
            by = scale if scale == 1 else jnp.asarray(scale)
            run = Runner(model, config, progress, store)
            return run.sample(base, count, purpose, told, guidance=by, name=f"prompted {what}")

    def measured(images: Images, what: str) -> dict[str, Metric]:
        found = seen(images, what)
        by_kind = retrieval.kinds_found(found, references.features, references.kinds)
        scores = {
            retrieval.METRIC: retrieval.score(by_kind, wanted) | {"n_reference": len(references.rows)},
            "shuffled_prompts": retrieval.chance(by_kind, wanted),
            network.metric: frechet(found, trained),
        }
        if clip is not None:
            scores[clip.metric] = mean(clip_score.score(clip, images, captions))
        return {name: metric | {"against": TRAINING} for name, metric in scores.items()}

    by_guidance = {}
    for scale in sorted({1.0, *scales}):  # one at a time: there may be many images, and large ones
        what = f"guidance {scale:g}"
        images = asked.samples
        if scale != 1:
            images, _ = sampled(asked.told, len(asked.rows), scale, asked.purpose, what)
        by_guidance[f"{scale:g}"] = measured(images, what)

    some = asked.rows[:CEILING]
    originals = examples(train, some, store, name="prompted originals")
    with Progress("reconstruct", total=2 * len(some), unit="images") as progress:
        run = Runner(model, config, progress, store)
        told = Told(captions=Prompts(text, captions[:CEILING])) if config.model.decoder_text else Told()
        latents = run.encode(originals, name="prompted latents")
        reconstructions, _ = run.decode(latents, GUIDED, told, name="prompted reconstructions")
    by_kind = retrieval.kinds_found(seen(reconstructions, "reconstructions"), references.features, references.kinds)
    ceilings = leave_one_out(seen(originals, "real images"), some, wanted, references) | {
        "reconstructions": retrieval.score(by_kind, wanted[:CEILING]) | {"n_reference": len(references.rows)}
    }
    if clip is not None:
        ceilings["real_images_clip_score"] = mean(clip_score.score(clip, originals, captions[:CEILING]))
    ceilings = {name: metric | {"against": TRAINING} for name, metric in ceilings.items()}

    told = Told(captions=Prompts(text, _captions(held_out, held)))
    of_held_out, nfe = sampled(told, len(held), guidance, GUIDED, "held-out prompts")
    of_held_images = seen(examples(held_out, held, store, name="prompted held-out"), "held-out images")
    everything = np.concatenate([references.features, of_held_images])
    asked_for = [of_held[row] for row in held]
    by_kind = retrieval.kinds_found(seen(of_held_out, "held-out prompts"), everything, [*references.kinds, *asked_for])
    told = Told(captions=Prompts(text, [caption for caption in grid for _ in range(EACH)]))
    tiles, _ = sampled(told, EACH * len(grid), guidance, GUIDED, "prompts to show")
    metrics = {
        "alignment": {
            "by_guidance": by_guidance,
            "ceilings": ceilings,
        },
        "held_out_prompts": {
            retrieval.METRIC: retrieval.score(by_kind, asked_for) | {"n_reference": len(everything)},
            "shuffled_prompts": retrieval.chance(by_kind, asked_for),
            "guidance_scale": guidance,
            "nfe": nfe,
        },
    }
    tiles = tiles.reshape(len(grid), EACH, *tiles.shape[1:])
    pictures, begin = {}, 0
    for name, (split, rows) in shown.items():
        pictures |= {
            f"{name}_prompts": np.array(_captions(split, rows)),
            f"{name}_prompts_real": examples(split, rows),
            f"{name}_prompts_samples": tiles[begin : begin + len(rows)],
        }
        begin += len(rows)
    if own:
        pictures |= {"own_prompts": np.array(own), "own_prompts_samples": tiles[begin:]}
    return metrics, pictures


def leave_one_out(
    found: Float[np.ndarray, "n d"], rows: Int[np.ndarray, " n"], wanted: Sequence[str], references: References
) -> dict[str, Metric]:
    """The score of the prompts' own images when they do not count, of those whose kind has others; nothing where none
    has."""
    place, count = {row: index for index, row in enumerate(references.rows)}, Counter(references.kinds)
    kept = [i for i, row in enumerate(rows.tolist()) if row in place and count[wanted[i]] > 1]
    if not kept:
        return {}
    itself = np.array([place[rows[i]] for i in kept])
    by_kind = retrieval.kinds_found(found[kept], references.features, references.kinds, itself)
    score = retrieval.score(by_kind, [wanted[i] for i in kept])
    return {"real_images": score | {"n_reference": len(references.rows)}}


def _captions(split: Split, rows: Sequence[int] | Int[np.ndarray, " n"]) -> list[str]:
    assert split.captions is not None, "a run with captions has some"
    return [split.captions[row] for row in rows]
