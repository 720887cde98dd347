"""Measuring a trained model on images it never saw: bits, reconstructions, samples, distances, copies.

Everything uses the averaged (EMA) weights and is written to the run's `evaluation/` folder: `metrics.json` with each
number beside what it was measured on, and `pictures.npz` for the report.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key, UInt8

from ulx import losses
from ulx.bound import DiffusionEstimate, RateEstimate, estimate_decoder, estimate_rate
from ulx.config import Config
from ulx.data.pixels import to_float, to_uint8
from ulx.data.source import Dataset, Split
from ulx.denoiser import Denoiser, StandardNormal
from ulx.diffusion import split_keys
from ulx.generate import decode, encode, in_batches, sample_latents
from ulx.likelihood import FlowRate, flow_rate
from ulx.metrics import efficientnet
from ulx.metrics.compare import kernel_and_manifolds
from ulx.metrics.copies import copies_among, spread_over
from ulx.metrics.features import features
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.images import SSIM_WINDOW, psnr, ssim
from ulx.metrics.reference import training_moments
from ulx.models import UnifiedLatents
from ulx.progress import Progress
from ulx.seeding import root_int, root_key
from ulx.typing import PerExample

__all__ = ["Evaluation", "evaluate", "evaluate_autoencoder"]

RECONSTRUCT, SAMPLE = "reconstruct", "sample"
"""Purposes of noise. Reconstructions, swapped or not, share theirs; so do the samples of all models, row by row."""
PICTURES = 64
"""Images of each kind that the report shows."""

FLOW_PROBES, FLOW_TOLERANCE = 2, 1e-4
"""Of the flow's likelihood: Hutchinson's probes, and the tolerance of a step, about 1e-3 nats per dimension in all."""

Images = UInt8[np.ndarray, "_n _h _w _c"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, Any]
    """Numbers with their N, standard error, NFE and so on, as JSON values."""
    pictures: dict[str, np.ndarray]
    """Images (uint8) and labels for the report."""

    def save(self, directory: Path) -> None:
        """Writes `metrics.json` and `pictures.npz`, each aside first and renamed when whole."""
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / "aside.npz"
        np.savez_compressed(aside, allow_pickle=False, **self.pictures)
        aside.replace(directory / "pictures.npz")
        aside = directory / "aside.json"
        aside.write_text(json.dumps(self.metrics, indent=2) + "\n")
        aside.replace(directory / "metrics.json")

    @classmethod
    def load(cls, directory: Path) -> "Evaluation":
        """Raises FileNotFoundError where no evaluation was saved."""
        if not (directory / "metrics.json").exists():
            raise FileNotFoundError(f"{directory} holds no evaluation; run `python -m ulx.evaluate RUN`")
        with np.load(directory / "pictures.npz", allow_pickle=False) as pictures:
            return cls(json.loads((directory / "metrics.json").read_text()), dict(pictures))


def evaluate_autoencoder(model: UnifiedLatents, dataset: Dataset, config: Config) -> dict[str, Any]:
    """Bits and PSNR on the held-out images: what stage 1 alone answers for."""
    held_out = _images(dataset.validation)
    with Progress("evaluate", total=3 * len(held_out), unit="images") as progress:
        run = _Runner(model, config, progress)
        rate = run.rate(held_out, model.prior)
        reconstructions, nfe = run.decode(run.encode(held_out), RECONSTRUCT)
    return {**_bits(rate, model), "psnr": _psnr(reconstructions, held_out) | {"nfe": nfe}}


def evaluate(model: UnifiedLatents, base: Denoiser, dataset: Dataset, config: Config) -> Evaluation:
    """Evaluate a run. `model` and `base` hold the averaged weights; validation images are those of `dataset`."""
    network = efficientnet.load()
    held_out = _images(dataset.validation)
    labels = _labels_like(dataset.train.labels, config.evaluate.num_samples, root_int(config.seed, "evaluation labels"))
    options = config.evaluate
    # A base model that never saw its null label is asked about each image as one of its class.
    own_labels = dataset.validation.labels if config.label_dropout == 0 else None

    train_originals = np.stack([dataset.train[i]["image"] for i in spread_over(len(dataset.train), 2 * PICTURES)])
    flow_of = spread_over(len(held_out), options.flow_images)
    total = 5 * len(held_out) + len(flow_of) + min(PICTURES, len(held_out)) + 2 * options.num_samples + PICTURES
    with Progress("evaluate", total=total + 2 * len(train_originals), unit="images") as progress:
        run = _Runner(model, config, progress)
        rate, base_rate = run.rate(held_out, model.prior), run.rate(held_out, base, own_labels)
        decoder = run.decoder_nats(held_out)
        flow, flow_steps = run.flow_nats(held_out[flow_of]) if flow_of else (np.zeros(0), 0)
        latents = run.encode(held_out)
        reconstructions, decoder_nfe = run.decode(latents, RECONSTRUCT)
        swapped, _ = run.decode(np.roll(latents, 1, axis=0)[:PICTURES], RECONSTRUCT)
        prior_samples, prior_nfe = run.sample(model.prior, None, options.num_samples, SAMPLE)
        base_samples, base_nfe = run.sample(base, labels, options.num_samples, SAMPLE)
        guided = None
        if config.can_guide:  # for the eye: the classes in turn
            turn = np.arange(PICTURES, dtype=np.int32) % len(dataset.class_names)
            images, nfe = run.sample(base, turn, PICTURES, SAMPLE, guidance=config.sample.guidance_scale)
            guided = images, turn, nfe
        train_copies, _ = run.decode(run.encode(train_originals), RECONSTRUCT)

    reference = training_moments(dataset, network, config.data.cache_dir)
    seen = lambda images, what: features(network, images, description=f"features of {what}")  # noqa: E731
    base_features = seen(base_samples, "base samples")
    prior_features = seen(prior_samples, "prior samples")
    held_out_features = seen(held_out, "held-out images")
    reconstruction_features = seen(reconstructions, "reconstructions")
    copies, nearest_index = copies_among(dataset.train, base_samples, held_out, train_originals, train_copies)

    metrics: dict[str, Any] = {
        "held_out": {"n": len(held_out), "data": dataset.name, "split": "validation"},
        "weights": "EMA",
        **_bits(rate, model),
        "bits_per_pixel_base": _bits_per_pixel(base_rate.rate, base_rate.diffusion, model)
        | {"labels": "none: the base model's null label" if own_labels is None else "the images' own"},
        "decoder_bits_per_pixel": _bits_per_pixel(decoder.total, decoder, model)
        | {"leaves_out": "x's terminal KL and -log p(x | x_0)"},
        "psnr": _psnr(reconstructions, held_out) | {"nfe": decoder_nfe, "solver": config.sample.decoder_solver},
        **({} if config.data.resolution < SSIM_WINDOW else {"ssim": _ssim(reconstructions, held_out)}),
        "psnr_of_mean_training_image": _psnr(np.broadcast_to(_mean_image(dataset), held_out.shape), held_out),
        "swap": _swap(swapped, held_out),
        "fd_efflite0": {
            "base": _distance(base_features, reference) | {"nfe": base_nfe, "against": "training images"},
            "prior": _distance(prior_features, reference) | {"nfe": prior_nfe, "against": "training images"},
            "reconstruction": _distance(reconstruction_features, Moments.of(held_out_features))
            | {"nfe": decoder_nfe, "against": "the same held-out originals"},
            "held_out_images": _distance(held_out_features, reference) | {"against": "training images"},
        },
        "against_held_out_images": {
            "base": _kernel_and_manifolds(held_out_features, base_features),
            "prior": _kernel_and_manifolds(held_out_features, prior_features),
            "reconstruction": _kernel_and_manifolds(held_out_features, reconstruction_features),
        },
        "sampler": {
            "latent": config.sample.solver,
            "latent_steps": config.sample.num_steps,
            "latent_churn": config.sample.churn,
            "latent_tolerance": config.sample.tolerance,
            "decoder": config.sample.decoder_solver,
            "decoder_steps": config.sample.decoder_num_steps,
            "decoder_churn": config.sample.decoder_churn,
            "decoder_tolerance": config.sample.decoder_tolerance,
            "decoder_nfe": decoder_nfe,
            "guidance_scale": 1.0,
            "labels": "as frequent as in the training set",
        },
        "copies": copies,
    }
    if flow_of:
        pixels = int(np.prod(model.shape[:-1]))
        bits = lambda nats: _mean(losses.bits_per_pixel(jnp.asarray(nats), num_pixels=pixels))  # noqa: E731
        metrics["flow"] = {
            "bits_per_pixel": bits(flow) | {"probes": FLOW_PROBES, "solver_steps": flow_steps},
            "bound_less_flow": bits(np.asarray(rate.rate)[flow_of] - flow),
        }
    train_images = [dataset.train[int(i)]["image"] for i in nearest_index[:PICTURES]]
    pictures = {
        "originals": held_out[:PICTURES],
        "reconstructions": reconstructions[:PICTURES],
        "swapped": swapped,
        "prior_samples": prior_samples[:PICTURES],
        "base_samples": base_samples[:PICTURES],
        "base_labels": labels[:PICTURES],
        "nearest": np.stack(train_images),
    }
    if guided is not None:
        images, turn, nfe = guided
        pictures |= {"guided_samples": images, "guided_labels": turn}
        metrics["guided_samples"] = {
            "nfe": nfe,
            "guidance_scale": config.sample.guidance_scale,
            "guidance_interval": config.sample.guidance_interval,
        }
    return Evaluation(metrics, pictures)


@dataclasses.dataclass(frozen=True)
class _Runner:
    """The model's calls in batches. Each kind compiles once, whatever it is used for afterwards."""

    model: UnifiedLatents
    config: Config
    progress: Progress

    def _run(self, function, *arrays, purpose: str, on_batch=lambda done: None):
        size, key = self.config.evaluate.batch_size, root_key(self.config.seed, f"evaluation {purpose}")
        return in_batches(function, *arrays, batch_size=size, key=key, on_batch=on_batch)

    def rate(
        self, images: Images, denoiser: Denoiser | StandardNormal, labels: Int32[np.ndarray, " n"] | None = None
    ) -> RateEstimate:
        """L_z under the prior or the base model, `draws` independent estimates per image."""
        options = self.config.evaluate

        def measure(x, label, *, keys):
            label = None if labels is None else jnp.asarray(label)
            return _rate(self.model, denoiser, to_float(x), label, keys, options.levels, options.draws)

        rows = np.zeros(len(images), np.int32) if labels is None else labels
        rate = self._run(measure, images, rows, purpose="rate", on_batch=self.progress.advance)
        return jax.tree.map(jnp.asarray, rate)

    def decoder_nats(self, images: Images) -> DiffusionEstimate:
        """L_x with w = 1. One draw of each level: the images' spread is far larger than the estimator's noise."""

        def measure(x, *, keys):
            return _decoder(self.model, to_float(x), keys, self.config.evaluate.levels)

        nats = self._run(measure, images, purpose="decoder", on_batch=self.progress.advance)
        return jax.tree.map(jnp.asarray, nats)

    def flow_nats(self, images: Images) -> tuple[Float[np.ndarray, " n"], int]:
        """The rate under the prior's probability flow, in nats per image, and the solver's steps."""

        def measure(x, *, keys):
            flow = _flow(self.model, to_float(x), keys)
            return flow.rate, jnp.broadcast_to(flow.num_steps, len(x))

        size, key = min(len(images), self.config.evaluate.batch_size), root_key(self.config.seed, "evaluation flow")
        nats, steps = in_batches(measure, images, batch_size=size, key=key, on_batch=self.progress.advance)
        return nats, int(steps.max())

    def encode(self, images: Images) -> Float[np.ndarray, "n *latent k"]:
        def latents(x, *, keys):
            return encode(self.model, jnp.asarray(to_float(x)), keys=keys)

        return self._run(latents, images, purpose="encode", on_batch=self.progress.advance)

    def decode(self, latents: np.ndarray, purpose: str) -> tuple[Images, int]:
        def images(z_0, *, keys):
            sample = decode(self.model, jnp.asarray(z_0), self.config.sample, keys=keys)
            return to_uint8(sample.z), jnp.broadcast_to(sample.nfe, len(z_0))

        pixels, nfe = self._run(images, latents, purpose=f"{purpose}, decoder", on_batch=self.progress.advance)
        return pixels, round(nfe.mean())

    def sample(
        self,
        denoiser: Denoiser | StandardNormal,
        label: Int32[np.ndarray, " n"] | None,
        count: int,
        purpose: str,
        *,
        guidance: float = 1.0,
    ) -> tuple[Images, int]:
        """Images and the latent sampler's mean NFE (the decoder's comes on top)."""

        def latents(index, *, keys):
            sample = sample_latents(
                denoiser,
                self.model.latent_schedule,
                self.config.sample,
                keys=keys,
                label=None if label is None else jnp.asarray(index),
                guidance_scale=guidance,
            )
            return sample.z, jnp.broadcast_to(sample.nfe, len(index))

        rows = np.zeros(count, np.int32) if label is None else label
        z_0, nfe = self._run(latents, rows, purpose=purpose)
        return self.decode(z_0, purpose)[0], round(nfe.mean())


