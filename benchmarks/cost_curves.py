"""How time and memory of a training step grow with batch, depth, pixels and width.

    python benchmarks/cost_curves.py
    python benchmarks/cost_curves.py --stages stage2 --rounds 9

Of the `tiny` preset of experiments/openmoji.py, with activations recomputed block by block as in the large presets, one
size is changed at a time. Depth is the number of blocks of every transformer that is trained, width their channels;
four pixels a side make a token. Memory is the compiler's own account of a step (arguments and temporary arrays), time a
median over rounds in which every size has its turn. Both, and the FLOPs (`ulx.flops`), are fitted as a + b n where they
should be linear, and as a + b n + c n² where attention (n tokens) or a layer (n channels) makes them quadratic; the fit
weighs relative errors. Random pictures. Leaves cost_curves.json, .md and .png under benchmarks/results/; curves that
are there already and were not asked for stay.
"""

import dataclasses
import itertools
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from points import RESULTS, here, leave
from random_step import Stage, Step

if TYPE_CHECKING:
    from ulx.config import Config

Curve = Literal["batch", "depth", "pixels", "width"]
Amount = Literal["seconds", "mib", "gflops"]

QUADRATIC: tuple[Curve, ...] = ("pixels", "width")
ROUNDS_BEFORE = 1
"""Steps of each size that are not timed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How time and memory of a training step grow."""

    stages: tuple[Stage, ...] = ("stage1", "stage2")
    curves: tuple[Curve, ...] = ("batch", "depth", "pixels", "width")
    batch: tuple[int, ...] = (8, 16, 32, 48, 64)
    """Images."""
    depth: tuple[int, ...] = (2, 4, 6, 8, 12)
    """Blocks."""
    resolution: tuple[int, ...] = (32, 48, 64, 80, 96)
    """Of square images; four each way make a token."""
    width: tuple[int, ...] = (64, 128, 192, 256, 384)
    """Channels, multiples of 64."""
    batch_size: int = 16
    """Of the other curves."""
    rounds: int = 7
    """Timed steps of each size."""
    results: str = str(RESULTS)
    """Folder of the results."""

    def sizes(self, curve: Curve) -> tuple[int, ...]:
        """What the curve is drawn over."""
        return tuple(side**2 for side in self.resolution) if curve == "pixels" else getattr(self, curve)


def config_of(curve: Curve, size: int, settings: Settings) -> "Config":
    """The preset with one size changed."""
    from openmoji import PRESETS

    config = PRESETS["tiny"]
    batch_size = size if curve == "batch" else settings.batch_size

    def network(name: str) -> Any:
        found = getattr(config.model, name)
        return dataclasses.replace(
            found,
            blocks=(size,) if curve == "depth" else found.blocks,
            channels=(size,) if curve == "width" else found.channels,
            block=dataclasses.replace(found.block, remat="block"),
        )

    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, resolution=math.isqrt(size) if curve == "pixels" else 32),
        model=dataclasses.replace(config.model, **{name: network(name) for name in ("prior", "decoder", "base")}),
        train=dataclasses.replace(config.train, batch_size=batch_size),
        train_base=dataclasses.replace(config.train_base, batch_size=batch_size),
    )


def fitted(sizes: list[int], values: list[float], degree: int) -> dict[str, Any]:
    """The polynomial with the least squared relative errors: its coefficients from the constant up, the largest
    relative error, and which part of every value its highest power is."""
    import numpy as np

    x, y = np.asarray(sizes, float), np.asarray(values, float)
    powers = (x / x.max())[:, None] ** np.arange(degree + 1)
    scaled = np.linalg.lstsq(powers / y[:, None], np.ones_like(y), rcond=None)[0]
    found = powers @ scaled
    return {
        "coefficients": (scaled / x.max() ** np.arange(degree + 1)).tolist(),
        "largest_error": float(np.abs(found / y - 1).max()),
        "share_of_highest": (powers[:, -1] * scaled[-1] / found).tolist(),
    }


