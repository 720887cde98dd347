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
from ulx.metrics import retrieval
from ulx.metrics.copies import spread_over
from ulx.metrics.entries import Metric, frechet
from ulx.metrics.features import FeatureNetwork, features
from ulx.metrics.frechet import Moments
from ulx.models import UnifiedLatents
from ulx.progress import Progress
from ulx.runner import Runner, Told
from ulx.text.encoders import TextEncoder
from ulx.text.examples import Prompts

__all__ = ["DEFINITIONS", "Asked", "prompted"]

AMONG = 50_000
"""Training images among which the nearest one is sought; in a larger set, that many spread over it."""
SHOWN, EACH = 16, 3
"""Prompts of each kind on the report, and samples of each."""
GUIDED = "guided prompts"
"""The purpose of the noise of what is not sampled for a distance."""

TRAINING = "training images"
DEFINITIONS = {
    retrieval.METRIC: retrieval.DEFINITION,
    "shuffled_prompts": "the retrieval score that is expected of the same images with their prompts shuffled",
    "ceilings": "the retrieval score of the prompts' own images, which do not find themselves, of those whose kind has "
    "others; and of their reconstructions, which may find their originals",
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


def prompted(
    model: UnifiedLatents,
    base: Denoiser,
    dataset: Dataset,
    text: TextEncoder,
    asked: Asked,
    network: FeatureNetwork,
    config: Config,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Numbers and pictures, for a metrics.json and a report.

    `alignment` holds, for each guidance scale, the retrieval score and the distance to the training images; the score
    of the prompts' own images (which do not find themselves), and of their reconstructions (which may find their
    originals), as ceilings; and what shuffled prompts would give. `held_out_prompts` are captions of images that the
    model never saw, guided, whose images are sought among all.
    """
    options, train, held_out = config.evaluate, dataset.train, dataset.validation
    scales = options.guidance_sweep if config.label_dropout > 0 else (1.0,)
    guidance = jnp.asarray(config.sample.guidance_scale) if config.can_guide else 1.0
    count, held = len(asked.rows), spread_over(len(held_out), options.num_samples)
    held_prompts = _prompts(text, held_out, held)
    shown = {
        "training": (train, spread_over(len(train), SHOWN)),
        "held_out": (held_out, spread_over(len(held_out), SHOWN)),
    }
    own = [*options.prompts]
    grid = [split.captions[row] for split, rows in shown.values() for row in rows if split.captions] + own
    originals = _images(train, asked.rows)
    total = count * (2 + sum(scale != 1 for scale in scales)) + len(held) + EACH * len(grid)
    with Progress("prompts", total=total, unit="images") as progress:
        run = Runner(model, config, progress)
        samples = {1.0: asked.samples} | {
            scale: run.sample(base, count, asked.purpose, asked.told, guidance=jnp.asarray(scale))[0]
            for scale in scales
            if scale != 1
        }
        of_held_out, nfe = run.sample(base, len(held), GUIDED, Told(captions=held_prompts), guidance=guidance)
        repeated = Prompts(text, [caption for caption in grid for _ in range(EACH)])
        pictures, _ = run.sample(base, len(repeated), GUIDED, Told(captions=repeated), guidance=guidance)
        reconstructions, _ = run.decode(run.encode(originals), GUIDED)

    among = spread_over(len(train), AMONG)
    of_train = kinds(config.data.source, train)
    of_held = kinds(config.data.source, held_out)
    references = features(
        network, (train[i]["image"][None] for i in among), total=len(among), description="features of training images"
    )
    seen = lambda images, what: features(network, images, description=f"features: {what}")  # noqa: E731
    among_kinds = [of_train[i] for i in among]
    wanted = [of_train[i] for i in asked.rows]
    trained = Moments.of(references)

    def measured(images: Images, what: str) -> dict[str, Metric]:
        found = seen(images, what)
        by_kind = retrieval.kinds_found(found, references, among_kinds)
        scores = {
            retrieval.METRIC: retrieval.score(by_kind, wanted) | {"n_reference": len(among)},
            "shuffled_prompts": retrieval.chance(by_kind, wanted),
            network.metric: frechet(found, trained),
        }
        return {name: metric | {"against": TRAINING} for name, metric in scores.items()}

    alignment = {
        "by_guidance": {f"{scale:g}": measured(samples[scale], f"guidance {scale:g}") for scale in sorted(samples)},
        "ceilings": {
            "real_images": _leave_one_out(
                seen(originals, "real images"), asked.rows, wanted, references, among, of_train
            ),
            "reconstructions": measured(reconstructions, "reconstructions")[retrieval.METRIC],
        },
    }
    everything = np.concatenate([references, seen(_images(held_out, range(len(held_out))), "held-out images")])
    found = retrieval.kinds_found(seen(of_held_out, "held-out prompts"), everything, [*among_kinds, *of_held])
    asked_for = [of_held[i] for i in held]
    metrics = {
        "alignment": alignment,
        "held_out_prompts": {
            retrieval.METRIC: retrieval.score(found, asked_for) | {"n_reference": len(everything)},
            "shuffled_prompts": retrieval.chance(found, asked_for),
            "guidance_scale": float(guidance),
            "nfe": nfe,
        },
    }
    tiles = pictures.reshape(len(grid), EACH, *pictures.shape[1:])
    split_at = np.cumsum([len(rows) for _, rows in shown.values()])
    shown_pictures: dict[str, np.ndarray] = {}
    for (name, (split, rows)), samples_of in zip(shown.items(), np.split(tiles, split_at), strict=False):
        shown_pictures[f"{name}_prompts"] = np.array([split.captions[row] for row in rows] if split.captions else [])
        shown_pictures[f"{name}_prompts_real"] = _images(split, rows)
        shown_pictures[f"{name}_prompts_samples"] = samples_of
    if own:
        shown_pictures |= {"own_prompts": np.array(own), "own_prompts_samples": tiles[split_at[-1] :]}
    return metrics, shown_pictures


def _leave_one_out(
    found: Float[np.ndarray, "n d"],
    rows: Int[np.ndarray, " n"],
    wanted: Sequence[str],
    references: Float[np.ndarray, "m d"],
    among: Sequence[int],
    of_train: Sequence[str],
) -> Metric:
    """The score of the prompts' own images when they do not count, of those whose kind has others."""
    place = {row: index for index, row in enumerate(among)}
    count = Counter(of_train[i] for i in among)
    kept = [i for i, row in enumerate(rows) if row in place and count[wanted[i]] > 1]
    if not kept:
        return {"value": float("nan"), "n": 0}
    itself = np.array([place[rows[i]] for i in kept])
    kinds_of = [of_train[i] for i in among]
    return retrieval.score(retrieval.kinds_found(found[kept], references, kinds_of, itself), [wanted[i] for i in kept])


def _prompts(text: TextEncoder, split: Split, rows: Sequence[int]) -> Prompts:
    assert split.captions is not None, "a run with captions has some"
    return Prompts(text, [split.captions[row] for row in rows])


def _images(split: Split, rows: Sequence[int] | Int[np.ndarray, " n"] | range) -> Images:
    return np.stack([split[int(row)]["image"] for row in rows])