@eqx.filter_jit
def _rate(
    model: UnifiedLatents,
    denoiser: Denoiser | StandardNormal,
    x: Float[Array, "b h w c"],
    label: Int[Array, " b"] | None,
    keys: Key[Array, " b"],
    levels: int,
    draws: int,
) -> RateEstimate:
    """Without a label, which the prior has not, the base model takes its null label."""
    clean_keys, rate_keys = split_keys(keys, 2)
    posterior, schedule = model.posterior(x), model.latent_schedule
    return estimate_rate(
        denoiser.given(label=label),
        posterior.sample(key=clean_keys),
        schedule,
        key=rate_keys,
        levels=levels,
        replicates=draws,
        encoder=posterior.nats(schedule.logsnr_max),
    )


@eqx.filter_jit
def _decoder(
    model: UnifiedLatents, x: Float[Array, "b h w c"], keys: Key[Array, " b"], levels: int
) -> DiffusionEstimate:
    z_key, decoder_key = split_keys(keys, 2)
    denoise = model.decoder.given(model.encode(x, key=z_key), model.decoder_logsnr_0(len(x)))
    return estimate_decoder(denoise, x, model.decoder.schedule, key=decoder_key, levels=levels)


@eqx.filter_jit
def _flow(model: UnifiedLatents, x: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> FlowRate:
    clean_keys, flow_keys = split_keys(keys, 2)
    posterior, schedule = model.posterior(x), model.latent_schedule
    z_clean = posterior.sample(key=clean_keys)
    found = flow_rate(
        model.prior.given(), z_clean, schedule, key=flow_keys, probes=FLOW_PROBES, tolerance=FLOW_TOLERANCE
    )
    return dataclasses.replace(found, rate=found.rate + posterior.nats(schedule.logsnr_max))


def _bits(rate: RateEstimate, model: UnifiedLatents) -> dict[str, Any]:
    pixels = int(np.prod(model.shape[:-1]))
    dims = int(np.prod(model.latent_shape))
    by_level = np.asarray(losses.bits_per_pixel(rate.by_level, num_pixels=pixels))
    return {
        "bits_per_pixel": _bits_per_pixel(rate.rate, rate.diffusion, model),
        "bits_per_latent_dim": _mean(losses.bits_per_latent_dim(rate.rate, num_dims=dims)) | _measured(rate.diffusion),
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
    return _mean(losses.bits_per_pixel(nats, num_pixels=pixels)) | _measured(estimate)


def _measured(estimate: DiffusionEstimate) -> dict[str, Any]:
    _, draws, levels = estimate.samples.shape
    return {"levels": levels, "draws": draws, "weighting": "w = 1"}


def _psnr(images: Images, originals: Images) -> dict[str, Any]:
    return _mean(psnr(to_float(images), to_float(originals)))


def _ssim(images: Images, originals: Images, rows: int = 64) -> dict[str, Any]:
    parts = [slice(start, start + rows) for start in range(0, len(images), rows)]
    return _mean(np.concatenate([ssim(to_float(images[part]), to_float(originals[part])) for part in parts]))


def _mean(per_image: Any) -> dict[str, Any]:
    """Mean over images with its standard error, which holds the images' spread and the estimator's noise alike."""
    values = np.asarray(per_image, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"value": float(values.mean()), "standard_error": error, "n": len(values)}


def _distance(found: Float[np.ndarray, "n d"], reference: Moments) -> dict[str, Any]:
    moments = Moments.of(found)
    return {
        "value": frechet_distance(moments, reference),
        "n": moments.count,
        "n_reference": reference.count,
        "rank_deficient": moments.rank_deficient or reference.rank_deficient,
    }


def _kernel_and_manifolds(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> dict[str, Any]:
    found, _ = kernel_and_manifolds(a, b)
    return {efficientnet.KERNEL_METRIC: found.pop("kernel"), **found}


def _swap(swapped: Images, originals: Images) -> dict[str, Any]:
    """Image i's decoder noise with image i − 1's latent: to which original is the result near?"""
    count = len(swapped)
    own = psnr(to_float(swapped), to_float(np.roll(originals, 1, axis=0)[:count]))
    other = psnr(to_float(swapped), to_float(originals[:count]))
    return {"psnr_to_the_latents_image": _mean(own), "psnr_to_the_other": _mean(other), "gap": _mean(own - other)}


def _images(split: Split) -> Images:
    return np.stack([example["image"] for example in split])


def _mean_image(dataset: Dataset) -> UInt8[np.ndarray, "h w c"]:
    total = np.zeros(dataset.train[0]["image"].shape)
    for example in dataset.train:
        total += example["image"]
    return (total / len(dataset.train)).round().astype(np.uint8)


def _labels_like(labels: Int32[np.ndarray, " n"], count: int, seed: int) -> Int32[np.ndarray, " m"]:
    """Labels drawn with the training set's frequencies."""
    return np.random.default_rng(seed).choice(labels, count).astype(np.int32)
