"""What a base model knows of held-out latents at each noise level: where it has still to learn, or what runs differ in.

    python benchmarks/denoising.py --runs runs/openmoji
    python benchmarks/denoising.py --runs runs/kinetics600 runs/longer

Held-out examples are encoded, noised to each level, and denoised by the base model, which is told what it is told when
it samples: classes, captions, the first frames of clips. The squared error of x̂ is over the variance of the latents
at each position: 1 is left to somebody who knows their mean alone. High noise decides what is where, low noise how
it looks. Of clips, frame by frame of the latent, since later ones are harder to foresee. Examples and noise are the
same for all runs, but their latents are those of each run's own encoder.

Leaves benchmarks/results/denoising.md, .json and .png.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import points

if TYPE_CHECKING:
    import numpy as np

    from ulx.data.source import Dataset
    from ulx.runs import Run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What base models know of held-out latents."""

    runs: tuple[str, ...]
    """Folders of trained runs, on the same data."""
    levels: tuple[float, ...] = (-6.0, -4.0, -2.0, -1.0, 0.0, 2.0)
    """Log-SNRs λ."""
    count: int = 64
    """Held-out examples, spread over them."""
    results: str = str(points.RESULTS)
    """Folder of the results."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("--runs names at least one folder of a run")
        if self.count < 2:
            raise ValueError(f"--count must be at least 2, for a variance, got {self.count}")


def unknown_share(x: "np.ndarray", x_hat: "np.ndarray", frames: bool) -> "np.ndarray":
    """Of latents `n *latent k` their squared errors over their variance at each position, summed over all positions
    before they are divided, so that one that never changes counts for nothing; `frames` of each of the first axis."""
    axes = tuple(range(2 if frames else 1, x.ndim))
    variance = x.var(axis=0, ddof=1, keepdims=True).sum(axis=axes).squeeze(0)
    return ((x_hat - x) ** 2).mean(axis=0, keepdims=True).sum(axis=axes).squeeze(0) / variance


def measure_run(run: "Run", dataset: "Dataset", settings: Settings, advance: Callable[[int], None]) -> dict[str, Any]:
    import equinox as eqx
    import jax.numpy as jnp

    from ulx import diffusion
    from ulx.data.pixels import to_float
    from ulx.evaluation_data import held_out_examples, held_out_rows, told_of
    from ulx.generate import in_batches
    from ulx.seeding import root_key

    base, config = run.base, run.config
    assert base is not None
    options = dataclasses.replace(config.evaluate, held_out=settings.count)
    images, _ = held_out_examples(dataset, options)
    text = run.open_text() if run.text else None
    told = told_of(dataset.validation, held_out_rows(dataset, options), base.conditions, text)
    if config.model.given_frames:
        told = dataclasses.replace(told, first=images[:, : config.model.given_frames])

    @eqx.filter_jit
    def denoised(x, told, *, keys):
        z = run.model.posterior(to_float(x)).mean
        eps = diffusion.normal(keys, z)
        denoise = base.given(told.conditions(run.model.shape))

        def at(logsnr):
            levels = jnp.full(len(z), logsnr)
            return denoise(diffusion.noise(z, levels, eps), levels)

        return z, jnp.stack([at(logsnr) for logsnr in settings.levels], axis=1)

    z, x_hat = in_batches(
        denoised,
        images,
        told,
        batch_size=min(config.evaluate.batch_size, len(images)),
        key=root_key(0, "denoising"),
        on_batch=advance,
    )
    share = lambda frames: [unknown_share(z, x_hat[:, i], frames).tolist() for i in range(len(settings.levels))]  # noqa: E731
    return {
        "run": config.name,
        "data": config.data.source,
        "step": run.step[1],
        "weights": run.weights,
        "base_bias": config.base_bias,
        "base": dataclasses.asdict(config.model.base),
        "train_base": dataclasses.asdict(config.train_base),
        "count": len(images),
        "share": share(False),
        "share_by_frame": share(True) if config.data.clips else None,
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Raises ValueError for runs on different data, or without a base model."""
    from ulx import runs
    from ulx.data import open_dataset
    from ulx.progress import Progress

    opened = [runs.load(folder) for folder in settings.runs]
    dataset = open_dataset(opened[0].config.data)
    for run in opened:
        if run.base is None:
            raise ValueError(f"{run.path} has no base model: finish its stage 2")
        run.check_data(dataset)
    with Progress("denoise", total=settings.count * len(opened), unit="examples") as progress:
        found = [measure_run(run, dataset, settings, progress.advance) for run in opened]
    return {**points.here(), "levels": settings.levels, "runs": found}


def table(results: dict[str, Any]) -> str:
    rows = []
    for run in results["runs"]:
        rows.append([f"{run['run']}, step {run['step']:,}", "all", *(f"{share:.3f}" for share in run["share"])])
        for frame, shares in enumerate(zip(*run["share_by_frame"] or (), strict=True)):
            rows.append(["", f"frame {frame}", *(f"{share:.3f}" for share in shares)])
    return points.markdown(["run", "of the latent", *(f"λ = {level:g}" for level in results["levels"])], rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """A line a run; of clips, a panel for each level with the frames along it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels, by_frame = results["levels"], results["runs"][0]["share_by_frame"] is not None
    panels = levels if by_frame else (None,)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 2.5 * len(panels), 3.5), layout="constrained", squeeze=False, sharey=True
    )
    for i, (axis, level) in enumerate(zip(axes[0], panels, strict=True)):
        for run in results["runs"]:
            shares = run["share_by_frame"][i] if by_frame else run["share"]
            axis.plot(range(len(shares)) if by_frame else levels, shares, marker="o", markersize=3, label=run["run"])
        axis.set(xlabel="frame of the latent" if by_frame else "λ", ylim=(0, None))
        axis.set_title(f"λ = {level:g}" if by_frame else "", fontsize=9)
    axes[0, 0].set_ylabel("error of x̂ / variance of the latent")
    axes[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = measure(settings)
        text = table(results)
        names = " ".join(f"runs/{run['run']}" for run in results["runs"])
        page = (
            f"Measured by `python benchmarks/denoising.py --runs {names}`, {results['date']}, {results['machine']}: "
            f"squared error of x̂ of {results['runs'][0]['count']} held-out examples' latents over their variance, "
            f"{results['runs'][0]['weights']} weights."
            f"\n\n{text}\n"
        )
        points.leave(results, settings.results, "denoising", page)
        plot(results, Path(settings.results) / "denoising.png")
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
