"""A run's folder: what is written there, and what it refuses to go on with.

runs/NAME/
    config.json           every setting
    dataset.json          which data, its classes, what embedded its captions
    stage1.jsonl, stage2.jsonl, tensorboard/   metrics while training, for each stage that the run has
    checkpoints/stage1, checkpoints/stage2     and decoder, likewise, if it is trained by itself
    latents/, text/                            what stage 2 reads, and captions' embeddings: made once, read from there
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
from typing import Any

from ulx.aside import write_aside
from ulx.checkpoint import Checkpoints, versions
from ulx.config import Config, differences, from_json, to_json
from ulx.data.source import Dataset
from ulx.nn.conditions import ConditionSpec
from ulx.processes import first
from ulx.text.encoders import TextEncoder

__all__ = [
    "adopt",
    "check_data",
    "check_facts",
    "copy_autoencoder",
    "described",
    "facts",
    "latest",
    "open_folder",
    "read_config",
    "read_data",
    "remember_data",
    "spec_in",
    "spec_of",
]

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
    *(f"model.{network}.block.remat" for network in ("prior", "decoder", "base")),
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
"""Fields that may change between the parts of an interrupted run: they do not touch what is trained, but for rounding.
"""
STAGE_1 = ("loss_factor", "sigmoid_bias", "prior_warmup", "prior_gradient", "kl_weight", "single_stage", "rate")
"""Fields that say how stage 1 was trained."""


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
    with write_aside(written) as aside:
        aside.write_text(to_json(config))


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


def spec_in(data: Mapping[str, Any]) -> ConditionSpec:
    """What data have to tell of an example, of which `dataset.json` says this."""
    text = data.get("text")  # not in a run from before there were captions
    return spec_of(data["class_names"], text["channels"] if text else 0)


def spec_of(class_names: Sequence[str], text_channels: int = 0) -> ConditionSpec:
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
    before, embedded = json.loads(file.read_text()), described(text)
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


def described(text: TextEncoder | None) -> dict[str, Any] | None:
    """What `dataset.json` says of an encoder of captions; None without captions."""
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
        "text": described(text),
    }
    with write_aside(path / "dataset.json") as aside:
        aside.write_text(json.dumps(facts, indent=2) + "\n")


def latest(path: Path, stage: str) -> int | None:
    """The newest checkpoint of a stage; None where it has none."""
    if not (path / "checkpoints" / stage).is_dir():
        return None
    with Checkpoints(path / "checkpoints" / stage, read_only=True) as checkpoints:
        return checkpoints.latest


def adopt(config: Config, text: TextEncoder | None = None) -> Config:
    """`config` with the autoencoder of the run that `config.autoencoder` names: all that stage 1 follows from. `text`
    embeds the captions of this run.

    Raises:
        FileNotFoundError: no such run, or its stage 1 is not finished.
        ValueError: its images are of another resolution, or its decoder knows captions by another encoder.
    """
    if config.autoencoder is None:
        return config
    path = Path(config.autoencoder)
    if not (path / "config.json").exists():
        if not _has_copy(config):
            raise FileNotFoundError(f"autoencoder={config.autoencoder} is not a run: it has no config.json")
        path = config.path
    other = read_config(path)
    for stage, train in other.train_configs.items():
        if stage != "stage2" and latest(path, stage) != train.steps:
            raise FileNotFoundError(f"{path} has not finished {stage}: continue it with --resume first")
    if other.data.resolution != config.data.resolution:
        raise ValueError(
            f"{path} was trained on images of {other.data.resolution} pixels, this run has {config.data.resolution}: "
            "give it the same --data.resolution"
        )
    if other.model.decoder_text and (embedded := read_data(path).get("text")) != described(text):
        raise ValueError(
            f"the decoder of {path} was trained on captions embedded by {embedded}, and this run has "
            f"{described(text)}: give the --data.captions and --text.encoder that it had"
        )
    taken = {name: getattr(other, name) for name in (*STAGE_1, "train", "train_decoder")}
    return dataclasses.replace(config, model=dataclasses.replace(other.model, base=config.model.base), **taken)


def _has_copy(config: Config) -> bool:
    """Whether this run, which goes on, has copied that autoencoder already."""
    if not config.resume or not (config.path / "config.json").exists():
        return False
    before = read_config(config.path)
    stages = [stage for stage in before.stages if stage != "stage2"]
    copied = all((config.path / "checkpoints" / stage).exists() for stage in stages)
    return before.autoencoder == config.autoencoder and copied


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
