"""Does rate control land on its target, and does the loss factor that it found give the same rate by hand? OpenMoji.

    python benchmarks/rate_control.py                             three targets, stage 1 alone, each run twice
    python benchmarks/rate_control.py --targets 0.3 --steps 2000

Each target is two runs: one under `--rate.target-bits-per-pixel`, one with the loss factor that it reports, set from
the start. Points that are in the results file already, with the same settings, are not run again; an interrupted run is
resumed. Leaves benchmarks/results/rate_control.jsonl, a table and a plot of the loss factor on its way.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import points

if TYPE_CHECKING:
    from ulx.config import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Targets of the rate, reached and reproduced."""

    targets: tuple[float, ...] = (0.3, 0.45, 0.62)
    """Held-out bits per pixel to reach."""
    steps: int = 1000
    """Stage-1 steps of each run, of 32 images each."""
    seed: int = 0
    """Seed of every run."""
    results: str = str(points.RESULTS)
    """Folder of the results."""
    runs: str = "runs"
    """Folder of the runs."""


def configs_of(target: float, settings: Settings) -> tuple["Config", "Config"]:
    """The controlled run, and the fixed one but for its loss factor: the `tiny` preset's stage 1."""
    from openmoji import PRESETS

    tiny = PRESETS["tiny"]

    def named(name: str, **changes) -> "Config":
        name = f"{name}_{target:g}_{settings.steps}_{settings.seed}"
        # All of the recipe that counts steps is cut with them.
        part = settings.steps / tiny.train.steps
        train = points.of_length(tiny.train, settings.steps)
        first, last = tiny.prior_warmup
        changes["prior_warmup"] = (round(part * first), round(part * last))
        changes |= {"name": name, "runs": settings.runs, "seed": settings.seed, "train": train}
        return dataclasses.replace(tiny, **changes)

    return named("controlled", rate=dataclasses.replace(tiny.rate, target_bits_per_pixel=target)), named("fixed")


def table(pairs: list[tuple[dict, dict]]) -> str:
    lines = [
        "| target | held-out bits/pixel | off by | c_lf found | bits/pixel with it fixed | off by | seed | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for controlled, fixed in pairs:
        target, there = controlled["target_bits_per_pixel"], controlled["bits_per_pixel"]
        again = fixed["bits_per_pixel"]
        lines.append(
            f"| {target:g} | {there['value']:.4f} ± {there['standard_error']:.4f} | {there['value'] / target - 1:+.1%} "
            f"| {controlled['loss_factor']:.4g} | {again['value']:.4f} ± {again['standard_error']:.4f} "
            f"| {again['value'] / there['value'] - 1:+.1%} | {controlled['seed']} | {controlled['date']} |"
        )
    return "\n".join(lines)


def plot(logs: dict[float, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (factors, rates) = plt.subplots(2, 1, figsize=(6, 6), sharex=True, layout="constrained")
    for target, log in logs.items():
        steps = [line["step"] for line in log]
        (line,) = factors.plot(steps, [entry["loss_factor"] for entry in log], label=f"{target:g} bits/pixel")
        felt = [entry["felt_loss_factor"] for entry in log]
        factors.plot(steps, felt, color=line.get_color(), linestyle="--", linewidth=1)
        rates.plot(steps, [entry["rate"] for entry in log], color=line.get_color(), alpha=0.7)
        rates.axhline(target, color=line.get_color(), linestyle="--", linewidth=1)
    factors.set(ylabel="loss factor", yscale="log", title="Rate control, OpenMoji 32×32 (dashed: as felt)")
    factors.legend(title="target")
    rates.set(xlabel="step", ylabel="training bits/pixel", yscale="log")
    figure.savefig(path, dpi=150)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command
    from ulx.metrics_log import read_metrics

    def work() -> None:
        file = Path(settings.results) / "rate_control.jsonl"
        pairs, logs = [], {}
        for target in settings.targets:
            controlled, fixed = configs_of(target, settings)
            there = points.measured(controlled, file)
            pairs.append((there, points.measured(dataclasses.replace(fixed, loss_factor=there["loss_factor"]), file)))
            if (controlled.path / "stage1.jsonl").exists():
                logs[target] = read_metrics(controlled.path / "stage1.jsonl")
        text = table(pairs)
        (file.parent / "rate_control.md").write_text(
            f"Measured by `python benchmarks/rate_control.py`: stage 1 of the `tiny` preset, {settings.steps} steps, "
            f"EMA weights, {pairs[0][0]['bits_per_pixel']['n']} held-out OpenMoji by family, of which the control "
            f"saw {controlled.rate.images}. ± is one standard error over images, which the two runs of a row share. "
            f"Machine: {points.machines(point for pair in pairs for point in pair)}.\n\n{text}\n"
        )
        if len(logs) == len(settings.targets):  # a plot of fewer would take the place of one of all
            plot(logs, file.parent / "rate_control.png")
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
