"""Where a training step's time goes: matrix products, convolutions, everything else, and the slowest operations.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --experiment kinetics600 --stages stage1 --operations 20

Traced by JAX's profiler; an operation of the compiled step counts as a product or a convolution if it holds one, with
whatever elementwise work the compiler has fused into it. From the FLOPs (`ulx.flops`) follows at what speed products
and convolutions ran, and what share of the machine's matrix-multiply speed, measured in between, the step would reach
if they ran at that speed and nothing else changed. Random examples. Leaves benchmarks/results/step_profile.json.
"""

import dataclasses
import gzip
import importlib
import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from points import RESULTS, here, leave, markdown
from random_step import Stage, Step

Kind = Literal["products", "convolutions", "between devices", "the rest"]
MARKS: dict[Kind, re.Pattern[str]] = {
    "convolutions": re.compile(r"\bconvolution\(|custom_call_target=\"[^\"]*conv", re.I),
    "products": re.compile(r"\bdot\(|custom_call_target=\"[^\"]*(?:matmul|gemm|dot)", re.I),
    "between devices": re.compile(r"\b(?:all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start|-done)?\("),
}
KINDS: tuple[Kind, ...] = (*MARKS, "the rest")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where a training step's time goes."""

    experiment: Literal["openmoji", "imagenet512", "kinetics600"] = "openmoji"
    preset: str = "tiny"
    stages: tuple[Stage, ...] = ("stage1", "stage2")
    steps: int = 5
    """Traced ones, after one that is not."""
    operations: int = 10
    """The slowest are listed."""
    results: str = str(RESULTS)
    """Folder of the results."""


def kinds_of(program: str) -> dict[str, Kind]:
    """Of every instruction in the text of a compiled program, by its name."""
    bodies: dict[str, str] = {}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S):
        bodies[name] = body
    found: dict[str, Kind] = {}
    for line in program.splitlines():
        named = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if named is None:
            continue
        called = re.search(r"\bfusion\(.*\bcalls=%?([\w.\-]+)", line)
        text = line + (bodies.get(called[1], "") if called else "")
        found[named[1]] = _kind(text)
    return found


def _kind(text: str) -> Kind:
    for kind, pattern in MARKS.items():
        if pattern.search(text):
            return kind
    return "the rest"


def seconds_of(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Of every operation in a trace, without what ran inside it."""
    found: Counter[str] = Counter()
    open_ones: dict[tuple[int, int], list[tuple[float, str]]] = {}
    operations = (event for event in events if event.get("ph") == "X" and "hlo_op" in event.get("args", {}))
    for event in sorted(operations, key=lambda event: (event["ts"], -event["dur"])):
        name, stack = event["args"]["hlo_op"], open_ones.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            found[stack[-1][1]] -= event["dur"] / 1e6
        found[name] += event["dur"] / 1e6
        stack.append((event["ts"] + event["dur"], name))
    return found


def traced(step: Step, count: int) -> Counter[str]:
    """Seconds of every operation in so many steps."""
    import jax

    step.run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                step.run()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        return seconds_of(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])


def measure(settings: Settings) -> dict[str, Any]:
    from ulx.dry_run import matmul_speed

    config = importlib.import_module(settings.experiment).PRESETS[settings.preset]
    stages: dict[str, Any] = {}
    for stage in settings.stages:
        step = Step(config, stage)
        kinds = kinds_of(step.compiled.compiled.as_text())
        dtype = config.train_configs[stage].dtype
        speeds = [matmul_speed(dtype)]
        operations = traced(step, settings.steps)
        speeds.append(matmul_speed(dtype))
        peak = statistics.median(speeds) / 1e9
        seconds = dict.fromkeys(KINDS, 0.0)
        for name, taken in operations.items():
            seconds[kinds.get(name, "the rest")] += taken / settings.steps
        total = sum(seconds.values())
        products = seconds["products"] + seconds["convolutions"]
        stages[stage] = {
            "gflops": step.gflops,
            "matmul_gflop_per_s": peak,
            "seconds": seconds,
            "products_gflop_per_s": step.gflops / products,
            "share_of_matmul": step.gflops / total / peak,
            "share_if_products_ran_at_it": step.gflops / (step.gflops / peak + total - products) / peak,
            "slowest": [
                {"operation": name, "kind": kinds.get(name, "the rest"), "ms": 1e3 * taken / settings.steps}
                for name, taken in operations.most_common(settings.operations)
            ],
        }
    return {
        "experiment": settings.experiment,
        "preset": settings.preset,
        **here(),
        "stages": stages,
    }


def table(results: dict[str, Any]) -> str:
    rows = []
    for stage, one in results["stages"].items():
        total = sum(one["seconds"].values())
        shares = (f"{one['seconds'][kind] / total:.0%}" for kind in KINDS)
        speed = f"{one['products_gflop_per_s']:.0f} of {one['matmul_gflop_per_s']:.0f} GFLOP/s"
        found = f"{one['share_of_matmul']:.0%}", f"{one['share_if_products_ran_at_it']:.0%}"
        rows.append([stage, f"{1e3 * total:.0f} ms", *shares, speed, *found])
    columns = ["stage", "step", *KINDS, "both kinds of products at", "of matmul", "if these ran at it"]
    slowest = "\n".join(
        f"{stage}: " + ", ".join(f"{each['operation']} {each['ms']:.1f} ms" for each in one["slowest"])
        for stage, one in results["stages"].items()
    )
    return f"{markdown(columns, rows)}\n\n{slowest}"


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = measure(settings)
        leave(results, settings.results, "step_profile")
        print(table(results))

    run_command(work)


if __name__ == "__main__":
    main()
