"""A run's folder, and loading what was trained in it.

runs/NAME/
    config.json           every setting
    dataset.json          which data, its classes
    stage1.jsonl, stage2.jsonl, tensorboard/   metrics while training, for each stage that the run has
    checkpoints/stage1, checkpoints/stage2
    snapshots/stage1, snapshots/stage2         averages to make others of (`posthoc_ema`)
    evaluation/           metrics.json, pictures.npz
    report.html, figures/
"""

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import equinox as eqx

from ulx.checkpoint import Checkpoints, versions
from ulx.config import Config, TrainConfig, differences, from_json, to_json
from ulx.data.source import Dataset
from ulx.decoders import DiffusionDecoder
from ulx.denoiser import Denoiser
from ulx.ema import gamma_of
from ulx.models import UnifiedLatents
from ulx.nn.conditions import ConditionSpec
from ulx.processes import first
from ulx.rate_control import Control
from ulx.seeding import root_key
from ulx.sharding import make_mesh, place
from ulx.snapshots import Snapshots
from ulx.stages import make_base, make_decoder
from ulx.text.encoders import TextEncoder
from ulx.text.examples import open_encoder
from ulx.training import TrainState, make_optimizer
from ulx.weights_file import WeightsFile

__all__ = [
    "Run",
    "Stage",
    "adopt",
    "autoencoder",
    "check_data",
    "check_facts",
    "copy_autoencoder",
    "decoder_state",
    "facts",
    "load",
    "open_folder",
    "parts",
    "read_config",
    "read_data",
    "remember_data",
    "stage1_state",
    "stage2_state",
    "told",
    "told_by",
    "with_decoder",
]

Stage = Literal["stage1", "decoder", "stage2"]
Widths = Mapping[Stage, float | Literal["best"]]

_OPTION = {"stage1": "--train", "decoder": "--train-decoder", "stage2": "--train-base"}

HARMLESS = (
    "variant",  # a name for what other fields say
    "resume",
    "runs",
    "name",
    "sample",
    "evaluate",
    "data.path",  # the data itself, captions included, is known by its fingerprint
    "data.captions",
    "text.encoder",  # known by its definition
    "data.cache_dir",
    "data.workers",
    "fsdp",
    *(
        f"{stage}.{field}"
        for stage in ("train", "train_decoder", "train_base")
        for field in (
            "accumulate",
            "log_every",
            "save_every",
            "keep_best",
            "posthoc_snapshots",
            "spike",
            "rollbacks",
            "hang_minutes",
        )
    ),
)
"""Fields that may change between the parts of an interrupted run: they do not touch what is trained."""


TOO_FAR = 0.05
"""Error of a profile above which `load` warns. 32 snapshots of widths 0.05 and 0.10 make 0.02 to 0.25 below it."""


def open_folder(config: Config) -> Path:
    """Create the run's folder, or, with `config.resume`, check that it belongs to this configuration.

    Raises:
        NotADirectoryError: the path is a file.
        FileExistsError: the run exists and `resume` is off.
        ValueError: the run was started with other settings; the fields that differ are named.
        OSError: the folder cannot be written.
    """
    path = config.path
    first(lambda: _open_folder(path, config))
    return path


def _open_folder(path: Path, config: Config) -> None:
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"{part} is a file; runs need a folder there: choose another --name or --runs")
    written = path / "config.json"
    if written.exists():
        if not config.resume:
            raise FileExistsError(f"{path} already holds a run: continue it with --resume, or choose another --name")
        changed = differences(read_config(path), config, ignore=HARMLESS)
        if changed:
            raise ValueError(
                f"{path} was started with other settings, so its checkpoints do not belong to this run:\n  "
                + "\n  ".join(changed)
                + "\nPass the old values to continue it, or choose another --name"
            )
    path.mkdir(parents=True, exist_ok=True)
    aside = path / "config.tmp"
    aside.write_text(to_json(config))
    aside.replace(written)


