"""A table of what presets cost on which hardware, of all that `speed.py` has measured.

    python benchmarks/costs.py

Reads the `speed*.json` of the results folder and leaves costs.md there. The last column is what a stage would take at
the measured rate up to the end of its preset's training, in examples seen; stage 2 as the preset does it, with
latents that are kept or encoded batch by batch.
"""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import points

COLUMNS = (
    *("preset", "hardware", "precision", "work", "batch", "examples/s", "GFLOPs each", "of matmul", "memory"),
    *("compiling", "to the end of training"),
)
UNITS = ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """A table of what presets cost."""

    results: str = str(points.RESULTS)
    """Folder of the results."""


def length(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, name in UNITS:
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.3g} {name}"
    return f"{seconds:.3g} seconds"


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    preset = importlib.import_module(found["experiment"]).PRESETS[found["preset"]]
    trains = {"stage1": preset.train, "stage2" if preset.cache_latents else "stage2_online": preset.train_base}
    hardware = found["machine"] if found["device"] == "cpu" else found["device"]
    for name, work in found["work"].items():
        ours, train = work["ulx"], trains.get(name)
        left = "" if train is None else length(train.steps * train.batch_size / ours["examples_per_s"])
        steps = f", {work['steps']} steps" if work["steps"] > 1 else ""
        yield [
            f"{found['experiment']} {found['preset']}",
            hardware,
            work["dtype"],
            f"{name.replace('_', ' ')}{steps}",
            str(work["batch_size"]),
            f"{ours['examples_per_s']:.3g}",
            f"{work['gflops_per_example']:,.4g}",
            f"{ours['share_of_matmul']:.0%}",
            f"{ours['memory_mib'] / 1024:.2g} GiB",
            f"{ours['compile_s']:.0f} s",
            left,
        ]


def main() -> None:
    import tyro

    folder = Path(tyro.cli(Settings, description=__doc__).results)
    files = sorted(folder.glob("speed*.json"))
    measured = [found for found in (json.loads(file.read_text()) for file in files) if "work" in found]
    if not measured:
        raise FileNotFoundError(f"{folder} has no results of speed.py: run it with --out {folder / 'speed.json'}")
    dates = sorted({work["date"] for found in measured for work in found["work"].values()})
    (folder / "costs.md").write_text(
        f"Measured by `benchmarks/speed.py` ({' to '.join(sorted({dates[0], dates[-1]}))}), put together by `python "
        "benchmarks/costs.py`. Memory is the compiler's account: arguments and temporary arrays. FLOPs are the model's "
        "without recomputation; `of matmul`: their share of what a matrix product of 2048³ reached in the same run.\n\n"
        + points.markdown(COLUMNS, [row for found in measured for row in rows(found)])
        + "\n"
    )
    print((folder / "costs.md").read_text())


if __name__ == "__main__":
    main()
