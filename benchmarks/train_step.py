"""Speed of one training step of each stage: images/s, compile time, memory, FLOPs, share of the matrix-multiply speed.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --preset small --batch-size 16 --repeats 5

The machine's own matrix-multiply speed (float32 or bfloat16, 2048³) is measured in the same run, interleaved with
the steps, so that the share means something on a shared machine; times alone do not. A step takes its batch from the
data pipeline; `input_share` is the part of the time that it waits for it. Stage 2 reads latents that are encoded once.
"""

import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Speed of one training step of each stage."""

    preset: str = "tiny"
    """A preset of experiments/openmoji.py."""
    batch_size: int | None = None
    """Images per step; by default the preset's."""
    repeats: int = 10
    """Timed steps of each stage."""
    out: str | None = None
    """Also write the numbers to this JSON file."""


def measure(settings: Settings) -> dict:
    import jax
    import jax.numpy as jnp
    from openmoji import PRESETS

    from ulx import job, runs, stages
    from ulx.data import open_dataset
    from ulx.data.pipeline import train_batches
    from ulx.dry_run import matmul_speed
    from ulx.flops import TRAINING
    from ulx.latents import encoded
    from ulx.training import make_optimizer, make_step

    config = PRESETS[settings.preset]
    dataset = open_dataset(config.data)
    state = runs.stage1_state(config)
    model = jax.tree.map(lambda leaf: jnp.array(leaf) if hasattr(leaf, "shape") else leaf, state.model)
    base_state = runs.stage2_state(config, model, len(dataset.class_names))
    cost = job.cost(model, base_state.model, config)["forward_flops_per_image"]
    flops = {
        "stage1": TRAINING * (cost["encoder"] + cost["prior"] + cost["decoder"]),
        "stage2": TRAINING * cost["base"],
    }
    folder = tempfile.TemporaryDirectory()
    cached = encoded(dataset, model, Path(folder.name), batch_size=config.evaluate.batch_size, flip=False)
    results: dict = {"preset": settings.preset, "device": jax.devices()[0].device_kind, "machine": platform.machine()}
    jobs = (
        ("stage1", state, None, stages.autoencoder_loss(config), config.train, dataset),
        ("stage2", base_state, model, stages.base_loss(config, config.data.resolution**2), config.train_base, cached),
    )
    for name, state, frozen, loss, train, examples in jobs:
        batch_size = settings.batch_size or train.batch_size
        batches = train_batches(examples, batch_size=batch_size, seed=0)
        batch = next(batches)
        began = time.perf_counter()
        step = (
            make_step(loss, make_optimizer(train), train, key=jax.random.key(0)).lower((frozen, batch), state).compile()
        )
        compiled = time.perf_counter() - began
        for _ in range(2):
            state, _ = jax.block_until_ready(step((frozen, batch), state))
        seconds, peaks, waits = [], [], []
        for _ in range(settings.repeats):
            peaks.append(matmul_speed(train.dtype, rounds=1))
            began = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - began)
            state, _ = jax.block_until_ready(step((frozen, batch), state))
            seconds.append(time.perf_counter() - began)
        median, peak = statistics.median(seconds), statistics.median(peaks)
        analysis = step.compiled.memory_analysis()
        results[name] = {
            "batch_size": batch_size,
            "step_ms": 1e3 * median,
            "step_ms_range": [1e3 * min(seconds), 1e3 * max(seconds)],
            "images_per_s": batch_size / median,
            "input_share": sum(waits) / sum(seconds),
            "compile_s": compiled,
            "memory_mib": (analysis.temp_size_in_bytes + analysis.argument_size_in_bytes) / 2**20,
            "gflops_per_image": flops[name] / 1e9,
            "achieved_gflop_per_s": flops[name] * batch_size / median / 1e9,
            "matmul_gflop_per_s": peak / 1e9,
            "share_of_matmul": flops[name] * batch_size / median / peak,
        }
    return results


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    results = measure(settings)
    for stage in ("stage1", "stage2"):
        print(stage)
        for name, value in results[stage].items():
            shown = [round(v, 1) for v in value] if isinstance(value, list) else round(value, 3)
            print(f"  {name:22} {shown}")
    if settings.out:
        Path(settings.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
