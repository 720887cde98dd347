"""Trains on the meshes given and prints what came out, as JSON: a process of its own has its own devices.

python tests/mesh_worker.py '{"stage1": [[[1, 1, 1]], [[4, 2, 1]]]}'      data, fsdp, accumulate
python tests/mesh_worker.py '{"made": true}'                              what evaluation makes
"""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from stand_ins import Corner

from ulx import runs, sharding, stages
from ulx.checkpoint import Checkpoints
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig
from ulx.data import DataConfig
from ulx.data.pipeline import train_batches
from ulx.data.source import Dataset, InMemory, Split
from ulx.metrics.features import feature_batches, features
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.models import ModelConfig
from ulx.nn.conditions import ConditionSpec
from ulx.nn.encoder import EncoderConfig
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViTConfig
from ulx.progress import Progress
from ulx.runner import Runner, Told
from ulx.training import make_optimizer, make_step

STEPS, BATCH, CLASSES = 20, 8, 3
TOLD = ConditionSpec(num_classes=CLASSES)


def settings() -> Config:
    """Networks with arrays large enough to be cut, dropout and classes, on images of 16×16."""
    block = BlockConfig(dropout=0.1)
    network = UViTConfig(patch=4, channels=(64,), blocks=(2,), block=block)
    train = TrainConfig(steps=STEPS, batch_size=BATCH, warmup_steps=2, learning_rate=1e-3, posthoc_ema=(0.1,))
    return Config(
        prior_warmup=(5, 15),
        data=DataConfig(resolution=16),
        model=ModelConfig(
            encoder=EncoderConfig(channels=(16,), blocks=1, last_blocks=1, latent_channels=4),
            prior=dataclasses.replace(network, blocks=(1,)),
            decoder=network,
            base=network,
        ),
        train=train,
        train_base=dataclasses.replace(train, optimizer="muon"),  # each of the two in one of the stages
    )


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    labels = (np.arange(20) % CLASSES).astype(np.int32)
    split = Split(InMemory({"image": images, "label": labels}), tuple(map(str, range(20))), labels)
    return Dataset("noise", 16, tuple("abc"), split, split, "noise")


def bytes_here(tree: Any) -> int:
    """On the first of this process's devices."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)


def sent(program: str) -> list[tuple[str, str]]:
    """Which collectives a compiled program has, and of arrays of what type and shape each."""
    kinds = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    calls = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program)
    return sorted({(kind, array) for arrays, kind in calls for array in re.findall(r"\w+\[[\d,]*\]", arrays)})


def trained(stage: str, *legs: tuple[int, int, int]) -> dict[str, Any]:
    """Losses of every step, what each device holds, and which arrays are sent (both of the last leg).

    A leg is a mesh for an equal part of the steps; from one to the next goes a checkpoint.
    """
    config, logged, text = settings(), [], ""
    model = runs.stage1_state(config).model
    new = lambda: runs.stage1_state(config) if stage == "stage1" else runs.stage2_state(config, model, TOLD)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        for data, fsdp, accumulate in legs:
            mesh = sharding.make_mesh(fsdp, jax.devices()[: data * fsdp])
            train = dataclasses.replace(config.train if stage == "stage1" else config.train_base, accumulate=accumulate)
            loss = stages.autoencoder_loss(config) if stage == "stage1" else stages.base_loss(config, 16 * 16)
            batches = train_batches(
                dataset(), batch_size=BATCH, seed=0, shard_index=jax.process_index(), shard_count=jax.process_count()
            )
            state, frozen = sharding.place((new(), None if stage == "stage1" else model), mesh)
            if checkpoints.latest is not None:
                state = checkpoints.restore(state, {"data": batches})
            step = make_step(loss, make_optimizer(train), train, key=jax.random.key(1), mesh=mesh)
            compiled = None
            for _ in range(STEPS // len(legs)):
                given = frozen, sharding.place_batch(next(batches), mesh)
                compiled = compiled or step.lower(given, state).compile()
                state, metrics = compiled(given, state)
                logged.append({name: float(value) for name, value in metrics.items() if not value.ndim})
            assert compiled is not None
            text = compiled.compiled.as_text()
            if len(legs) > 1:
                checkpoints.save(int(state.step), state, {"data": batches}, wait=True)
    ema = jax.tree.leaves(whole(state.posthoc[0], mesh))
    return {
        "logged": logged,
        "bytes": bytes_here(state),
        "sent": sent(text),
        "ema": float(sum(abs(np.asarray(leaf)).sum() for leaf in ema)),
    }


def whole(tree: Any, mesh: Any) -> Any:
    return jax.jit(lambda t: t, out_shardings=jax.sharding.NamedSharding(mesh, sharding.WHOLE))(tree)


def made() -> dict[str, Any]:
    """What evaluation's calls make of five images, in batches of three, and what it measures of seven features."""
    options = EvaluateConfig(batch_size=3, levels=4, draws=1)
    sample = SampleConfig(num_steps=3, decoder_num_steps=3, decoder_solver="ancestral")
    config = dataclasses.replace(settings(), evaluate=options, sample=sample)
    state = runs.stage1_state(config)
    stage2 = runs.stage2_state(config, state.model, TOLD)
    model, base = sharding.place(moved((state.model, stage2.model)), sharding.make_mesh())
    images = np.stack([dataset().train[i]["image"] for i in range(5)])
    with Progress("made", total=20) as progress:
        run = Runner(model, config, progress)
        latents = run.encode(images)
        samples, nfe = run.latents(base, 5, "sample", Told(np.arange(5, dtype=np.int32) % CLASSES), guidance=2.0)
        return {
            "latents": latents.tolist(),
            "rate": np.asarray(run.rate(images, model.prior).rate).tolist(),
            "reconstructions": run.decode(latents, "reconstruct")[0].tolist(),
            "samples": samples.tolist(),
            "nfe": nfe,
            **distance(),
            "devices": jax.local_device_count(),
        }


def distance() -> dict[str, Any]:
    """From images to a Fréchet distance, its reference batch by batch as a training set's is."""
    rng = np.random.default_rng(2)
    real, found = (rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8) for count in (20, 11))
    network, reference = Corner(), Moments.empty(3)
    for batch in feature_batches(network, real, 6):
        reference = reference.update(batch)
    seen = features(network, found, 4)
    return {"features": seen.tolist(), "distance": frechet_distance(Moments.of(seen), reference)}


def moved(tree: Any) -> Any:
    """Every array away from its initial value: untrained networks predict nothing."""
    rng = np.random.default_rng(1)
    shake = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(shake, arrays), rest)


def main() -> None:
    what, *process = sys.argv[1:]
    if process:
        index, count, coordinator = process
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, int(count), int(index))
    asked = json.loads(what)
    found = {"made": made()} if asked.pop("made", False) else {}
    found |= {name: [trained(name, *legs) for legs in each] for name, each in asked.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
