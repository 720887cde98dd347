"""What keeping freed memory saves: training steps with and without `ulx.memory.keep_freed_memory`, in turn.

    python benchmarks/kept_memory.py

Two processes, since it cannot be taken back, each with a compiled step of the same stage; one waits while the other
takes steps. Leaves benchmarks/results/kept_memory.json.
"""

import dataclasses
import importlib
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from typing import Any, Literal

from points import RESULTS, here, leave, markdown
from random_step import Stage

STEPS = 2
"""In a turn."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What keeping freed memory saves."""

    experiments: tuple[Literal["openmoji", "kinetics600"], ...] = ("openmoji", "kinetics600")
    preset: str = "tiny"
    stages: tuple[Stage, ...] = ("stage1", "stage2")
    rounds: int = 12
    """Timed turns of each process, after one that is not."""
    results: str = str(RESULTS)
    """Folder of the results."""


def work(experiment: str, preset: str, stage: Stage, keep: bool, link: Connection) -> None:
    """Run in a process of its own: seconds a step and page faults a step, whenever they are asked for."""
    import resource

    from random_step import Step

    from ulx.memory import keep_freed_memory

    if keep:
        assert keep_freed_memory(), "this system's C library is not glibc"
    step = Step(importlib.import_module(experiment).PRESETS[preset], stage)
    while link.recv():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = statistics.mean(step.run() for _ in range(STEPS))
        link.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / STEPS))


def compared(experiment: str, preset: str, stage: Stage, rounds: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    links, processes = [], []
    for keep in (False, True):
        link, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(experiment, preset, stage, keep, theirs), daemon=True)
        process.start()
        links.append(link)
        processes.append(process)

    def turn(link: Connection) -> tuple[float, float]:
        link.send(True)
        return link.recv()

    for link in links:
        turn(link)
    pairs = [[turn(link) for link in links] for _ in range(rounds)]
    for link, process in zip(links, processes, strict=True):
        link.send(False)
        process.join()
    ratios = [kept[0] / given[0] for given, kept in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    faults = [statistics.median(pair[which][1] for pair in pairs) for which in (0, 1)]
    return {
        "experiment": experiment,
        "stage": stage,
        "seconds": statistics.median(pair[0][0] for pair in pairs),
        "ratio": {"median": statistics.median(ratios), "low": low, "high": high},
        "page_faults": {"given_back": faults[0], "kept": faults[1]},
    }


def table(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        ratio, faults = row["ratio"], row["page_faults"]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        return [row["experiment"], row["stage"], spread, f"{faults['given_back']:,.0f}", f"{faults['kept']:,.0f}"]

    return markdown(["experiment", "stage", "time, kept / given back", "page faults a step", "kept"], map(cells, rows))


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    rows = []
    for experiment in settings.experiments:
        for stage in settings.stages:
            rows.append(compared(experiment, settings.preset, stage, settings.rounds))
            print(table(rows[-1:]).splitlines()[-1])
    results = {
        **here(),
        "preset": settings.preset,
        "rows": rows,
    }
    leave(results, settings.results, "kept_memory")
    print(table(rows))


if __name__ == "__main__":
    main()
