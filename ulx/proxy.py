"""How well will a base model generate from this tokenizer's latents? A short, fixed training instead of a long one.

    python -m ulx.proxy runs/openmoji
    python -m ulx.proxy my_package.my_module:make --data.resolution 32 --out mine
    python -m ulx.cards runs/openmoji/proxy/card.json mine/card.json

A tokenizer can reconstruct well and be bad to generate from, which shows only after a base model is trained on it. This
trains a small one, the same for every tokenizer (`RECIPE`), on the latents of the training images, and measures its
samples: a number to compare tokenizers by on the same data, not one to report. How far it can be trusted
was measured on six autoencoders of one family: it did not rank them as longer trained base models do
(benchmarks/gfid_proxy.py: rank correlations of 0.26 and 0.31). Latents are centred by channel and scaled
to variance 1 first; they are cut into patches so that there are 8×8 tokens or fewer, whatever their shape. Of very many
images it takes as many as its training sees, spread over the set, and at most 2,048 held-out ones. The
tokenizer is a run or anything with `encode` and `decode` (`ulx.tokenizers`). The small base model is told the classes
of the data, if they have some, and no captions. Leaves a card with the samples' Fréchet distance to the training images
and their kernel distance to held-out ones (by `--inception-weights` FID and KID), the distance of reconstructions, PSNR
and the rate, and pictures of both.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int32, Key, UInt8

import ulx
from ulx import flops, losses, run_folder, schedules, tokenizers
from ulx.aside import write_aside
from ulx.checkpoint import Checkpoints
from ulx.command_line import parse_arguments, run_command
from ulx.config import Config, SampleConfig, TrainConfig
from ulx.data import DataConfig, open_dataset
from ulx.data.pipeline import train_batches
from ulx.data.pixels import to_float, to_uint8
from ulx.data.source import Dataset, InMemory, Split
from ulx.denoiser import Denoiser
from ulx.evaluation_pairs import mean_psnr
from ulx.generate import in_batches, sample_latents
from ulx.guard import Guard
from ulx.image_files import claim, contact_sheet, write_png
from ulx.metrics import compare, efficientnet, inception
from ulx.metrics.copies import spread_over
from ulx.metrics.entries import as_json, frechet, mean, plus_minus, rank_remark
from ulx.metrics.features import FeatureNetwork, features
from ulx.metrics.frechet import Moments
from ulx.metrics.kernel import kernel_distance
from ulx.metrics.reference import training_moments
from ulx.metrics_log import MetricsLog
from ulx.models import ModelConfig
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViT, UViTConfig
from ulx.progress import Progress
from ulx.seeding import root_int, root_key
from ulx.sharding import check_batch, make_mesh, place
from ulx.snapshots import Snapshots
from ulx.stages import base_loss
from ulx.tokenizers import NOISE_FREE, Tokenizer, noise_level
from ulx.training import TrainState, fit, make_optimizer, make_step

__all__ = ["RECIPE", "Measured", "Options", "Recipe", "Standardised", "measure", "standardise"]

Images = UInt8[np.ndarray, "n h w 3"]
FILES = ("card.json", "samples.png", "reconstructions.png")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The training that every tokenizer gets; with another, distances are not comparable."""

    base: UViTConfig = UViTConfig(channels=(96,), blocks=(2,), block=BlockConfig(head_size=32))
    """The network, whose patches follow from the latents' shape."""
    grid: int = 8
    """Tokens each way at most."""
    bias: float = 0.0
    """b of the sigmoid weighting, for latents of variance 1."""
    logsnr_1: float = dataclasses.field(default=-10.0, repr=False)  # cards without it are of this one too
    """λ at t = 1, where nothing is left of latents of variance 1."""
    train: TrainConfig = TrainConfig(
        steps=1000, batch_size=32, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99, log_every=50, save_every=1000
    )
    sample: SampleConfig = SampleConfig(num_steps=16, solver="dpmpp_2m")
    num_samples: int = 512
    num_held_out: int = 2048
    """Images that are reconstructed, at most."""

    @property
    def num_train(self) -> int:
        """Training images that are encoded, at most: what the training has time to see once."""
        return self.train.steps * self.train.batch_size

    @property
    def in_words(self) -> str:
        """All of it but the patches, which are the tokenizer's."""
        return repr(self).replace(f"patch={self.base.patch!r}, ", "", 1)

    def network(self, latent_shape: tuple[int, ...]) -> UViTConfig:
        """For latents of this shape: the smallest patches that leave `grid` tokens each way or fewer."""
        patch = tuple(min(p for p in range(1, n + 1) if n % p == 0 and n // p <= self.grid) for n in latent_shape[:-1])
        return dataclasses.replace(self.base, patch=patch)


RECIPE = Recipe()


@dataclasses.dataclass(frozen=True)
class Standardised:
    """Latents of mean 0 in each channel and of variance 1 over all, and the way back."""

    latents: Float[np.ndarray, "n *latent k"]
    mean: Float[np.ndarray, " k"]
    std: float
    noise: float
    """Standard deviation of the decoder's noise on the tokenizer's own scale."""
    logsnr_0: float
    """λ of the decoder's noise on these, where it matters; else NOISE_FREE."""

    def back(self, z: Float[np.ndarray, "b *latent k"]) -> Float[np.ndarray, "b *latent k"]:
        return self.mean + self.std * z


def standardise(latents: Float[np.ndarray, "n *latent k"], logsnr_0: float | None) -> Standardised:
    """One scale for all channels: then noise of λ on the latents is noise of λ + 2 ln std on these, in every one.
    Without a λ these are free of noise.

    Raises ValueError for latents that are constant or not finite.
    """
    mean = latents.mean(axis=tuple(range(latents.ndim - 1)), dtype=np.float64).astype(np.float32)
    std = float((latents - mean).std(dtype=np.float64))
    if not math.isfinite(std) or std == 0:
        raise ValueError(f"the latents' standard deviation is {std:g}: there is nothing to generate")
    own = NOISE_FREE if logsnr_0 is None else logsnr_0 + 2 * math.log(std)
    noise = std * math.exp(-own / 2)
    return Standardised((latents - mean) / np.float32(std), mean, std, noise, min(own, NOISE_FREE))


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a base model on a tokenizer's latents."""

    metrics: dict[str, Any]
    """The card's."""
    samples: UInt8[np.ndarray, "s h w 3"]
    reconstructions: Images
    """Of the held-out images."""
    originals: Images
    training_flops: int
    """Of the base model's training, by the paper's convention."""


def measure(
    tokenizer: Tokenizer,
    dataset: Dataset,
    recipe: Recipe = RECIPE,
    *,
    network: FeatureNetwork | None = None,
    seed: int = 0,
    batch_size: int = 128,
    cache_dir: str | None = None,
) -> Measured:
    """Trains a base model on the latents of the training images, and measures its samples, by the features of a
    network: by default the packaged EfficientNet-lite0.

    Raises ValueError for a tokenizer whose arrays have not the shapes or the values that they should.
    """
    network = network or efficientnet.load()
    split = dataset.validation
    held_out = np.stack([split[i]["image"] for i in spread_over(len(split), recipe.num_held_out)])
    of_train = spread_over(len(dataset.train), recipe.num_train)
    total = len(of_train) + 2 * len(held_out) + recipe.num_samples
    with Progress("tokenizer", total=total, unit="images") as progress:
        calls = _Calls(tokenizer, held_out.shape[1:], batch_size, root_key(seed, "proxy"), progress)
        made = standardise(calls.encoded(_Read(dataset.train, of_train)), noise_level(tokenizer))
        reconstructions = calls.decoded(calls.noised(calls.encoded(held_out), made.noise), "reconstructions")
        labels = np.random.default_rng(root_int(seed, "proxy labels")).choice(dataset.train.labels, recipe.num_samples)
        own = dataset.train.labels[of_train]
        generated = _generated(made, own, dataset, labels.astype(np.int32), recipe, seed, batch_size)
        samples = calls.decoded(generated.latents, "samples")
    seen = lambda images, what: features(network, images, description=f"features: {what}")  # noqa: E731
    originals = seen(held_out, "held-out images")
    trained = training_moments(dataset, network, cache_dir)
    sampled = seen(samples, "samples")
    kernel = kernel_distance(originals, sampled)
    metrics = {
        network.metric: frechet(sampled, trained) | {"nfe": generated.nfe},
        network.kernel_metric: {
            "value": kernel.value,
            "standard_error": kernel.standard_error,
            "n_a": len(originals),
            "n_b": len(sampled),
            "against": "held-out images",
        },
        f"{network.metric}_reconstruction": frechet(seen(reconstructions, "reconstructions"), Moments.of(originals)),
        "psnr": mean_psnr(reconstructions, held_out),
    }
    meant = compare.definitions(network)
    metrics[network.metric] |= meant[network.metric]
    metrics[network.kernel_metric] |= meant[network.kernel_metric]
    metrics[f"{network.metric}_reconstruction"] |= meant[network.metric]
    metrics["psnr"]["definition"] = "10 log10(255²/MSE) in dB of each reconstruction, mean over images"
    if hasattr(tokenizer, "rate"):
        nats = calls.rated(held_out)
        pixels = math.prod(held_out.shape[1:3])
        bits = np.asarray(losses.bits_per_pixel(jnp.asarray(nats), num_pixels=pixels))
        metrics["bits_per_pixel"] = mean(bits) | {"definition": "the tokenizer's own rate over height · width · ln 2"}
    return Measured(metrics, samples, reconstructions, held_out, generated.training_flops)


@dataclasses.dataclass(frozen=True)
class _Read:
    """Images of a split, read when they are asked for: all of them may be more than memory holds."""

    split: Split
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Int[np.ndarray, " b"]) -> Images:
        return np.stack([self.split[self.rows[i]]["image"] for i in index])


@dataclasses.dataclass(frozen=True)
class _Calls:
    """A tokenizer's methods over many images, with what they give checked."""

    tokenizer: Tokenizer
    shape: tuple[int, ...]
    batch_size: int
    key: Key[jax.Array, ""]
    progress: Progress

    def _batches(
        self,
        rows: np.ndarray | _Read,
        call: Callable[[np.ndarray, int], Any],
        what: str,
        kept: Callable[[np.ndarray], np.ndarray] = lambda part: part,
    ) -> np.ndarray:
        """What a call gives of all rows, a batch at a time, and what is kept of it."""
        found = []
        for start in range(0, len(rows), self.batch_size):
            # The last batch is filled up with its last row: a tokenizer that compiles does so once.
            index = np.minimum(np.arange(start, start + self.batch_size), len(rows) - 1)
            part = np.asarray(call(rows[index], start), np.float32)
            if len(part) != self.batch_size or not np.isfinite(part).all():
                fault = f"{len(part)} rows for {self.batch_size}" if len(part) != self.batch_size else "NaN or infinity"
                raise ValueError(f"the tokenizer's {what} gave {fault}, in the batch from image {start} on")
            found.append(kept(part[: len(rows) - start]))
            self.progress.advance(len(found[-1]))
        return np.concatenate(found)

    def encoded(self, images: Images | _Read) -> Float[np.ndarray, "n *latent k"]:
        latents = self._batches(images, lambda x, _: self.tokenizer.encode(to_float(x)), "encode")
        if latents.ndim < 3:
            raise ValueError(f"latents need at least one axis of positions and one of channels, got {latents.shape}")
        return latents

    def noised(self, latents: Float[np.ndarray, "n *latent k"], std: float) -> Float[np.ndarray, "n *latent k"]:
        noise = jax.random.normal(jax.random.fold_in(self.key, 0), latents.shape)
        return latents + np.float32(std) * np.asarray(noise)

    def decoded(self, latents: Float[np.ndarray, "n *latent k"], what: str) -> Images:
        key = jax.random.fold_in(self.key, {"reconstructions": 1, "samples": 2}[what])
        decode = lambda z, start: self.tokenizer.decode(z, jax.random.fold_in(key, start))  # noqa: E731
        return self._batches(latents, decode, "decode", self._pixels)

    def _pixels(self, images: np.ndarray) -> Images:
        if images.shape[1:] != self.shape:
            raise ValueError(f"the tokenizer's decode gave images of {images.shape[1:]}, the data has {self.shape}")
        return np.asarray(to_uint8(np.clip(images, -1, 1)))

    def rated(self, images: Images) -> Float[np.ndarray, " n"]:
        rate = getattr(self.tokenizer, "rate")  # noqa: B009 - not part of the protocol
        key = jax.random.fold_in(self.key, 3)
        nats = self._batches(images, lambda x, start: rate(to_float(x), jax.random.fold_in(key, start)), "rate")
        if nats.ndim != 1:
            raise ValueError(f"the tokenizer's rate is to be nats per image, got the shape {nats.shape}")
        return nats


@dataclasses.dataclass(frozen=True)
class _Generated:
    latents: Float[np.ndarray, "s *latent k"]
    """Under the decoder's noise, on the tokenizer's own scale."""
    nfe: int
    training_flops: int


def _generated(
    made: Standardised,
    own: Int32[np.ndarray, " n"],
    dataset: Dataset,
    labels: Int32[np.ndarray, " s"],
    recipe: Recipe,
    seed: int,
    batch_size: int,
) -> _Generated:
    """What the base model that the recipe trains makes: `own` are the classes of those that it is trained on, `labels`
    of those asked for."""
    shape = made.latents.shape[1:]
    model = ModelConfig(logsnr_0=made.logsnr_0, logsnr_1=recipe.logsnr_1, base=recipe.network(shape))
    config = Config(model=model, base_bias=recipe.bias, train_base=recipe.train, sample=recipe.sample, seed=seed)
    conditions = ConditionSpec(num_classes=len(dataset.class_names))
    network = UViT(shape, model.base, conditions=conditions, key=root_key(seed, "proxy weights"))
    optimizer = make_optimizer(recipe.train)
    names = tuple(str(row) for row in range(len(own)))
    examples = Split(InMemory({"mean": made.latents, "label": own}), names, own)
    batches = train_batches(
        dataclasses.replace(dataset, train=examples), batch_size=recipe.train.batch_size, seed=root_int(seed, "proxy")
    )
    mesh = make_mesh()
    check_batch(recipe.train.batch_size, mesh, of="the proxy")
    key = root_key(seed, "proxy steps")
    step = make_step(base_loss(config, dataset.resolution**2), optimizer, recipe.train, key=key, mesh=mesh)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with Checkpoints(path / "checkpoints") as checkpoints, MetricsLog(path / "log.jsonl") as log:
            state = place(TrainState(Denoiser(network), optimizer), mesh)
            base = fit(
                state,
                step,
                None,
                batches,
                recipe.train,
                guard=Guard.of(state.model, recipe.train),
                mesh=mesh,
                checkpoints=checkpoints,
                snapshots=Snapshots(path / "snapshots", ()),
                log=log,
                name="proxy",
            ).ema_model
    schedule = schedules.linear(made.logsnr_0, model.logsnr_1)

    def latents(label, *, keys):
        sample = sample_latents(base, schedule, recipe.sample, keys=keys, conditions=Conditions(label))
        return sample.z, jnp.broadcast_to(sample.nfe, len(label))

    z_0, nfe = in_batches(latents, labels, batch_size=batch_size, key=root_key(seed, "proxy samples"))
    alpha = np.float32(jax.nn.sigmoid(made.logsnr_0) ** 0.5)
    z, level = (jax.ShapeDtypeStruct(of, jnp.float32) for of in ((1, *shape), (1,)))
    forward = flops.forward_flops(lambda network, z, level: network(z, level), network, z, level)
    spent = flops.TRAINING * forward * recipe.train.batch_size * recipe.train.steps
    return _Generated(made.back(z_0 / alpha), round(float(nfe.mean())), spent)


@dataclasses.dataclass(frozen=True)
class Options:
    tokenizer: str
    """The folder of a run, or package.module:function, which is called and returns a tokenizer."""
    out: Path | None = None
    """Folder of the card and the pictures; by default "proxy" in the run's folder."""
    data: DataConfig = DataConfig()
    """The images; for a run always its own."""
    inception_weights: Path | None = None
    """The file of FID's InceptionV3: distances are FID and KID, in place of fd_efflite0 and kd_efflite0."""
    inception_resize: inception.Resize | None = None
    """How it is shown the images: "tf1-bilinear", the default, or "clean-bicubic", Clean-FID's way, whose distances are
    called so."""
    seed: int = 0
    """Weights, order of the data, and noise."""
    batch_size: int = 128
    """Images per call of the tokenizer."""
    overwrite: bool = False
    """Write over files that exist."""

    def __post_init__(self) -> None:
        inception.check_resize(self.inception_resize, self.inception_weights)


def run(options: Options) -> dict[str, Any]:
    """Measure, print, and write the card and the pictures; returns the card."""
    path = Path(options.tokenizer)
    is_run = (path / "config.json").exists()
    out = options.out or (path / "proxy" if is_run else None)
    if out is None:
        raise ValueError(f"{options.tokenizer} is no folder of a run: give an --out for the card")
    claim(out, FILES, options.overwrite)
    data = run_folder.read_config(path).data if is_run else options.data
    if data.clips:
        raise ValueError(f"{options.tokenizer}: the proxy generates images, and --data.clips are clips")
    dataset = open_dataset(data)
    weights = options.inception_weights
    found = measure(
        tokenizers.load(options.tokenizer),
        dataset,
        RECIPE,
        network=None if weights is None else inception.load(weights, options.inception_resize or inception.RESIZE),
        seed=options.seed,
        batch_size=options.batch_size,
        cache_dir=data.cache_dir,
    )
    card = {
        "metrics": found.metrics,
        "left_out": {},
        "a": {"path": dataset.name, "n": len(dataset.train), "pixels_sha256": dataset.fingerprint},
        "b": {"path": options.tokenizer, "n": RECIPE.num_samples},
        "resolution": dataset.resolution,
        "preparation": f"samples of a base model trained by {RECIPE.in_words}; noise of the tokenizer's own λ, or of "
        f"λ = {NOISE_FREE:g} on latents of variance 1",
        "dtype": "float32",
        "seed": options.seed,
        "device": jax.devices()[0].device_kind,
        "ulx": ulx.__version__,
        "commit": compare.commit(),
    }
    write_png(out / "samples.png", contact_sheet(found.samples[:64]))
    write_png(out / "reconstructions.png", contact_sheet(found.originals[:64], found.reconstructions[:64]))
    with write_aside(out / "card.json") as aside:
        aside.write_text(as_json(card), "utf-8")
    for name, metric in found.metrics.items():
        remark = rank_remark(metric)
        print(f"{name:<28}{plus_minus(metric)}" + f"  {remark}" * bool(remark))
    print(f"-> {out}")
    return card


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: run(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
