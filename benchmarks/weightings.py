"""The decoder's weighting on the ε-loss, and where it crosses the prior's (the paper's Fig. 3).

    python benchmarks/weightings.py
    python benchmarks/weightings.py --resolution 32 --factors 1.3 2 4

Nothing is trained. Leaves benchmarks/results/weightings.png.
"""

import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """The decoder's weighting by noise level."""

    resolution: int = 512
    """Pixels per side: b follows by the resolution rule."""
    factors: tuple[float, ...] = (1.3, 1.5, 1.7, 2.1)
    """Loss factors c_lf."""
    out: str = str(Path(__file__).parent / "results" / "weightings.png")
    """Where the picture goes."""


def main() -> None:
    import jax.numpy as jnp
    import matplotlib
    import tyro

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ulx import schedules, weightings

    settings = tyro.cli(Settings, description=__doc__)
    bias = weightings.sigmoid_bias(settings.resolution)
    ends = schedules.image_schedule(settings.resolution)
    logsnr = np.linspace(ends.logsnr_min, ends.logsnr_max, 400)
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.axhline(1, color="black", linewidth=1, label="prior: w = 1")
    for factor in settings.factors:
        weight = weightings.sigmoid(bias, factor)(jnp.asarray(logsnr))
        (line,) = axis.plot(logsnr, weight, label=f"decoder: c_lf = {factor:g}")
        if factor > 1:
            axis.plot(weightings.cutoff(bias, factor), 1, "o", color=line.get_color())
    axis.set(
        xlabel="log-SNR λ",
        ylabel="weight of ‖ε − ε̂‖²/2",
        title=f"c_lf · sigmoid(b − λ), b = {bias:.2f} at {settings.resolution} pixels; dots: the cut-off λ*",
    )
    axis.invert_xaxis()
    axis.legend()
    figure.savefig(settings.out, dpi=150)
    print(settings.out)


if __name__ == "__main__":
    main()
