"""How long the training steps of the paper's presets take to compile, and to come from the persistent cache.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --presets imagenet512/small openmoji/tiny

Each stage's step is compiled for this machine's device at the preset's own batch, from shapes alone: twice, in a
process of its own each time, first with an empty cache and then with what the first one left there. Tracing and
lowering are done both times. Leaves benchmarks/results/compile_time.json.
"""

import dataclasses
import importlib
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from points import RESULTS, here, leave, markdown
from random_step import Stage


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time to compile training steps."""

    presets: tuple[str, ...] = ("imagenet512/small", "imagenet512/medium", "kinetics600/small", "openmoji/tiny")
    """EXPERIMENT/PRESET."""
    stages: tuple[Stage, ...] = ("stage1", "stage2")
    results: str = str(RESULTS)
    """Folder of the results."""


def compiled(preset: str, stage: str, cache: str) -> dict[str, float]:
    """Seconds to trace and lower, and then to compile. Run in a fresh process."""
    import jax

    from ulx.dry_run import planned
    from ulx.nn.conditions import ConditionSpec

    jax.config.update("jax_compilation_cache_dir", cache)
    experiment, name = preset.split("/")
    config = importlib.import_module(experiment).PRESETS[name]
    step = planned(config, ConditionSpec(num_classes=1000)).steps[stage]
    began = time.perf_counter()
    lowered = step.lower()
    between = time.perf_counter()
    lowered.compile()
    return {"trace_and_lower_s": between - began, "compile_s": time.perf_counter() - between}


def measure(settings: Settings) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for preset in settings.presets:
        for stage in settings.stages:
            with tempfile.TemporaryDirectory() as cache:
                found = {}
                for when in ("empty", "from_cache"):
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        found[when] = pool.submit(compiled, preset, stage, cache).result()
            rows.append({"preset": preset, "stage": stage, **found})
            print(json.dumps(rows[-1]))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    seconds = lambda one: f"{one['trace_and_lower_s']:.1f} + {one['compile_s']:.1f} s"  # noqa: E731
    return markdown(
        ["preset", "stage", "lowering + compiling", "lowering + from the cache"],
        [[row["preset"], row["stage"], seconds(row["empty"]), seconds(row["from_cache"])] for row in rows],
    )


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = {
            **here(),
            "rows": measure(settings),
        }
        leave(results, settings.results, "compile_time")
        print(table(results["rows"]))

    run_command(work)


if __name__ == "__main__":
    main()
