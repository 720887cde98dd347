"""Speed of one training step of each stage: images/s, compile time, memory, FLOPs, share of the matrix-multiply speed.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --preset small --batch-size 16 --repeats 5
    python benchmarks/train_step.py --experiment kinetics600

The machine's own matrix-multiply speed (float32 or bfloat16, 2048³) is measured in the same run, and all steps in
turn, so that ratios mean something on a shared machine; times alone do not. A step takes its batch from the data
pipeline; `input_share` is the part of the time that it waits for it. Stage 2 is timed twice, on the same examples:
`stage2` reads latents that are encoded once, `stage2_online` encodes each batch.
"""

import dataclasses
import importlib
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

ROUNDS_BEFORE = 2
"""Steps of each stage that are not timed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Speed of one training step of each stage."""

    experiment: Literal["openmoji", "imagenet512", "kinetics600"] = "openmoji"
    preset: str = "tiny"
    """A preset of that experiment; its embedded data."""
    batch_size: int | None = None
    """Images per step; by default the preset's."""
    repeats: int = 10
    """Timed steps of each stage."""
    out: str | None = None
    """Also write the numbers to this JSON file."""


def measure(settings: Settings) -> dict:
    import jax
    import jax.numpy as jnp

    from ulx import job, runs, stages
    from ulx.data import open_dataset
    from ulx.data.pipeline import train_batches
    from ulx.dry_run import matmul_speed
    from ulx.flops import TRAINING
    from ulx.latents import encoded
    from ulx.sharding import make_mesh
    from ulx.training import make_optimizer, make_step

    mesh = make_mesh(devices=jax.devices()[:1])
    config = importlib.import_module(settings.experiment).PRESETS[settings.preset]
    batch_size = settings.batch_size or max(config.train.batch_size, config.train_base.batch_size)
    limit = batch_size * (1 + ROUNDS_BEFORE + settings.repeats)
    dataset = open_dataset(dataclasses.replace(config.data, limit=limit))
    state = runs.stage1_state(config, len(dataset.class_names))
    model = jax.tree.map(lambda leaf: jnp.array(leaf) if hasattr(leaf, "shape") else leaf, state.model)
    base_state = lambda: runs.stage2_state(config, model, len(dataset.class_names))  # noqa: E731
    cost = job.cost(model, base_state().model, config)["forward_flops_per_image"]
    flops = {
        "stage1": TRAINING * (cost["encoder"] + cost["prior"] + cost["decoder"]),
        "stage2": TRAINING * cost["base"],
        "stage2_online": TRAINING * cost["base"] + cost["encoder"],
    }
    folder = tempfile.TemporaryDirectory()
    cached = encoded(
        dataset,
        model,
        Path(folder.name),
        batch_size=config.evaluate.batch_size,
        flip=False,
        first=config.model.given_frames,
    )
    base_loss = stages.base_loss(config, math.prod(model.shape[:-1]))
    jobs = {
        "stage1": (state, None, stages.autoencoder_loss(config), config.train, dataset),
        "stage2": (base_state(), model, base_loss, config.train_base, cached),
        "stage2_online": (base_state(), model, base_loss, config.train_base, dataset),
    }
    results: dict = {
        "experiment": settings.experiment,
        "preset": settings.preset,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
    }
    steps, states, batches, seconds = {}, {}, {}, {name: [] for name in jobs}
    for name, (state, frozen, loss, train, examples) in jobs.items():
        size = settings.batch_size or train.batch_size
        batches[name], states[name] = train_batches(examples, batch_size=size, seed=0), state
        key = jax.random.key(0)
        began = time.perf_counter()
        step = make_step(loss, make_optimizer(train), train, key=key, mesh=mesh)
        steps[name] = step.lower((frozen, next(batches[name])), state).compile()
        compiled = time.perf_counter() - began
        analysis = steps[name].compiled.memory_analysis()
        results[name] = {
            "batch_size": size,
            "compile_s": compiled,
            "memory_mib": (analysis.temp_size_in_bytes + analysis.argument_size_in_bytes) / 2**20,
            "gflops_per_image": flops[name] / 1e9,
        }
    waits, peaks = {name: [] for name in jobs}, {name: [] for name in jobs}
    for done in range(ROUNDS_BEFORE + settings.repeats):
        for name, (_, frozen, _, train, _) in jobs.items():
            peak = matmul_speed(train.dtype, rounds=1)
            began = time.perf_counter()
            batch = next(batches[name])
            waited = time.perf_counter() - began
            states[name], _ = jax.block_until_ready(steps[name]((frozen, batch), states[name]))
            if done >= ROUNDS_BEFORE:
                seconds[name].append(time.perf_counter() - began)
                waits[name].append(waited)
                peaks[name].append(peak)
    for name in jobs:
        median, peak = statistics.median(seconds[name]), statistics.median(peaks[name])
        rate = results[name]["batch_size"] / median
        results[name] |= {
            "step_ms": 1e3 * median,
            "step_ms_range": [1e3 * min(seconds[name]), 1e3 * max(seconds[name])],
            "images_per_s": rate,
            "input_share": sum(waits[name]) / sum(seconds[name]),
            "achieved_gflop_per_s": flops[name] * rate / 1e9,
            "matmul_gflop_per_s": peak / 1e9,
            "share_of_matmul": flops[name] * rate / peak,
        }
    slower = [
        online / from_cache for online, from_cache in zip(seconds["stage2_online"], seconds["stage2"], strict=True)
    ]
    results["online_over_cached"] = {"median": statistics.median(slower), "range": [min(slower), max(slower)]}
    return results


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    results = measure(settings)
    for stage in ("stage1", "stage2", "stage2_online"):
        print(stage)
        for name, value in results[stage].items():
            shown = [round(v, 1) for v in value] if isinstance(value, list) else round(value, 3)
            print(f"  {name:22} {shown}")
    ratio = results["online_over_cached"]
    print(f"a step of stage 2 that encodes its batch takes {ratio['median']:.2f} times one on cached latents")
    if settings.out:
        Path(settings.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
