"""One real training step of each stage of the paper's presets, at batch 1: finite losses, and the memory it takes.

    python benchmarks/paper_step.py
    python benchmarks/paper_step.py --experiments imagenet512 --preset medium

On the embedded data at the preset's own size, in the preset's own precision. As in the middle of a training: after the
warm-up of the prior's pull on the encoder, and with weights moved at random from where they begin, which is at layers
that are 0 and would hide what lies behind them. Each stage is a process of its own, since
the peak of a process's memory cannot be reset. Leaves benchmarks/results/paper_step.jsonl, a line for each stage.
"""

import dataclasses
import importlib
import json
import math
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import points

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """One real step of the paper's presets."""

    experiments: tuple[Literal["imagenet512", "kinetics600"], ...] = ("imagenet512", "kinetics600")
    """Whose presets."""
    preset: str = "small"
    stages: tuple[Literal["stage1", "stage2"], ...] = ("stage1", "stage2")
    results: str = str(points.RESULTS)
    """Folder of the results."""


def shaken(tree: Any, seed: int = 0) -> Any:
    """Every weight moved at random, by less than what weights of 1,024 inputs begin with (1/32), away from 0."""
    import equinox as eqx
    import jax

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) if eqx.is_inexact_array(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def step(experiment: str, preset: str, stage: str) -> dict[str, Any]:
    """Run in a fresh process."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from ulx import run_folder, runs, stages
    from ulx.command_line import use_compilation_cache
    from ulx.data import open_dataset
    from ulx.sharding import bytes_per_device, make_mesh
    from ulx.training import make_optimizer, make_step

    use_compilation_cache()
    mesh = make_mesh(devices=jax.devices()[:1])
    config = importlib.import_module(experiment).PRESETS[preset]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, limit=4))
    dataset = open_dataset(config.data)
    state = runs.stage1_state(config)
    frozen, train, loss = None, config.train, stages.autoencoder_loss(config)
    if stage == "stage2":
        frozen = shaken(state.model)
        del state  # the moments and the average
        state = runs.stage2_state(config, frozen, run_folder.spec_of(dataset.class_names))
        train, loss = config.train_base, stages.base_loss(config, math.prod(config.data.shape[:-1]))
    state = eqx.tree_at(lambda s: s.model, state, shaken(state.model))
    state = eqx.tree_at(lambda s: s.step, state, jnp.asarray(config.prior_warmup[1], state.step.dtype))
    batch = {name: value[None] for name, value in dataset.train[0].items()}
    began = time.perf_counter()
    one = make_step(loss, make_optimizer(train), train, key=jax.random.key(0), mesh=mesh)
    compiled = one.lower((frozen, batch), state).compile()
    seconds = time.perf_counter() - began
    state, metrics = jax.block_until_ready(compiled((frozen, batch), state))
    found = {name: float(value) for name, value in metrics.items() if not value.ndim}
    weights = jax.tree.leaves((state.model, state.ema))
    finite = all(math.isfinite(value) for value in found.values())
    reached = min(value for name, value in found.items() if name.startswith("gradient")) > 0
    return {
        "experiment": experiment,
        "preset": preset,
        "stage": stage,
        "dtype": train.dtype,
        "metrics": found,
        "all_finite": finite and all(bool(jnp.isfinite(w).all()) for w in weights if hasattr(w, "dtype")),
        "every_network_has_a_gradient": reached,
        "weights_gib": bytes_per_device((state, frozen)) / 2**30,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "compile_seconds": seconds,
    }


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    file = Path(settings.results) / "paper_step.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = points.read(file)
    machine = {}
    for experiment in settings.experiments:
        for stage in settings.stages:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(step, experiment, settings.preset, stage).result()
            machine = machine or points.here()  # after the first: whoever asks a device's name may hold it
            found |= machine
            same = lambda one, found=found: all(one[k] == found[k] for k in ("experiment", "preset", "stage"))  # noqa: E731
            known = [*(one for one in known if not same(one)), found]
            file.write_text("".join(json.dumps(one) + "\n" for one in known))
            print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
