"""What a run would cost, without running it: parameters, FLOPs, memory, time.

Weights are shapes alone. The training steps are compiled, for the memory that they would take beside the weights; that
is the compiler's own account for the device at hand, of one device with its part of the batch. The time is the FLOPs
(`ulx.flops`, the paper's convention) over this device's matrix-multiply speed, measured now, at an assumed share of it.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ulx import job, run_folder, runs
from ulx.config import Config, TrainConfig
from ulx.data import num_classes
from ulx.denoiser import Denoiser
from ulx.models import UnifiedLatents
from ulx.nn.conditions import ConditionSpec
from ulx.progress import duration
from ulx.sharding import bytes_per_device, check_batch, make_mesh
from ulx.stages import autoencoder_loss, base_loss, decoder_loss
from ulx.text.examples import channels_of, open_encoder
from ulx.training import Loss, TrainState, make_optimizer, make_step

__all__ = ["SHARE", "Plan", "PlannedStep", "describe", "matmul_speed", "planned"]

SHARE = 0.4
"""Of the matrix-multiply speed that training is assumed to reach: assumed, not measured."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """What a stage's training step is compiled from. Its arrays may be shapes alone."""

    train: TrainConfig
    loss: Loss
    state: PyTree
    frozen: PyTree
    batch: PyTree

    def lower(self, devices: int = 1) -> jax.stages.Lowered:
        """The step on one device with its part of the batch, of so many devices, which divide it evenly."""
        part = lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // devices, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
        batch = jax.tree.map(part, self.batch)
        mesh = make_mesh(devices=jax.devices()[:1])
        optimizer = make_optimizer(self.train)
        step = make_step(self.loss, optimizer, self.train, key=jax.random.key(0), mesh=mesh).__wrapped__
        is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct) or eqx.is_array(leaf)  # noqa: E731
        arrays, static = eqx.partition((self.state, self.frozen, batch), is_shape)

        def on_arrays(state: PyTree, rest: PyTree):
            state, frozen, batch = eqx.combine((state, *rest), static)
            return eqx.filter(step((frozen, batch), state), eqx.is_array)

        return jax.jit(on_arrays, donate_argnums=0).lower(arrays[0], arrays[1:])

    def memory(self, devices: int = 1) -> int:
        """Bytes that the step takes on each of so many devices beside its arguments, by the compiler."""
        analysis: Any = self.lower(devices).compile().memory_analysis()
        return analysis.temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Untrained networks, and the steps of the stages that train them."""

    model: UnifiedLatents
    base: Denoiser
    steps: dict[str, PlannedStep]


def planned(
    config: Config, spec: ConditionSpec, make: Callable[[Callable[[], TrainState]], TrainState] = eqx.filter_eval_shape
) -> Plan:
    """What a run would train. Its arrays are shapes alone, or with `make` what that makes of the calls."""
    states = {"stage1": make(lambda: runs.stage1_state(config, spec))}
    model = states["stage1"].model
    losses = {"stage1": autoencoder_loss(config)}
    if "decoder" in config.stages:
        states["decoder"] = make(lambda: runs.decoder_state(config, model, spec))
        losses["decoder"] = decoder_loss(config)
    if not config.single_stage:
        states["stage2"] = make(lambda: runs.stage2_state(config, model, spec))
        losses["stage2"] = base_loss(config, math.prod(config.data.shape[:-1]))
    steps = {}
    for stage, train in config.train_configs.items():
        frozen, batch = None if stage == "stage1" else model, _batch_shapes(config, model, stage, train, spec)
        steps[stage] = PlannedStep(train, losses[stage], states[stage], frozen, batch)
    return Plan(model, model.prior if config.single_stage else states["stage2"].model, steps)


def describe(config: Config, *, compiled: bool = True) -> str:
    """The networks and the stages of a run, as two tables. Compiling takes from seconds to minutes."""
    job.check_trainable(config)
    if config.autoencoder is not None:
        config = run_folder.adopt(config, open_encoder(config.text) if config.data.captions else None)
    classes = num_classes(config.data)
    channels = channels_of(config.text) if config.data.captions else 0
    plan = planned(config, run_folder.spec_of(("",) * classes, channels))
    model, base = plan.model, plan.base
    cost = job.cost(model, base, config)
    lines = [
        f"{config.name} ({config.preset}, {config.variant}): {_shape(config.data.shape)} {config.data.unit} from "
        f"{config.data.source}, {classes} class{'es' * (classes != 1)}, latents {_shape(model.latent_shape)}",
        "",
        f"{'network':<10}{'parameters':>12}{'forward GFLOPs':>16}",
    ]
    for name, parameters in cost["parameters"].items():
        lines.append(f"{name:<10}{parameters / 1e6:>10.1f} M{cost['forward_flops_per_image'][name] / 1e9:>16,.1f}")
    mesh = make_mesh()
    for stage, train in config.train_configs.items():
        check_batch(train.batch_size, mesh, pieces=train.accumulate, of=stage)
    devices = mesh.size
    encoding = job.encoding(config, cost["forward_flops_per_image"]["encoder"])
    dtypes = {train.dtype for train in config.train_configs.values()} | ({"float32"} if encoding else set())
    speeds = {dtype: matmul_speed(dtype) for dtype in sorted(dtypes)}
    lines += ["", f"{'stage':<10}{'steps':>10}{'batch':>7}{'FLOPs':>10}{'weights':>11}{'the step':>11}{'time':>12}"]
    steps = {name: step for name, step in plan.steps.items() if name == "stage2" or config.autoencoder is None}
    for stage, step in steps.items():
        train, flops = step.train, cost[f"training_flops_{stage}"]
        held = bytes_per_device((step.state, step.frozen), config.fsdp)
        taken = step.memory(devices) if compiled else None
        in_float32 = encoding.get(stage, 0)
        seconds = (flops - in_float32) / speeds[train.dtype] + in_float32 / speeds.get("float32", math.inf)
        seconds /= devices * SHARE
        lines.append(
            f"{stage:<10}{train.steps:>10,}{train.batch_size:>7}{flops:>10.2g}{_gib(held):>11}"
            f"{_gib(taken) if taken else 'not asked':>11}{duration(seconds):>12}"
        )
    device = jax.devices()[0].device_kind
    rates = ", ".join(f"{speed / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, speed in speeds.items())
    lines += [
        "",
        "weights: with Adam's moments, the average and frozen networks"
        + (f", a device's part of {config.fsdp}. " if config.fsdp > 1 else ". ")
        + "the step: gradients and",
        f"activations of {'the' if devices == 1 else f'each of {devices} devices, with its part of the'} batch, as "
        f"compiled for {device}.",
        f"time: at {SHARE:.0%} (assumed) of {f'{devices} × ' * (devices > 1)}{rates}, measured now.",
    ]
    return "\n".join(lines)


def matmul_speed(dtype: str, size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of size³ matrix products on the default device, the median of some."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    jax.block_until_ready(product(a, a))

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        return 2 * size**3 / (time.perf_counter() - began)

    return statistics.median(once() for _ in range(rounds))


def _batch_shapes(
    config: Config, model: Any, stage: str, train: TrainConfig, spec: ConditionSpec
) -> dict[str, jax.ShapeDtypeStruct]:
    size, shape = train.batch_size, config.data.shape
    fields = {"label": ((size,), jnp.int32), "image": ((size, *shape), jnp.uint8)}
    if stage == "stage2" and config.cache_latents:
        del fields["image"]
        fields["mean"] = ((size, *model.latent_shape), jnp.float32)
        if config.model.encoder.variance == "learned":
            fields["std"] = fields["mean"]
        if config.model.given_frames:
            fields["first"] = ((size, config.model.given_frames, *shape[1:]), jnp.uint8)
    if spec.text_channels and (stage == "stage2" or config.model.decoder_text or config.single_stage):
        fields["text"] = ((size, config.text.length, spec.text_channels), jnp.float32)
        fields["text_mask"] = ((size, config.text.length), jnp.bool_)
    return {name: jax.ShapeDtypeStruct(*field) for name, field in fields.items()}


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
