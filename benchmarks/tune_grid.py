"""The spacing of a run's sampling steps that leaves the least error, for few steps: 1/ρ of `ulx.samplers.logsnr_grid`.

    python benchmarks/tune_grid.py --run runs/openmoji
    python benchmarks/tune_grid.py --run runs/openmoji --distances      and what it does to the distance of samples

The base model's samples, and the decoder's of the same latents, by a solver of the ODE in few steps are compared with
the same noise taken through many steps of Heun: error is the root mean square difference over that of the fine
solution. Few steps with the least error follow the model's own flow the closest; whether the pictures are better is
another question, which `--distances` asks. Leaves benchmarks/results/tune_grid.json and .md.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import points
import sampling

Part = Literal["latents", "decoder"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The spacing of sampling steps with the least error."""

    run: str
    """Folder of a trained run."""
    parts: tuple[Part, ...] = ("latents", "decoder")
    solver: Literal["euler", "heun", "dpmpp_2m"] = "dpmpp_2m"
    steps: tuple[int, ...] = (4, 8, 12, 16)
    inverse_rho: tuple[float, ...] = (-0.5, -0.3, -0.15, 0.0, 0.15, 0.3, 0.5)
    """Those that are tried."""
    fine_steps: int = 64
    """Of Heun."""
    count: int = 64
    """Samples."""
    distances: bool = False
    """Also measure fd_efflite0 with even steps and with those found, as the run's evaluation does."""
    results: str = str(points.RESULTS)
    """Folder of the results."""


def parts_of(run: Any, count: int) -> dict[Part, tuple[Callable[..., Any], Any, Any]]:
    """Of each part the denoiser, its schedule and noise; the decoder's latents come from the first one's fine solution,
    which it is called with."""
    import jax
    import jax.numpy as jnp

    from ulx.nn.conditions import Conditions

    keys = jax.random.split(jax.random.key(run.config.seed), 2)
    classes = run.base.conditions.num_classes
    told = Conditions(jnp.arange(count) % classes if classes else None)
    latents, images = (
        jax.random.normal(key, (count, *shape))
        for key, shape in zip(keys, (run.base.shape, run.model.shape), strict=True)
    )

    def decoder(z_0: Any) -> Any:
        return run.model.decoder.given(z_0, run.model.decoder_logsnr_0(count))

    return {
        "latents": (lambda z_0: run.base.given(told), run.model.latent_schedule, latents),
        "decoder": (decoder, run.model.decoder.schedule, images),
    }


def measure(settings: Settings) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from ulx import runs, samplers
    from ulx.progress import Progress

    run = runs.load(Path(settings.run))
    if run.base is None or run.config.data.clips:
        raise ValueError(f"--run {settings.run}: must be a run on images with a base model")
    found: list[dict[str, Any]] = []
    z_0 = None
    tries = len(settings.steps) * len(settings.inverse_rho)
    with Progress("spacings", total=2 + len(settings.parts) * tries, unit="grids") as progress:
        for part, (denoiser, schedule, noise) in parts_of(run, settings.count).items():
            ends = {"logsnr_min": schedule.logsnr_min, "logsnr_max": schedule.logsnr_max}
            # The grid is an argument, so that a solver is compiled once for a number of steps.
            solve = jax.jit(
                lambda z_0, grid, solver, denoiser=denoiser, noise=noise: (
                    samplers.sample(denoiser(z_0), noise, grid, solver).z
                ),
                static_argnums=2,
            )
            fine = solve(z_0, samplers.logsnr_grid(settings.fine_steps, **ends), "heun")
            progress.advance()
            for steps in settings.steps if part in settings.parts else ():
                errors = []
                for inverse_rho in settings.inverse_rho:
                    grid = samplers.logsnr_grid(steps, **ends, inverse_rho=inverse_rho)
                    coarse = solve(z_0, grid, settings.solver)
                    errors.append(float(jnp.sqrt(jnp.mean((coarse - fine) ** 2) / jnp.mean(fine**2))))
                    progress.advance()
                best = min(zip(errors, settings.inverse_rho, strict=True))[1]
                found.append({"part": part, "steps": steps, "errors": errors, "best": best})
            z_0 = fine if part == "latents" else z_0
    if settings.distances:
        add_distances(found, settings)
    return {
        "run": run.config.name,
        "solver": settings.solver,
        "inverse_rho": settings.inverse_rho,
        "fine_steps": settings.fine_steps,
        "count": settings.count,
        **points.here(),
        "rows": found,
    }


def add_distances(found: list[dict[str, Any]], settings: Settings) -> None:
    """fd_efflite0 with even steps and with the best spacing."""
    config = sampling.trained(sampling.Settings(run=settings.run))
    subject = sampling.Subject(config)
    measures = {"latents": subject.of_latents, "decoder": subject.of_decoder}
    for row in found:
        prefix = "decoder_" if row["part"] == "decoder" else ""

        def distance(inverse_rho: float, row=row, prefix=prefix) -> float:
            options = {"solver": settings.solver, "num_steps": row["steps"], "inverse_rho": inverse_rho, "churn": 0.0}
            sample = dataclasses.replace(config.sample, **{prefix + name: value for name, value in options.items()})
            return measures[row["part"]](dataclasses.replace(config, sample=sample))["fd_efflite0"]["value"]

        row["fd_efflite0"] = {"even": distance(0.0), "best": distance(row["best"])}


def table(results: dict[str, Any]) -> str:
    told = any("fd_efflite0" in row for row in results["rows"])
    columns = ["samples of", "steps", *(f"1/ρ = {value:g}" for value in results["inverse_rho"]), "least at"]
    rows = []
    for row in results["rows"]:
        distances = row.get("fd_efflite0")
        shown = [f"{distances['even']:.1f}", f"{distances['best']:.1f}"] if distances else []
        errors = [f"{error:.3f}" for error in row["errors"]]
        rows.append([row["part"], str(row["steps"]), *errors, f"{row['best']:g}", *shown])
    return points.markdown([*columns, *(["fd, even", "fd, there"] if told else [])], rows)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = measure(settings)
        text = table(results)
        option = " --distances" if settings.distances else ""
        page = (
            f"Measured by `python benchmarks/tune_grid.py --run runs/{results['run']}{option}`, {results['date']}, "
            f"{results['machine']}: error of {results['count']} samples by {results['solver']}, relative to "
            f"{results['fine_steps']} steps of heun from the same noise.\n\n{text}\n"
        )
        points.leave(results, settings.results, "tune_grid", page)
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
