"""What benchmarks share: train with some settings, measure the run once, and keep the result as a line of a file."""

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulx.config import Config, TrainConfig

__all__ = ["RESULTS", "identity", "measured", "of_length", "read", "resumable", "stage1", "whole"]

RESULTS = Path(__file__).parent / "results"


def identity(config: "Config") -> str:
    """What makes a measured point this one: all settings that it was trained and measured with. The code is not among
    them: after a change of the method, take its lines out of the file."""
    from ulx.config import fingerprint

    # Where an autoencoder was copied from tells nothing that its settings, which the configuration holds too, do not.
    where = ("name", "runs", "resume", "autoencoder", "data.cache_dir", "data.workers")
    more = ("evaluate.inception_weights", "evaluate.inception_resize", "evaluate.lpips")  # adds to what is measured
    return fingerprint(config, ignore=(*where, *more))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def of_length(train: "TrainConfig", steps: int) -> "TrainConfig":
    """That recipe in so many steps: its warm-up and the reach of its average are cut, or grow, with them."""
    part = steps / train.steps
    return dataclasses.replace(
        train,
        steps=steps,
        warmup_steps=round(part * train.warmup_steps),
        ema_decay=max(0.0, 1 - (1 - train.ema_decay) / part),
    )


def resumable(config: "Config") -> "Config":
    """`config`, to be continued if its run was begun; with an autoencoder of its own if the run to copy is gone."""
    if config.autoencoder is not None and not (Path(config.autoencoder) / "config.json").exists():
        config = dataclasses.replace(config, autoencoder=None)
    return dataclasses.replace(config, resume=(config.path / "config.json").exists())


def stage1(config: "Config") -> dict[str, Any]:
    """Train stage 1 and measure it on held-out images: bits and PSNR."""
    from ulx import job, runs
    from ulx.data import open_dataset
    from ulx.evaluation import evaluate_autoencoder
    from ulx.metrics_log import read_metrics
    from ulx.stages import collapsed

    path = runs.open_folder(config)
    dataset = open_dataset(config.data)
    runs.remember_data(path, dataset)
    model = job.train_autoencoder(runs.stage1_state(config), dataset, config)
    found = evaluate_autoencoder(model, dataset, config)
    log = read_metrics(path / "stage1.jsonl")
    return {
        "loss_factor": log[-1].get("felt_loss_factor", config.loss_factor),
        "target_bits_per_pixel": config.rate.target_bits_per_pixel,
        "bits_per_pixel": found["bits_per_pixel"],
        "psnr": found["psnr"],
        "collapsed": collapsed(config, log),
    }


def whole(config: "Config") -> dict[str, Any]:
    """The main job with these settings, report and all; the point is its metrics.json."""
    from ulx import job

    metrics = job.run(config).parent / "evaluation" / "metrics.json"
    return {"loss_factor": config.loss_factor, "sigmoid_bias": config.decoder_weighting.bias} | json.loads(
        metrics.read_text()
    )


def measured(config: "Config", file: Path, measure: Callable[["Config"], dict[str, Any]] = stage1) -> dict[str, Any]:
    """The point of `config`: as it is in `file` already, or else measured and added to it."""
    name = identity(config)
    for point in read(file):
        if point.get("settings") == name:
            return point
    point = measure(resumable(config)) | {
        "steps": config.train.steps,
        "base_steps": config.train_base.steps,
        "seed": config.seed,
        "settings": name,
        "data": json.loads((config.path / "dataset.json").read_text())["fingerprint"],
        "machine": f"{platform.processor() or platform.machine()}, CPU",
        "date": datetime.date.today().isoformat(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(point) + "\n")
    return point
