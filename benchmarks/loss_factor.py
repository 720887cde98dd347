"""Bits and PSNR against the loss factor c_lf (the first two columns of the paper's Tab. 2), on OpenMoji at 32×32.

    python benchmarks/loss_factor.py                              three factors, stage 1 alone
    python benchmarks/loss_factor.py --factors 1.3 1.5 1.7 --steps 800

Each point is a run of its own under runs/; a point that is in the results file already, with the same settings, is not
run again, and an interrupted one is resumed. Leaves benchmarks/results/loss_factor.jsonl, a table and a plot.
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
    """Bits and PSNR against the loss factor."""

    factors: tuple[float, ...] = (1.3, 1.7, 2.5)
    """The loss factors to train with."""
    steps: int = 400
    """Stage-1 steps of each run, of 32 images each."""
    seed: int = 0
    """Seed of every run."""
    results: str = str(points.RESULTS)
    """Folder of the results."""
    runs: str = "runs"
    """Folder of the runs."""


def config_of(factor: float, settings: Settings) -> "Config":
    """The run of one point: the `tiny` preset with this loss factor, the resolution rule's b, and fewer steps."""
    from openmoji import PRESETS

    tiny = PRESETS["tiny"]
    name = f"loss_factor_{factor:g}_{settings.steps}_{settings.seed}"
    return dataclasses.replace(
        tiny,
        name=name,
        runs=settings.runs,
        seed=settings.seed,
        loss_factor=factor,
        sigmoid_bias=None,  # the resolution rule's: with it the paper's factors keep the latent alive
        train=dataclasses.replace(tiny.train, steps=settings.steps),
    )


def table(found: list[dict]) -> str:
    lines = [
        "| c_lf | bits/pixel | PSNR (dB) | N | steps | seed | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in found:
        bits, psnr = p["bits_per_pixel"], p["psnr"]
        lines.append(
            f"| {p['loss_factor']:g} | {bits['value']:.3f} ± {bits['standard_error']:.3f} "
            f"| {psnr['value']:.2f} ± {psnr['standard_error']:.2f} | {bits['n']} "
            f"| {p['steps']} | {p['seed']} | {p['date']} |"
        )
    return "\n".join(lines)


def plot(found: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    bits, psnr = [p["bits_per_pixel"] for p in found], [p["psnr"] for p in found]
    axis.errorbar(
        [b["value"] for b in bits],
        [q["value"] for q in psnr],
        xerr=[b["standard_error"] for b in bits],
        yerr=[q["standard_error"] for q in psnr],
        marker="o",
    )
    for p, b, q in zip(found, bits, psnr, strict=True):
        axis.annotate(f"c_lf {p['loss_factor']:g}", (b["value"], q["value"]), (6, -12), textcoords="offset points")
    axis.set(xlabel="held-out bits/pixel", ylabel="held-out PSNR (dB)", title="Loss factor, OpenMoji 32×32")
    axis.margins(x=0.2, y=0.1)
    figure.savefig(path, dpi=150)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        file = Path(settings.results) / "loss_factor.jsonl"
        shown = [points.measured(config_of(factor, settings), file) for factor in sorted(settings.factors)]
        text = table(shown)
        (file.parent / "loss_factor.md").write_text(
            "Measured by `python benchmarks/loss_factor.py`: stage 1 of the `tiny` preset with b = 2.5, EMA weights, "
            "held-out OpenMoji by family. ± is one standard error over images. Machine: "
            f"{points.machines(shown)}.\n\n"
            f"{text}\n"
        )
        plot(shown, file.parent / "loss_factor.png")
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