def facts(config: Config) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    text = to_json(config)
    return {"config": json.loads(text), "config_sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_facts(saved: Mapping[str, Any], config: Config) -> None:
    """Refuses a checkpoint of another configuration with ValueError, naming the fields that differ; warns where other
    versions of packages go on with it than began."""
    before = from_json(json.dumps(saved["config"]))
    changed = differences(before, config, ignore=HARMLESS)
    if changed:
        raise ValueError(
            "the checkpoint was saved with other settings:\n  "
            + "\n  ".join(changed)
            + "\nPass the old values to go on with it, or choose another --name"
        )
    was, now = saved["versions"], versions()
    others = [f"{name} {was.get(name)} -> {version}" for name, version in now.items() if was.get(name) != version]
    if others:
        warnings.warn(f"numbers may differ in rounding from here on: {', '.join(others)}", stacklevel=2)


def read_config(path: Path) -> Config:
    """The settings of a run. Raises ValueError, naming the file, if they cannot be read."""
    try:
        return from_json((path / "config.json").read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {error}") from error


def read_data(path: Path) -> dict[str, Any]:
    """What `dataset.json` says of the data that a run was trained on."""
    return json.loads((path / "dataset.json").read_text())


def told_by(data: Mapping[str, Any]) -> ConditionSpec:
    """What data have to tell of an example, of which `dataset.json` says this."""
    text = data.get("text")  # not in a run from before there were captions
    return told(data["class_names"], text["channels"] if text else 0)


def told(class_names: Sequence[str], text_channels: int = 0) -> ConditionSpec:
    """What data of these classes, and with captions of so many channels (0: without), have to tell of an example.

    A caption takes the class's place: a prompt of one's own comes without a class.
    """
    return ConditionSpec(num_classes=0 if text_channels else len(class_names), text_channels=text_channels)


def remember_data(path: Path, dataset: Dataset, text: TextEncoder | None = None) -> None:
    """Write `dataset.json`, with what embeds its captions. Raises as `check_data`."""
    first(lambda: _remember_data(path, dataset, text))


def check_data(path: Path, dataset: Dataset, text: TextEncoder | None = None) -> None:
    """Raises ValueError for a run, if there is one, that was trained on other data, or on other embeddings of them."""
    file = path / "dataset.json"
    if not file.exists():
        return
    before, embedded = json.loads(file.read_text()), _embedded(text)
    if before["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"{path} was trained on other data than is there now ({before['train']} training images then, "
            f"{len(dataset.train)} now): restore the data, or choose another --name"
        )
    if before.get("text") != embedded:
        raise ValueError(
            f"{path} was trained on captions embedded by {before.get('text')}, and this is {embedded}: give the "
            "--text.encoder that it had, or choose another --name"
        )


def _embedded(text: TextEncoder | None) -> dict[str, Any] | None:
    return None if text is None else {"channels": text.channels, "definition": text.definition}


def _remember_data(path: Path, dataset: Dataset, text: TextEncoder | None) -> None:
    check_data(path, dataset, text)
    facts = {
        "name": dataset.name,
        "resolution": dataset.resolution,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "attribution": dataset.attribution,
        "text": _embedded(text),
    }
    file = path / "dataset.json"
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(facts, indent=2) + "\n")
    aside.replace(file)


def stage1_state(config: Config, told: ConditionSpec = ConditionSpec()) -> TrainState:
    """Untrained encoder, prior and decoder with their optimizer, for data that have that much to tell. The prior is
    told it where it is the base too."""
    key = root_key(config.seed, "stage1 weights")
    model = UnifiedLatents(config.data.shape, config.model, told=told, prior_told=config.single_stage, key=key)
    control = None if config.rate.target_bits_per_pixel is None else Control.start(config.loss_factor)
    posthoc = len(config.train.posthoc_ema)
    return TrainState(model, make_optimizer(config.train), posthoc=posthoc, control=control)


def decoder_state(config: Config, model: UnifiedLatents, told: ConditionSpec) -> TrainState:
    """Untrained diffusion decoder for a trained encoder, with its optimizer."""
    decoder = make_decoder(model, config.model, told, key=root_key(config.seed, "decoder weights"))
    return TrainState(decoder, make_optimizer(config.train_decoder), posthoc=len(config.train_decoder.posthoc_ema))


def with_decoder(model: UnifiedLatents, decoder: DiffusionDecoder) -> UnifiedLatents:
    """That autoencoder with another decoder."""
    return eqx.tree_at(lambda m: m.decoder, model, decoder)


def stage2_state(config: Config, model: UnifiedLatents, told: ConditionSpec) -> TrainState:
    """Untrained base model with its optimizer."""
    base = make_base(model, config.model, told, key=root_key(config.seed, "stage2 weights"))
    return TrainState(base, make_optimizer(config.train_base), posthoc=len(config.train_base.posthoc_ema))


def adopt(config: Config) -> Config:
    """`config` with the autoencoder of the run that `config.autoencoder` names: all that stage 1 follows from.

    Raises:
        FileNotFoundError: no such run, or its stage 1 is not finished.
        ValueError: its images are of another resolution.
    """
    if config.autoencoder is None:
        return config
    path = Path(config.autoencoder)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"autoencoder={config.autoencoder} is not a run: it has no config.json")
    other = read_config(path)
    for stage, train in other.train_configs.items():
        if stage != "stage2" and _latest(path, stage) != train.steps:
            raise FileNotFoundError(f"{path} has not finished {stage}: continue it with --resume first")
    if other.data.resolution != config.data.resolution:
        raise ValueError(
            f"{path} was trained on images of {other.data.resolution} pixels, this run has {config.data.resolution}: "
            "give it the same --data.resolution"
        )
    taken = {name: getattr(other, name) for name in (*_STAGE_1, "train", "train_decoder")}
    return dataclasses.replace(config, model=dataclasses.replace(other.model, base=config.model.base), **taken)


_STAGE_1 = ("loss_factor", "sigmoid_bias", "prior_warmup", "prior_gradient", "kl_weight", "single_stage", "rate")
"""Fields that say how stage 1 was trained."""


def copy_autoencoder(config: Config) -> None:
    """Stage 1 of the run that `config.autoencoder` names, copied into this one's folder: the run stands on its own."""
    if config.autoencoder is not None:
        first(lambda: _copy_autoencoder(config, Path(config.autoencoder or "")))


def _copy_autoencoder(config: Config, source: Path) -> None:
    for stage in config.stages:
        target = config.path / "checkpoints" / stage
        if stage != "stage2" and not target.exists():
            shutil.copy(source / f"{stage}.jsonl", config.path / f"{stage}.jsonl")
            aside = target.with_name(f"{stage}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source / "checkpoints" / stage, aside)
            aside.rename(target)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run: EMA weights, ready to encode, decode and sample."""

    path: Path
    config: Config
    class_names: tuple[str, ...]
    model: UnifiedLatents
    base: Denoiser | None
    """None while stage 2 has no checkpoint, and beside another average of stage 1 than it was trained on."""
    step: tuple[int, int]
    """Steps of stage 1 and stage 2 in these weights; 0 for a stage that the run has not."""
    weights: str = "EMA"
    """Which average they are, in words."""
    text: Mapping[str, Any] | None = None
    """What embedded the captions that it was trained on: `definition` and `channels`."""

    @property
    def folder(self) -> Path:
        """Where what is made of the run goes: its own folder, or that of its file."""
        return self.path if self.path.is_dir() else self.path.parent

    def open_text(self, file: Path | None = None) -> TextEncoder:
        """What embeds prompts for this run: its own encoder, or, of a run that was trained on a file of embeddings,
        another file with those of new prompts, which is believed to be by the same encoder.

        Raises ValueError for a run without captions, or an encoder that cannot be the one that it was trained with;
        and as `ulx.text.examples.open_encoder`.
        """
        if self.text is None:
            raise ValueError(f"{self.path} was trained without captions (--data.captions): it takes no prompts")
        config = self.config.text
        encoder = open_encoder(config if file is None else dataclasses.replace(config, encoder=str(file)))
        known, found = dict(self.text), _embedded(encoder)
        if file is not None:  # of a file by other means the sha256 is all that its definition says
            known, found = {"channels": known["channels"]}, {"channels": encoder.channels}
        if known != found:
            raise ValueError(
                f"{self.path} was trained on captions embedded by {known}, and the encoder here is {found}"
            )
        return encoder

    def refuse_clips(self, what: str) -> None:
        """Raises ValueError for a run on clips, which `what` does not know."""
        if self.config.data.clips:
            raise ValueError(f"{self.path} was trained on clips, and {what} takes images alone")


def load(path: str | Path, *, ema: float | None = None, stage: Stage = "stage2", best: bool = False) -> Run:
    """Load a run's newest weights: the moving average of training or, with `ema`, one that its snapshots make.

    Args:
        path: the folder of a run, or the file that `python -m ulx.export` made of one.
        ema: σ_rel of an average up to the newest snapshot of `stage`, in place of that stage's moving average; needs a
            run that was trained with `posthoc_ema`. Warns if the snapshots cannot make it well (`ema.Synthesis`).
        stage: "stage2" is the base model. "stage1" is encoder, prior and decoder; then the base model, which knows the
            latents of the moving average's encoder, is left out.
        best: the moving average at the checkpoint of `stage` with the lowest loss, in place of the newest; needs a run
            that was trained with `keep_best`.

    Raises:
        FileNotFoundError: naming what is missing, for a folder that is no run or has no checkpoint or snapshot yet.
        ValueError: `ema` is out of range, the stage was trained without `posthoc_ema` or `keep_best`, both are asked
            for, or one of a file; or as `weights_file.WeightsFile`.
    """
    path = Path(path)
    if ema is not None and best:
        raise ValueError("ema and best are two choices of weights: give one of them")
    if path.is_file():
        if ema is not None or best:
            raise ValueError(
                f"{path} holds the one average that it was exported with: ask the run's folder for another"
            )
        return _from_file(path)
    if ema is not None:
        gamma_of(ema)  # refused before anything is read
    for file in ("config.json", "dataset.json"):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path} is not a run: it has no {file}")
    config = read_config(path)
    data = read_data(path)
    classes, text, known = tuple(data["class_names"]), data.get("text"), told_by(data)
    if (ema is not None or best) and stage not in config.stages:
        raise ValueError(f"{path} has no {stage} to choose weights of: it trained {', '.join(config.stages)}")
    weights = "EMA" if ema is None else f"EMA; {stage}: sigma_rel {ema:g}"
    width: Widths = {} if ema is None and not best else {stage: "best" if ema is None else float(ema)}
    if best:
        weights = f"EMA; {stage}: lowest loss"
    model, steps = autoencoder(path, config, known, width)
    if config.single_stage:
        assert isinstance(model.prior, Denoiser)
        return Run(path, config, classes, model, model.prior, (steps, 0), weights, text)
    if width and stage == "stage1":
        return Run(path, config, classes, model, None, (steps, 0), weights, text)
    base, base_steps = None, 0
    if _latest(path, "stage2") is not None:
        base, base_steps = _averaged(path, "stage2", stage2_state(config, model, known), config, width)
    elif stage in width:
        raise FileNotFoundError(f"{path} has no base model yet: finish stage 2 first (--resume)")
    return Run(path, config, classes, model, base, (steps, base_steps), weights, text)


def parts(model: UnifiedLatents, base: Denoiser | None) -> dict[str, Any]:
    """The models of a run by name, each once."""
    found = {"encoder": model.encoder, "prior": model.prior, "decoder": model.decoder, "base": base}
    return {
        name: part for name, part in found.items() if part is not None and (name != "base" or part is not model.prior)
    }


def _from_file(path: Path) -> Run:
    file = WeightsFile(path)
    config = from_json(json.dumps(file.facts["config"]))
    data, (steps, base_steps) = file.facts["dataset"], file.facts["steps"]
    classes, text, known = tuple(data["class_names"]), data.get("text"), told_by(data)
    model = stage1_state(config, known).model
    if "decoder" in config.stages:
        model = with_decoder(model, decoder_state(config, model, known).model)
    base = stage2_state(config, model, known).model if base_steps else None
    filled = file.filled(parts(model, base))
    where = lambda m: (m.encoder, m.prior, m.decoder)  # noqa: E731
    model = eqx.tree_at(where, model, tuple(filled[name] for name in ("encoder", "prior", "decoder")))
    base = model.prior if config.single_stage else filled.get("base")
    return Run(path, config, classes, model, base, (steps, base_steps), file.facts["weights"], text)


def autoencoder(
    path: Path, config: Config, told: ConditionSpec, width: Widths = MappingProxyType({})
) -> tuple[UnifiedLatents, int]:
    """The newest encoder, prior and decoder of a run, and the steps of its stage 1. Raises as `load`.

    `width` holds σ_rel, or "best", for a stage that is not to have the newest of its moving average.
    """
    state = stage1_state(config, told)
    model, steps = state.model, 0
    if "stage1" in config.stages:
        model, steps = _averaged(path, "stage1", state, config, width)
    if "decoder" in config.stages:
        decoder, _ = _averaged(path, "decoder", decoder_state(config, model, told), config, width)
        model = with_decoder(model, decoder)
    return model, steps


def _averaged(path: Path, stage: Stage, state: TrainState, config: Config, width: Widths) -> tuple[Any, int]:
    """What a stage trained, with one of its averages, whole on every device, and the step it ends at."""
    if not (path / "checkpoints" / stage).is_dir():
        raise FileNotFoundError(f"{path} has no checkpoint of {stage} yet: finish it first (--resume)")
    chosen, train = width.get(stage), config.train_configs[stage]
    if chosen == "best" and not train.keep_best:
        raise ValueError(f"{path} kept no best checkpoint of {stage}: train with {_OPTION[stage]}.keep-best")
    with Checkpoints(path / "checkpoints" / stage, keep_best=chosen == "best", read_only=True) as checkpoints:
        step = checkpoints.best if chosen == "best" else None
        state = checkpoints.restore(place(state, make_mesh()), step=step)
    if isinstance(chosen, float):
        return _synthesised(path, stage, train, state, chosen)
    return state.ema_model, int(state.step)


def _latest(path: Path, stage: str) -> int | None:
    if not (path / "checkpoints" / stage).is_dir():
        return None
    with Checkpoints(path / "checkpoints" / stage, read_only=True) as checkpoints:
        return checkpoints.latest


def _synthesised(path: Path, stage: Stage, train: TrainConfig, state: TrainState, sigma_rel: float) -> tuple[Any, int]:
    """The model of a stage with the average of width `sigma_rel`, and the step it ends at."""
    option = _OPTION[stage]
    if not train.posthoc_ema:
        raise ValueError(
            f"{path} kept no snapshots of {stage}, so it has the one average it was trained with: train with "
            f"{option}.posthoc-ema 0.05 0.10 to choose another afterwards"
        )
    snapshots = Snapshots(path / "snapshots" / stage, train.posthoc_ema)
    if not snapshots.steps:
        raise FileNotFoundError(f"{path} has no snapshot of {stage} yet: train on (--resume)")
    average, step, error = snapshots.average(sigma_rel, state.ema)
    if error > TOO_FAR:
        widths = ", ".join(f"{width:g}" for width in train.posthoc_ema)
        warnings.warn(
            f"sigma_rel={sigma_rel:g} is beyond what {len(snapshots.steps)} snapshots of widths {widths} can make: the "
            f"profile is off by {error:.0%} of its norm. Choose a width nearer to theirs, or train with more "
            f"{option}.posthoc-snapshots",
            stacklevel=3,
        )
    return eqx.combine(average, state.model), step