def measure(settings: Settings) -> dict[str, Any]:
    from ulx.progress import Progress

    curves: list[tuple[Stage, Curve]] = [(stage, curve) for stage in settings.stages for curve in settings.curves]
    results: list[dict[str, Any]] = []
    turns = sum(len(settings.sizes(curve)) for _, curve in curves)
    with Progress("cost curves", total=turns * (settings.rounds + ROUNDS_BEFORE + 1), unit="steps") as progress:
        for stage, curve in curves:
            sizes = list(settings.sizes(curve))
            steps = []
            for size in sizes:
                steps.append(Step(config_of(curve, size, settings), stage))
                progress.advance()
            seconds_of: list[list[float]] = [[] for _ in sizes]
            for done in range(ROUNDS_BEFORE + settings.rounds):
                for step, taken in zip(steps, seconds_of, strict=True):
                    seconds = step.run()
                    if done >= ROUNDS_BEFORE:
                        taken.append(seconds)
                    progress.advance()
            amounts: dict[Amount, list[float]] = {
                "seconds": [statistics.median(taken) for taken in seconds_of],
                "mib": [step.mib for step in steps],
                "gflops": [step.gflops for step in steps],
            }
            degree = 2 if curve in QUADRATIC else 1
            fits = {name: fitted(sizes, values, degree) for name, values in amounts.items()}
            results.append({"stage": stage, "curve": curve, "sizes": sizes, **amounts, "fits": fits})
    how = here() | {"command": f"python benchmarks/cost_curves.py {shlex.join(sys.argv[1:])}".strip()}
    return {"curves": [how | one for one in results]}


def joined(before: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """With the curves that were measured before and not now, in the order of a whole measurement."""
    place = {(stage, curve): i for i, (stage, curve) in enumerate(itertools.product(get_args(Stage), get_args(Curve)))}
    found = {(one["stage"], one["curve"]): one for one in (*before.get("curves", ()), *results["curves"])}
    return {"curves": [found[key] for key in sorted(found, key=place.__getitem__)]}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| stage | over | sizes | fit | error of time | of memory | of FLOPs | quadratic part: time | memory | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results["curves"]:
        quadratic, fits = one["curve"] in QUADRATIC, one["fits"]
        errors = [f"{fits[name]['largest_error']:.1%}" for name in ("seconds", "mib", "gflops")]
        ends = [(fits[name]["share_of_highest"][0], fits[name]["share_of_highest"][-1]) for name in fits]
        shares = [f"{low:.0%} to {high:.0%}" if quadratic else "" for low, high in ends]
        sizes = ", ".join(f"{size:,}" for size in one["sizes"])
        fit = "a + b n + c n²" if quadratic else "a + b n"
        lines.append(f"| {' | '.join([one['stage'], one['curve'], sizes, fit, *errors, *shares])} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    names = list(dict.fromkeys(one["curve"] for one in results["curves"]))
    figure, rows = plt.subplots(2, len(names), figsize=(3.3 * len(names), 6), layout="constrained", squeeze=False)
    for one in results["curves"]:
        column = names.index(one["curve"])
        fine = np.linspace(0, max(one["sizes"]), 100)
        for row, (name, scale) in zip(rows, (("seconds", 1), ("mib", 1024)), strict=True):
            axis = row[column]
            (points,) = axis.plot(one["sizes"], np.asarray(one[name]) / scale, "o", label=one["stage"])
            fit = np.polynomial.Polynomial(one["fits"][name]["coefficients"])(fine) / scale
            axis.plot(fine, fit, color=points.get_color(), linewidth=1)
            axis.set(xlabel=one["curve"], xlim=(0, None), ylim=(0, None))
    rows[0][0].set_ylabel("seconds a step")
    rows[1][0].set_ylabel("GiB")
    rows[0][0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        file = Path(settings.results) / "cost_curves.json"
        results = joined(json.loads(file.read_text()) if file.exists() else {}, measure(settings))
        text = table(results)
        commands = dict.fromkeys(f"`{one['command']}` on {one['date']}, {one['machine']}" for one in results["curves"])
        page = (
            f"Measured by {'; '.join(commands)}. Error: the largest of the fit, relative. The quadratic part is that "
            f"of the smallest and of the largest size.\n\n{text}\n"
        )
        leave(results, settings.results, "cost_curves", page)
        plot(results, Path(settings.results) / "cost_curves.png")
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
