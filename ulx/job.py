"""The main job from end to end: data → stage 1 → stage 2 → evaluation → report. Every experiment runs this."""

import time
from pathlib import Path
from typing import Any

import jax

from ulx import runs
from ulx.checkpoint import Checkpoints
from ulx.config import Config, TrainConfig
from ulx.cost import network_costs
from ulx.data import open_dataset
from ulx.data.pipeline import train_batches
from ulx.data.source import Dataset
from ulx.evaluation import evaluate
from ulx.latents import encoded
from ulx.metrics import efficientnet
from ulx.metrics_log import MetricsLog, read_metrics
from ulx.models import Denoiser, UnifiedLatents
from ulx.progress import duration
from ulx.seeding import root_int, root_key
from ulx.snapshots import Snapshots
from ulx.stages import CollapseWatch, autoencoder_loss, base_loss, collapsed
from ulx.training import Loss, TrainState, fit, make_optimizer, make_step

__all__ = ["cost", "measure", "run", "train_stage"]


def run(config: Config) -> Path:
    """Train, evaluate and report; returns the path of the report. With `config.resume`, continue where it stopped."""
    began = time.monotonic()
    # Whatever can be refused is refused before the folder is taken, let alone after hours of training.
    efficientnet.load()
    dataset = open_dataset(config.data)
    state = runs.stage1_state(config)
    path = runs.open_folder(config)
    runs.remember_data(path, dataset)
    print(f"{dataset.name}: {len(dataset.train)} training and {len(dataset.validation)} held-out images -> {path}")

    watch = CollapseWatch(config)
    model = train_stage("stage1", state, None, autoencoder_loss(config), dataset, config, config.train, watch).ema_model
    untrained = runs.stage2_state(config, model, len(dataset.class_names))
    examples = dataset
    if config.cache_latents:
        examples = encoded(dataset, model, batch_size=config.evaluate.batch_size, flip=config.data.flip)
    base = train_stage("stage2", untrained, model, base_loss(config), examples, config, config.train_base).ema_model
    written = measure(path, model, base, dataset, config)
    print(f"{duration(time.monotonic() - began)} in all -> {written}")
    return written


def measure(
    path: Path, model: UnifiedLatents, base: Denoiser, dataset: Dataset, config: Config, *, weights: str = "EMA"
) -> Path:
    """Evaluate a trained run and write its report; returns the report's path. `weights` says which average it is."""
    from ulx import report

    began = time.monotonic()
    evaluation = evaluate(model, base, dataset, config)
    logs = {stage: read_metrics(path / f"{stage}.jsonl") for stage in ("stage1", "stage2")}
    evaluation.metrics["weights"] = weights
    evaluation.metrics["collapsed"] = collapsed(config, logs["stage1"])
    evaluation.metrics["cost"] = cost(model, base, config) | {
        "seconds_stage1": logs["stage1"][-1]["time"],
        "seconds_stage2": logs["stage2"][-1]["time"],
        "seconds_evaluation": round(time.monotonic() - began),
        "device": jax.devices()[0].device_kind,
    }
    evaluation.save(path / "evaluation")
    return report.write(path)


def train_stage(
    name: str,
    state: TrainState,
    frozen: Any,
    loss: Loss,
    dataset: Dataset,
    config: Config,
    train: TrainConfig,
    on_log=lambda step, metrics: None,
) -> TrainState:
    """One stage: restore its newest checkpoint if there is one, train what is left."""
    are_images = "image" in dataset.train[0]  # latents come mirrored already, and from memory
    batches = train_batches(
        dataset,
        batch_size=train.batch_size,
        seed=root_int(config.seed, f"{name} data"),
        flip=config.data.flip and are_images,
        workers=config.data.workers if are_images else 0,
    )
    with Checkpoints(config.path / "checkpoints" / name) as checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.restore(state, batches)
        with MetricsLog(config.path / f"{name}.jsonl", resume_step=int(state.step)) as log:
            return fit(
                state,
                make_step(loss, make_optimizer(train), train, key=root_key(config.seed, f"{name} steps")),
                frozen,
                batches,
                train,
                checkpoints=checkpoints,
                snapshots=Snapshots(config.path / "snapshots" / name, train.posthoc_ema),
                log=log,
                name=name,
                on_log=on_log,
            )


def cost(model, base, config: Config) -> dict[str, Any]:
    """Forward FLOPs per image of each network, and of the whole training (3 × forward, the paper's convention)."""
    costs = network_costs(model, base)
    stage1 = sum(costs[name].training_flops for name in ("encoder", "prior", "decoder"))
    # Cached latents are encoded once, which does not count; otherwise the frozen encoder runs forward only.
    stage2 = costs["base"].training_flops + (0 if config.cache_latents else costs["encoder"].forward_flops)
    return {
        "parameters": {name: cost.parameters for name, cost in costs.items()},
        "forward_flops_per_image": {name: cost.forward_flops for name, cost in costs.items()},
        "training_flops_stage1": stage1 * config.train.steps * config.train.batch_size,
        "training_flops_stage2": stage2 * config.train_base.steps * config.train_base.batch_size,
    }
