"""The main job from end to end: data → stage 1 → stage 2 → evaluation → report. Every experiment runs this."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax

from ulx import processes, run_folder, runs, sharding
from ulx.checkpoint import Checkpoints
from ulx.config import Config
from ulx.cost import network_costs
from ulx.data import open_dataset
from ulx.data.pipeline import train_batches
from ulx.data.source import Dataset
from ulx.data.split import LEAST
from ulx.denoiser import Denoiser
from ulx.evaluation import check_measurable, evaluate, networks
from ulx.evaluation_data import evaluation_facts
from ulx.guard import Guard
from ulx.latents import encoded
from ulx.metrics_log import MetricsLog, read_metrics
from ulx.models import UnifiedLatents
from ulx.progress import duration
from ulx.rate_control import RateController, held_out_images
from ulx.rows import Store
from ulx.seeding import root_int, root_key
from ulx.snapshots import Snapshots
from ulx.stages import CollapseWatch, autoencoder_loss, base_loss, collapsed, decoder_loss
from ulx.text.encoders import TextEncoder
from ulx.text.examples import Remembered, captions_of, embedded, open_encoder, with_text
from ulx.text.precomputed import Precomputed
from ulx.training import Controller, Loss, TrainState, fit, make_optimizer, make_step, pace

__all__ = ["check_trainable", "cost", "encoding", "measure", "run", "train_autoencoder", "train_base", "train_stage"]


def run(config: Config) -> Path:
    """Train, evaluate and report; returns the path of the report. With `config.resume`, continue where it stopped."""
    began = time.monotonic()
    # Whatever can be refused is refused before the folder is taken, let alone after hours of training.
    check_trainable(config)
    check_measurable(config)
    networks(config)
    encoder = open_encoder(config.text) if config.data.captions else None
    config = run_folder.adopt(config, encoder)
    mesh = sharding.make_mesh(config.fsdp)
    for stage, train in config.train_configs.items():
        if stage != "stage2" and config.autoencoder is not None:
            continue  # trained already
        sharding.check_batch(train.batch_size, mesh, pieces=train.accumulate, of=stage)
    dataset = processes.in_turn(lambda: open_dataset(config.data))
    if len(dataset.validation) < LEAST:
        raise ValueError(
            f"{dataset.name} has {len(dataset.validation)} held-out {config.data.unit}, and {LEAST} are needed to "
            "measure on: more files, or a larger --data.limit"
        )
    if isinstance(encoder, Precomputed):
        encoder.require([*captions_of(dataset), *config.evaluate.prompts])
    spec = run_folder.spec_of(dataset.class_names, encoder.channels if encoder else 0)
    state = runs.stage1_state(config, spec)
    if config.resume:  # before the folder learns of other settings
        run_folder.check_data(config.path, dataset, encoder)
    path = run_folder.open_folder(config)
    text = embedded(dataset, encoder, path / "text") if encoder else None
    run_folder.remember_data(path, dataset, text)
    run_folder.copy_autoencoder(config)
    training, held_out = len(dataset.train), len(dataset.validation)
    print(f"{dataset.name}: {training} training and {held_out} held-out {config.data.unit} -> {path}")

    if config.autoencoder is None:
        model = train_autoencoder(state, dataset, config, text)
    else:
        model, _ = runs.autoencoder(path, config, spec)
    prompts = Remembered(text, encoder) if text and encoder else None
    written = measure(path, model, train_base(model, dataset, config, text), dataset, config, prompts)
    print(f"{duration(time.monotonic() - began)} in all -> {written}")
    return written


def train_autoencoder(
    state: TrainState, dataset: Dataset, config: Config, text: Precomputed | None = None
) -> UnifiedLatents:
    """Everything before the base model, from `runs.stage1_state` on; returns the averaged weights."""
    model = state.model
    if config.model.decoder_text or config.single_stage:
        dataset = with_text(dataset, text)
    if "stage1" in config.stages:
        controller = None
        if config.rate.target_bits_per_pixel is not None:
            key = root_key(config.seed, "rate control")
            controller = RateController(
                config.rate,
                pace(config.train),
                config.train.ema_decay,
                config.prior_warmup[1],
                held_out_images(dataset, config.rate.images),
                key,
            )
        loss, watch = autoencoder_loss(config), CollapseWatch(config)
        state = train_stage("stage1", state, None, loss, dataset, config, watch, controller)
        model = state.ema_model
        if state.control is not None:
            found = float(state.control.felt_loss_factor)
            print(f"rate control ended at --loss-factor {found:.4g}, which is to give about the same rate without it")
            config = dataclasses.replace(config, loss_factor=found)
    if "decoder" in config.stages:
        spec = run_folder.spec_of(dataset.class_names, text.channels if text else 0)
        untrained = runs.decoder_state(config, model, spec)
        decoder = train_stage("decoder", untrained, model, decoder_loss(config), dataset, config).ema_model
        model = runs.with_decoder(model, decoder)
    return model


def train_base(model: UnifiedLatents, dataset: Dataset, config: Config, text: Precomputed | None = None) -> Denoiser:
    """Stage 2 on a trained autoencoder; returns the averaged weights. In a single stage the prior is the base."""
    if config.single_stage:
        assert isinstance(model.prior, Denoiser)  # Config refuses the others
        return model.prior
    untrained = runs.stage2_state(config, model, run_folder.spec_of(dataset.class_names, text.channels if text else 0))
    examples = dataset
    if config.cache_latents:
        examples = encoded(
            dataset,
            model,
            config.path / "latents",
            batch_size=config.evaluate.batch_size,
            flip=config.data.flip,
            first=config.model.given_frames,
        )
    loss = base_loss(config, math.prod(model.shape[:-1]))
    return train_stage("stage2", untrained, model, loss, with_text(examples, text), config).ema_model


def measure(
    path: Path,
    model: UnifiedLatents,
    base: Denoiser,
    dataset: Dataset,
    config: Config,
    text: TextEncoder | None = None,
    *,
    weights: str = "EMA",
) -> Path:
    """Evaluate a trained run and write its report; returns the report's path. `weights` says which average it is.

    What an interrupted evaluation of the same weights has made is not made again.
    """
    from ulx.report import document

    began = time.monotonic()
    model, base = sharding.place((model, base), sharding.make_mesh())
    store = Store.begin(path / "evaluation" / "unfinished", evaluation_facts(model, base, dataset, config, text))
    evaluation = evaluate(model, base, dataset, config, text, store)
    logs = {stage: read_metrics(path / f"{stage}.jsonl") for stage in config.stages}
    evaluation.metrics["collapsed"] = collapsed(config, logs.get("stage1", []))
    evaluation.metrics["weights"] = weights
    evaluation.metrics["cost"] = cost(model, base, config) | {
        **{f"seconds_{stage}": log[-1]["time"] for stage, log in logs.items()},
        "seconds_evaluation": round(time.monotonic() - began),
        "device": jax.devices()[0].device_kind,
    }

    def write() -> None:
        evaluation.save(path / "evaluation")
        document.write(path)

    processes.first(write)
    store.finish()
    return path / "report.html"


def train_stage(
    name: str,
    state: TrainState,
    frozen: Any,
    loss: Loss,
    dataset: Dataset,
    config: Config,
    on_log=lambda step, metrics: None,
    controller: Controller | None = None,
) -> TrainState:
    """One stage: restore its newest checkpoint if there is one, train what is left."""
    train, mesh = config.train_configs[name], sharding.make_mesh(config.fsdp)
    state, frozen = sharding.place((state, frozen), mesh)
    are_images = "image" in dataset.train[0]  # latents come mirrored already, and are read from shards
    batches = train_batches(
        dataset,
        batch_size=train.batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        seed=root_int(config.seed, f"{name} data"),
        flip=config.data.flip and are_images,
        workers=config.data.workers if are_images else 0,
    )
    folder, guard = config.path / "checkpoints" / name, Guard.of(state.model, train)
    with Checkpoints(folder, run_folder.facts(config), keep_best=train.keep_best) as checkpoints:
        if checkpoints.latest is not None:
            positions = {"data": batches, "guard": guard}
            state = checkpoints.restore(state, positions, check=lambda facts: run_folder.check_facts(facts, config))
        with MetricsLog(config.path / f"{name}.jsonl", resume_step=int(state.step)) as log:
            return fit(
                state,
                make_step(loss, make_optimizer(train), train, key=root_key(config.seed, f"{name} steps"), mesh=mesh),
                frozen,
                batches,
                train,
                guard=guard,
                mesh=mesh,
                checkpoints=checkpoints,
                snapshots=Snapshots(config.path / "snapshots" / name, train.posthoc_ema),
                log=log,
                name=name,
                controller=controller,
                on_log=on_log,
            )


def check_trainable(config: Config) -> None:
    """Raises ValueError for settings by which stage 2 would see less of the data than there is. They are no fault of a
    run that was trained by them before, which can be read."""
    of_files = config.data.clips and config.data.source in ("folder", "prepared")
    if of_files and config.cache_latents and "stage2" in config.stages:
        raise ValueError(
            f"cache_latents keeps one encoding of each example, and clips of --data.source {config.data.source} begin "
            "anywhere in their videos: give --no-cache-latents, or stage 2 would see the first frames alone"
        )


def encoding(config: Config, forward: int) -> dict[str, int]:
    """FLOPs of the stages whose frozen encoder sees every batch anew, with its `forward` FLOPs per example. It works in
    float32 whatever they are trained in. Cached latents are encoded once, and count for nothing."""
    anew = {"decoder": True, "stage2": not config.cache_latents}
    return {
        stage: train.steps * train.batch_size * forward
        for stage, train in config.train_configs.items()
        if anew.get(stage, False)
    }


def cost(model, base, config: Config) -> dict[str, Any]:
    """Forward FLOPs per image of each network, and of the whole training (3 × forward, the paper's convention)."""
    costs = network_costs(model, base, config.text.length)
    examples = {stage: train.steps * train.batch_size for stage, train in config.train_configs.items()}
    trained = {"stage1": ("encoder", "prior", "decoder"), "decoder": ("decoder",), "stage2": ("base",)}
    training = {
        stage: examples[stage] * sum(costs[name].training_flops for name in trained[stage]) for stage in config.stages
    }
    for stage, flops in encoding(config, costs["encoder"].forward_flops).items():
        training[stage] += flops
    return {
        "parameters": {name: cost.parameters for name, cost in costs.items()},
        "forward_flops_per_image": {name: cost.forward_flops for name, cost in costs.items()},
        **{f"training_flops_{stage}": flops for stage, flops in training.items()},
    }
