"""A run's folder, and loading what was trained in it.

runs/NAME/
    config.json           every setting
    dataset.json          which data, its classes
    stage1.jsonl, stage2.jsonl, tensorboard/   metrics while training
    checkpoints/stage1, checkpoints/stage2
    snapshots/stage1, snapshots/stage2         averages to make others of (`posthoc_ema`)
    evaluation/           metrics.json, pictures.npz
    report.html, figures/
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import equinox as eqx

from ulx.checkpoint import Checkpoints
from ulx.config import Config, TrainConfig, differences, from_json, to_json
from ulx.data.source import Dataset
from ulx.ema import gamma_of
from ulx.models import Denoiser, UnifiedLatents
from ulx.seeding import root_key
from ulx.snapshots import Snapshots
from ulx.stages import make_base
from ulx.training import TrainState, make_optimizer

__all__ = ["Run", "Stage", "load", "open_folder", "read_config", "remember_data", "stage1_state", "stage2_state"]

Stage = Literal["stage1", "stage2"]

HARMLESS = (
    "resume",
    "runs",
    "name",
    "sample",
    "evaluate",
    "data.path",  # the data itself is known by its fingerprint
    "data.cache_dir",
    "data.workers",
    *(
        f"{stage}.{field}"
        for stage in ("train", "train_base")
        for field in ("log_every", "save_every", "posthoc_snapshots")
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
    return path


def read_config(path: Path) -> Config:
    """The settings of a run. Raises ValueError, naming the file, if they cannot be read."""
    try:
        return from_json((path / "config.json").read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {error}") from error


def remember_data(path: Path, dataset: Dataset) -> None:
    """Write `dataset.json`; a run that is resumed on other data is refused with ValueError."""
    facts = {
        "name": dataset.name,
        "resolution": dataset.resolution,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "attribution": dataset.attribution,
    }
    file = path / "dataset.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before["fingerprint"] != dataset.fingerprint:
            raise ValueError(
                f"{path} was trained on other data than is there now ({before['train']} training images then, "
                f"{len(dataset.train)} now): restore the data, or choose another --name"
            )
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(facts, indent=2) + "\n")
    aside.replace(file)


def stage1_state(config: Config) -> TrainState:
    """Untrained encoder, prior and decoder with their optimizer."""
    shape = (config.data.resolution, config.data.resolution, 3)
    model = UnifiedLatents(shape, config.model, key=root_key(config.seed, "stage1 weights"))
    return TrainState(model, make_optimizer(config.train), posthoc=len(config.train.posthoc_ema))


def stage2_state(config: Config, model: UnifiedLatents, num_classes: int) -> TrainState:
    """Untrained base model with its optimizer."""
    base = make_base(model, config, num_classes, key=root_key(config.seed, "stage2 weights"))
    return TrainState(base, make_optimizer(config.train_base), posthoc=len(config.train_base.posthoc_ema))


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
    """Steps of stage 1 and stage 2 in these weights."""
    weights: str = "EMA"
    """Which average they are, in words."""


def load(path: str | Path, *, ema: float | None = None, stage: Stage = "stage2") -> Run:
    """Load a run's newest weights: the moving average of training or, with `ema`, one that its snapshots make.

    Args:
        ema: σ_rel of an average up to the newest snapshot of `stage`, in place of that stage's moving average; needs a
            run that was trained with `posthoc_ema`. Warns if the snapshots cannot make it well (`ema.Synthesis`).
        stage: "stage2" is the base model. "stage1" is encoder, prior and decoder; then the base model, which knows the
            latents of the moving average's encoder, is left out.

    Raises:
        FileNotFoundError: naming what is missing, for a folder that is no run or has no checkpoint or snapshot yet.
        ValueError: `ema` is out of range, or the stage was trained without `posthoc_ema`.
    """
    path = Path(path)
    if ema is not None:
        gamma_of(ema)  # refused before anything is read
    for file in ("config.json", "dataset.json"):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path} is not a run: it has no {file}")
    config = read_config(path)
    class_names = tuple(json.loads((path / "dataset.json").read_text())["class_names"])
    if not (path / "checkpoints" / "stage1").is_dir():
        raise FileNotFoundError(f"{path} has no checkpoint yet: finish stage 1 first (--resume)")
    with Checkpoints(path / "checkpoints" / "stage1") as checkpoints:
        state = checkpoints.restore(stage1_state(config))
    weights = "EMA" if ema is None else f"EMA; {stage}: sigma_rel {ema:g}"
    if ema is not None and stage == "stage1":
        model, step = _synthesised(path, stage, config.train, state, ema)
        return Run(path, config, class_names, model, None, (step, 0), weights)
    model, base, steps = state.ema_model, None, 0
    if (path / "checkpoints" / "stage2").is_dir():
        with Checkpoints(path / "checkpoints" / "stage2") as checkpoints:
            if checkpoints.latest is not None:
                base_state = checkpoints.restore(stage2_state(config, model, len(class_names)))
                base, steps = base_state.ema_model, int(base_state.step)
                if ema is not None:
                    base, steps = _synthesised(path, stage, config.train_base, base_state, ema)
    if ema is not None and base is None:
        raise FileNotFoundError(f"{path} has no base model to average yet: finish stage 2 first (--resume)")
    return Run(path, config, class_names, model, base, (int(state.step), steps), weights)


def _synthesised(path: Path, stage: Stage, train: TrainConfig, state: TrainState, sigma_rel: float) -> tuple[Any, int]:
    """The model of a stage with the average of width `sigma_rel`, and the step it ends at."""
    option = "--train" if stage == "stage1" else "--train-base"
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
