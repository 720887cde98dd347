"""What benchmarks of stage 1 share: train it with some settings, measure it once, and keep the result in a file."""

import datetime
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulx.config import Config

__all__ = ["RESULTS", "identity", "measured", "read", "stage1"]

RESULTS = Path(__file__).parent / "results"


def identity(config: "Config") -> str:
    """What makes a measured point this one: everything that it was trained and measured with."""
    from ulx.config import fingerprint

    return fingerprint(config, ignore=("name", "runs", "resume", "data.cache_dir", "data.workers"))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measured(config: "Config", file: Path) -> dict[str, Any]:
    """The point of `config`: as it is in `file` already, or else trained, measured and added to it."""
    name = identity(config)
    for point in read(file):
        if point.get("settings") == name:
            return point
    point = stage1(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(point) + "\n")
    return point


def stage1(config: "Config") -> dict[str, Any]:
    """Train stage 1 with these settings, continuing an interrupted run of them, and measure it on held-out images."""
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
        "loss_factor": log[-1].get("loss_factor", config.loss_factor),
        "target_bits_per_pixel": config.rate.target_bits_per_pixel,
        "steps": config.train.steps,
        "seed": config.seed,
        "settings": identity(config),
        "bits_per_pixel": found["bits_per_pixel"],
        "psnr": found["psnr"],
        "collapsed": collapsed(config, log),
        "data": dataset.fingerprint,
        "machine": f"{platform.processor() or platform.machine()}, CPU",
        "date": datetime.date.today().isoformat(),
    }
