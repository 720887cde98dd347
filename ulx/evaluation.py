"""Measuring a trained model on images it never saw: bits, reconstructions, samples, distances, copies.

Everything uses the averaged (EMA) weights and is written to the run's `evaluation/` folder: `pictures.npz` for the
report, and `metrics.json`, a card. Each number stands there beside its N, standard error and NFE; what it means, by
which network, against which images, and from which code and seed, is said once for all of them.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

import ulx
from ulx import losses
from ulx.aside import write_aside
from ulx.bound import DiffusionEstimate, RateEstimate
from ulx.config import Config, SampleConfig
from ulx.data.source import Dataset
from ulx.data.split import LEAST
from ulx.decoders import Decoder, DiffusionDecoder, RegressionDecoder
from ulx.denoiser import Denoiser
from ulx.evaluation_data import held_out_examples, held_out_rows, mean_image, rows_like, told_of
from ulx.evaluation_pairs import NEXT, continuation, errors, mean_psnr, swap
from ulx.metrics import clip_score, compare, efficientnet, i3d, inception, lpips
from ulx.metrics.copies import copies_among, spread_over
from ulx.metrics.entries import Metric, as_json, frechet, mean
from ulx.metrics.features import FeatureNetwork, features
from ulx.metrics.frechet import Moments
from ulx.metrics.pairs import SSIM
from ulx.metrics.reference import training_moments
from ulx.models import UnifiedLatents
from ulx.progress import Progress
from ulx.prompted import DEFINITIONS as DEFINITIONS_OF_PROMPTS
from ulx.prompted import Asked, References, prompted
from ulx.rows import Store
from ulx.runner import FLOW_PROBES, Runner, Told
from ulx.seeding import root_int
from ulx.text.encoders import TextEncoder
from ulx.typing import PerExample

__all__ = [
    "RECONSTRUCT",
    "SAMPLE",
    "Evaluation",
    "check_measurable",
    "evaluate",
    "evaluate_autoencoder",
    "networks",
]

RECONSTRUCT, SAMPLE = "reconstruct", "sample"
"""Purposes of noise. Reconstructions, swapped or not, share theirs; so do the samples of all models, row by row."""
PICTURES = 64
"""Images of each kind that the report shows."""

TRAINING, HELD_OUT = "training images", "held-out images"
"""What numbers are measured against; all others than distances are measured on held-out images."""
DEFINITIONS = {
    "bits_per_pixel": "the prior's bound L_z on KL[q(z_0|x) ‖ p(z_0)] with w = 1: its diffusion loss, the terminal KL "
    "and the encoder's term, over {pixels} · ln 2; mean over images",
    "bits_per_latent_dim": "the same per dimension of the latent",
    "bits_per_pixel_base": "the same bound with the base model in the prior's place",
    "decoder_bits_per_pixel": "L_x with w = 1, over {pixels} · ln 2; mean over images",
    "psnr": "10 log10(255²/MSE) in dB of each reconstruction, mean over images; of equal ones it is infinite: they are "
    "left out and counted",
    "ssim": f"structural similarity of each reconstruction, mean over images: {SSIM}",
    lpips.METRIC: f"distance of each reconstruction in VGG16's activations, mean over images ({lpips.DEFINITION})",
    "psnr_of_mean_training_image": "10 log10(255²/MSE) in dB of the mean training image, mean over images",
    "swap": "PSNR in dB of decodings of another image's latent with this one's noise, mean over pairs",
    "continuation": "PSNR in dB of the {next} frames after the given ones, mean over clips: the base model's; the "
    "last given one repeated; the difference",
    "flow": "−h(q) − log p(z_0) by the prior's probability flow, over {pixels} · ln 2; mean over images",
}

Images = UInt8[np.ndarray, "..."]
"""Images `n h w c`, or clips `n t h w c`."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, Any]
    """Numbers with their N, standard error, NFE and so on, as JSON values."""
    pictures: dict[str, np.ndarray]
    """Images (uint8) and labels for the report."""

    def save(self, directory: Path) -> None:
        """Writes `metrics.json` and `pictures.npz`, each aside first and renamed when whole."""
        directory.mkdir(parents=True, exist_ok=True)
        with write_aside(directory / "pictures.npz") as aside, aside.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.pictures)
        with write_aside(directory / "metrics.json") as aside:
            aside.write_text(as_json(self.metrics), "utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Evaluation":
        """Raises FileNotFoundError where no evaluation was saved."""
        if not (directory / "metrics.json").exists():
            raise FileNotFoundError(f"{directory} holds no evaluation; run `python -m ulx.evaluate RUN`")
        with np.load(directory / "pictures.npz", allow_pickle=False) as pictures:
            return cls(json.loads((directory / "metrics.json").read_text("utf-8")), dict(pictures))


def evaluate_autoencoder(model: UnifiedLatents, dataset: Dataset, config: Config) -> dict[str, Any]:
    """Bits and PSNR on the held-out images: what stage 1 alone answers for."""
    held_out, _ = held_out_examples(dataset, config.evaluate)
    with Progress("evaluate", total=3 * len(held_out), unit=config.data.unit) as progress:
        run = Runner(model, config, progress)
        rate = run.rate(held_out, model.prior)
        reconstructions, nfe = run.decode(run.encode(held_out), RECONSTRUCT)
    return {**_bits(rate, model), "psnr": mean_psnr(reconstructions, held_out) | {"nfe": nfe}}


def check_measurable(config: Config) -> None:
    """Raises ValueError for a run that would be trained to its end and could not be measured then, as it is asked."""
    options = config.evaluate
    if options.inception_resize != inception.RESIZE:
        inception.check_resize(options.inception_resize, options.inception_weights)
    if config.data.clips and config.data.frames < i3d.MIN_FRAMES:
        raise ValueError(
            f"clips of {config.data.frames} frames (--data.frames) cannot be evaluated: FVD's I3D takes at least "
            f"{i3d.MIN_FRAMES}"
        )
    for name in ("num_samples", "held_out"):
        if (count := getattr(config.evaluate, name)) is not None and count < LEAST:
            raise ValueError(f"--evaluate.{name.replace('_', '-')} {count}: distances need at least {LEAST} examples")
    # What is measured without something is measured of a network that was trained without it now and then.
    frames = config.model.given_frames and config.model.latent == "encoder"
    for name, is_there, what in (
        ("frames_dropout", frames, "bits and reconstructions are measured without given frames"),
        ("base_frames_dropout", config.model.given_frames, "the base model's bits are measured without given frames"),
        ("label_dropout", config.single_stage, "bits of a single stage are measured without classes and captions"),
    ):
        if is_there and getattr(config, name) == 0:
            raise ValueError(f"--{name.replace('_', '-')} 0: {what}, so it must be above 0")


def networks(config: Config) -> tuple[list[FeatureNetwork], lpips.LPIPS | None, clip_score.Clip | None]:
    """Those whose features are compared, of clips I3D, and LPIPS and CLIP if asked for.

    Raises FileNotFoundError, ModuleNotFoundError, ValueError for weights that are not there or not the right ones.
    """
    options = config.evaluate
    found: list[FeatureNetwork] = [i3d.load() if config.data.clips else efficientnet.load()]
    if options.inception_weights is not None:
        found.append(inception.load(options.inception_weights, options.inception_resize))
    clip = None if options.clip_weights is None else clip_score.load(options.clip_weights)
    return found, lpips.load() if options.lpips else None, clip


def evaluate(
    model: UnifiedLatents,
    base: Denoiser,
    dataset: Dataset,
    config: Config,
    text: TextEncoder | None = None,
    store: Store = Store(),
) -> Evaluation:
    """Evaluate a run. `model` and `base` hold the averaged weights; validation images are those of `dataset`, whose
    captions, and the prompts of the configuration, `text` embeds. What was made is kept in the store, in memory if it
    has no folder.

    Raises as `networks` does.
    """
    compared, of_pairs, clip = networks(config)
    held_out, _ = held_out_examples(dataset, config.evaluate, store)
    made = _Made.by(model, base, dataset, held_out, config, text, store)
    sampled, network = config.sample, compared[0]
    of_decoder = _decoder_sampler(model.decoder, sampled)
    words = {
        "pixels": "frames · height · width" if config.data.clips else "height · width",
        "next": min(NEXT, config.data.frames - made.given),
    }
    references = None
    if made.base_told.captions is not None:
        references = References.of(dataset, network, config, store)
    known = {} if references is None else {network.metric: references.features}
    metrics: dict[str, Any] = {
        "held_out": {"n": len(held_out), "data": dataset.name, "split": "validation"},
        "weights": "EMA",
        **_bits(made.rate, model),
        "bits_per_pixel_base": _bits_per_pixel(made.base_rate.rate, made.base_rate.diffusion, model)
        | {"labels": "the images' own" if made.is_told else "none: without class and caption"},
        "decoder_bits_per_pixel": _bits_per_pixel(made.decoder.total, made.decoder, model)
        | {"leaves_out": "x's terminal KL and -log p(x | x_0)"},
        **errors(made.reconstructions, held_out, of_pairs),
        "psnr_of_mean_training_image": mean_psnr(np.broadcast_to(mean_image(dataset), held_out.shape), held_out),
        "swap": swap(made.swapped, held_out),
        **_distances(
            compared,
            {
                "base": (made.base_samples, made.base_nfe),
                "prior": (made.prior_samples, made.prior_nfe),
                "reconstruction": (made.reconstructions, made.decoder_nfe),
            },
            held_out,
            {"reconstruction", *(["base"] if made.given else [])},
            None
            if config.data.clips
            else lambda by: training_moments(dataset, by, config.data.cache_dir, found=known.get(by.metric)),
            config.data.unit,
            store,
        ),
        "sampler": {
            "latent": sampled.solver,
            "latent_steps": sampled.num_steps,
            "latent_churn": sampled.churn,
            "latent_tolerance": sampled.tolerance,
            "latent_inverse_rho": sampled.inverse_rho,
            **of_decoder,
            "decoder_nfe": made.decoder_nfe,
            "guidance_scale": config.evaluate.guidance_scale,
            "guidance_interval": None if config.evaluate.guidance_scale == 1 else sampled.guidance_interval,
            "labels": "the held-out clips' own" if made.given else "as frequent as in the training set",
        },
        "definitions": {name: {"definition": text.format(**words)} for name, text in DEFINITIONS.items()}
        | {name: entry for network in compared for name, entry in compare.definitions(network).items()},
        "references": {
            what: {"data": dataset.name, "split": split, "n": count, "fingerprint": dataset.fingerprint}
            for what, split, count in (
                (TRAINING, "train", len(dataset.train)),
                (HELD_OUT, "validation", len(held_out)),
            )
        },
        "provenance": {"seed": config.seed, "dtype": "float32", "ulx": ulx.__version__, "commit": compare.commit()},
    }
    metrics["psnr"] |= {"nfe": made.decoder_nfe, "solver": of_decoder["decoder"]}
    if len(made.flow):
        pixels = int(np.prod(model.shape[:-1]))
        bits = lambda nats: mean(losses.bits_per_pixel(jnp.asarray(nats), num_pixels=pixels))  # noqa: E731
        metrics["flow"] = {
            "bits_per_pixel": bits(made.flow) | {"probes": FLOW_PROBES, "solver_steps": made.flow_steps},
            "bound_less_flow": bits(np.asarray(made.rate.rate)[made.flow_of] - made.flow),
        }
    pictures = {
        "originals": np.array(held_out[:PICTURES]),
        "reconstructions": np.array(made.reconstructions[:PICTURES]),
        "swapped": made.swapped,
        "prior_samples": np.array(made.prior_samples[:PICTURES]),
        "base_samples": np.array(made.base_samples[:PICTURES]),
        **_said("base", made.base_told),
    }
    if made.given:
        metrics["continuation"] = continuation(made.base_samples, held_out, made.given)
    if config.data.clips:
        metrics["clip"] = {"frames": config.data.frames, "stride": config.data.stride, "given": made.given}
    else:
        metrics["copies"], nearest = copies_among(
            dataset.train, made.base_samples, held_out, made.train_originals, made.train_reconstructions
        )
        pictures["nearest"] = np.stack([dataset.train[int(i)]["image"] for i in nearest[:PICTURES]])
    if made.guided is not None:
        images, told, nfe = made.guided
        pictures |= {"guided_samples": images, **_said("guided", told)}
        metrics["guided_samples"] = {
            "nfe": nfe,
            "guidance_scale": sampled.guidance_scale,
            "guidance_interval": sampled.guidance_interval,
        }
    if references is not None and text is not None:
        asked = Asked(made.base_samples, made.base_rows, made.base_told, SAMPLE)
        trained = training_moments(dataset, network, config.data.cache_dir)
        numbers, images = prompted(model, base, dataset, text, asked, network, references, trained, config, clip, store)
        metrics, pictures = metrics | numbers, pictures | images
        metrics["definitions"] |= {} if clip is None else clip_score.definitions(clip)
        of_network = {"network": {"definition": network.definition, "sha256": network.sha256}}
        metrics["definitions"] |= {
            name: {"definition": words} | of_network for name, words in DEFINITIONS_OF_PROMPTS.items()
        }
    return Evaluation(metrics, pictures)


def _decoder_sampler(decoder: Decoder, config: SampleConfig) -> dict[str, Any]:
    """How images come from latents: by a solver, or without one."""
    if not isinstance(decoder, DiffusionDecoder):
        return {"decoder": "one call" if isinstance(decoder, RegressionDecoder) else "the latents are the pixels"}
    return {
        "decoder": config.decoder_solver,
        "decoder_steps": config.decoder_num_steps,
        "decoder_churn": config.decoder_churn,
        "decoder_tolerance": config.decoder_tolerance,
        "decoder_inverse_rho": config.decoder_inverse_rho,
    }


@dataclasses.dataclass(frozen=True)
class _Made:
    """What the model makes of held-out images, of noise, and of some training images."""

    rate: RateEstimate
    base_rate: RateEstimate
    is_told: bool
    """Whether the base model's rate was asked for with what the images are: one never without it in training."""
    decoder: DiffusionEstimate
    flow_of: list[int]
    flow: Float[np.ndarray, " f"]
    flow_steps: int
    reconstructions: Images
    swapped: Images
    decoder_nfe: int
    prior_samples: Images
    prior_nfe: int
    base_samples: Images
    """Of clips the continuations of the held-out ones."""
    given: int
    """Frames that these were given."""
    base_rows: Int[np.ndarray, " s"]
    """The training examples whose classes and captions these were told, unless they are continuations."""
    base_told: Told
    """What they were told: continuations the class of the clip that they continue."""
    base_nfe: int
    guided: tuple[Images, Told, int] | None
    """Samples for the eye, the classes in turn, and their NFE."""
    train_originals: Images
    train_reconstructions: Images

    @classmethod
    def by(
        cls,
        model: UnifiedLatents,
        base: Denoiser,
        dataset: Dataset,
        held_out: Images,
        config: Config,
        text: TextEncoder | None,
        store: Store,
    ) -> "_Made":
        options, given = config.evaluate, config.model.given_frames
        first = held_out[:, :given] if given else None
        count = len(held_out) if given else options.num_samples
        rows = rows_like(dataset.train, count, root_int(config.seed, "evaluation labels"))
        own = told_of(dataset.validation, held_out_rows(dataset, options), base.conditions, text)
        base_told = own if given else told_of(dataset.train, rows, base.conditions, text)
        told = own if config.label_dropout == 0 else Told()
        # Reconstructions are without given frames, but a decoder that knows captions is told them.
        decoder_told = Told(captions=own.captions) if config.model.decoder_text else Told()
        # Copies are sought among images alone: there is no end of clips.
        compared = 0 if config.data.clips else 2 * PICTURES
        of_train = spread_over(len(dataset.train), max(1, compared))
        originals = np.stack([dataset.train[i]["image"] for i in of_train])
        flow_of = spread_over(len(held_out), options.flow_images)
        total = 5 * len(held_out) + len(flow_of) + min(PICTURES, len(held_out)) + 2 * count + PICTURES
        with Progress("evaluate", total=total + 2 * len(originals), unit=config.data.unit) as progress:
            run = Runner(model, config, progress, store)
            rate = run.rate(held_out, model.prior, name="rate")
            base_rate = run.rate(held_out, base, told, name="base rate")
            decoder = run.decoder_nats(held_out, decoder_told, name="decoder rate")
            flow, flow_steps = run.flow_nats(held_out[flow_of]) if flow_of else (np.zeros(0), 0)
            latents = run.encode(held_out, name="latents")
            reconstructions, decoder_nfe = run.decode(latents, RECONSTRUCT, decoder_told, name="reconstructions")
            before = (np.arange(len(held_out)) - 1)[:PICTURES]
            swapped, _ = run.decode(latents[before], RECONSTRUCT, decoder_told[before])
            prior_samples, prior_nfe = run.sample(model.prior, count, SAMPLE, name="prior samples")
            of_clips = dataclasses.replace(base_told, first=first)
            base_samples, base_nfe = run.sample(
                base, count, SAMPLE, of_clips, guidance=options.guidance_scale, name="base samples"
            )
            guided = None
            if config.can_guide and base.conditions.num_classes:
                turn = Told(label=np.arange(PICTURES, dtype=np.int32) % len(dataset.class_names))
                images, nfe = run.sample(base, PICTURES, SAMPLE, turn, guidance=config.sample.guidance_scale)
                guided = images, turn, nfe
            captions = told_of(dataset.train, of_train, model.decoder.conditions, text).captions
            train_reconstructions, _ = run.decode(run.encode(originals), RECONSTRUCT, Told(captions=captions))
        return cls(
            rate=rate,
            base_rate=base_rate,
            is_told=config.label_dropout == 0,
            decoder=decoder,
            flow_of=flow_of,
            flow=flow,
            flow_steps=flow_steps,
            reconstructions=reconstructions,
            swapped=swapped,
            decoder_nfe=decoder_nfe,
            prior_samples=prior_samples,
            prior_nfe=prior_nfe,
            base_samples=base_samples,
            given=given,
            base_rows=rows,
            base_told=base_told,
            base_nfe=base_nfe,
            guided=guided,
            train_originals=originals,
            train_reconstructions=train_reconstructions,
        )


def _distances(
    compared: Sequence[FeatureNetwork],
    made: Mapping[str, tuple[Images, int]],
    held_out: Images,
    of_held_out: Collection[str],
    moments_of: Callable[[FeatureNetwork], Moments] | None,
    unit: str,
    store: Store = Store(),
) -> dict[str, Any]:
    """What was made ("base", "prior", "reconstruction": images and NFE) against real images.

    Fréchet distances by the network's name of them, samples to the training images, whose moments are `moments_of`, or
    without them to the held-out ones; the others to the held-out images, of all networks together. Reconstructions are
    compared with their originals, and, as papers often do, with the training images too. What is `of_held_out` was
    made of these, one of each.
    """
    metrics: dict[str, Any] = {}
    others: dict[str, Metric] = {what: {} for what in made}
    for network in compared:

        def seen(images: Images, what: str, by: FeatureNetwork = network) -> Float[np.ndarray, "n d"]:
            into = store.rows(f"{by.metric} {by.sha256[:8]} {what}", len(images))
            return features(by, images, description=f"features: {what}", unit=unit, into=into)

        originals = seen(held_out, f"held-out {unit}")
        own = Moments.of(originals)
        trained = None if moments_of is None else moments_of(network)
        distances: dict[str, Metric] = {}
        for what, (images, nfe) in made.items():
            found = seen(images, what)
            paired = what in of_held_out
            others[what] |= compare.kernel_and_manifolds(network, originals, found, paired=paired)[0]
            if trained is None or what == "reconstruction":
                distances[what] = frechet(found, own) | {"against": HELD_OUT, "nfe": nfe}
            if trained is not None:
                name = f"{what}_to_training" if what == "reconstruction" else what
                distances[name] = frechet(found, trained) | {"against": TRAINING, "nfe": nfe}
        if trained is not None:
            distances["held_out_images"] = frechet(originals, trained) | {"against": TRAINING}
        metrics[network.metric] = distances
    return metrics | {"against_held_out_images": others}


def _bits(rate: RateEstimate, model: UnifiedLatents) -> dict[str, Any]:
    pixels = int(np.prod(model.shape[:-1]))
    dims = int(np.prod(model.latent_shape))
    by_level = np.asarray(losses.bits_per_pixel(rate.by_level, num_pixels=pixels))
    return {
        "bits_per_pixel": _bits_per_pixel(rate.rate, rate.diffusion, model),
        "bits_per_latent_dim": mean(losses.bits_per_latent_dim(rate.rate, num_dims=dims)) | _measured(rate.diffusion),
        "terminal_bits_per_pixel": float(np.mean(losses.bits_per_pixel(rate.terminal, num_pixels=pixels))),
        "encoder_bits_per_pixel": float(np.mean(losses.bits_per_pixel(rate.encoder, num_pixels=pixels))),
        "latent_shape": list(model.latent_shape),
        "rate_by_level": {
            "logsnr_edges": np.asarray(rate.logsnr_edges).tolist(),
            "bits_per_pixel": by_level.mean(axis=0).tolist(),
            "standard_error": (by_level.std(axis=0, ddof=1) / np.sqrt(len(by_level))).tolist(),
        },
    }


def _bits_per_pixel(nats: PerExample, estimate: DiffusionEstimate, model: UnifiedLatents) -> dict[str, Any]:
    pixels = int(np.prod(model.shape[:-1]))
    return mean(losses.bits_per_pixel(nats, num_pixels=pixels)) | _measured(estimate)


def _measured(estimate: DiffusionEstimate) -> dict[str, Any]:
    _, draws, levels = estimate.samples.shape
    return {"levels": levels, "draws": draws, "weighting": "w = 1"}


def _said(name: str, told: Told) -> dict[str, np.ndarray]:
    """What stands under pictures: captions, or else classes."""
    if told.captions is not None:
        return {f"{name}_captions": np.array(told.captions.captions[:PICTURES])}
    return {} if told.label is None else {f"{name}_labels": told.label[:PICTURES]}
