"""Error of every sampler against network calls, on a mixture of two Gaussians whose best denoiser is known.

    python benchmarks/solver_orders.py

One dimension, float64, λ from −10 to 5. ODE solvers go from fixed starts, and their error is against the exact flow
map (which keeps quantiles). Stochastic ones are measured by the law of what they draw: W₁ to the exact marginal, the
largest error of an expectation over all 1-Lipschitz functions. Leaves solver_orders.md, .json and .png under
benchmarks/results/.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import points

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results"
BEGIN, END = -10.0, 5.0
CALLS = (8, 16, 32, 64, 128)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
STOCHASTIC = (("ancestral", 0.0), ("euler", 1.0), ("heun", 0.25), ("heun", 1.0))
"""Solver and churn."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Error of every sampler against network calls."""

    starts: int = 64
    """Fixed starts of the ODE solvers, evenly spaced quantiles."""
    draws: int = 2**17
    """Samples of the stochastic ones."""
    results: str = str(RESULTS)
    """Folder of the results."""


def measure(settings: Settings) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from oracles import mixture_1d
    from scipy.special import ndtri

    from ulx import samplers

    mixture = mixture_1d([0.4, 0.6], [-1.0, 0.8], [0.1, 0.2])
    run = jax.jit(samplers.sample, static_argnames=("denoise", "solver", "churn", "tolerance"))
    starts, quantiles = (ndtri((np.arange(n) + 0.5) / n) for n in (settings.starts, settings.draws))
    # The marginal at λ = −10 is the standard normal but for 1e-3, which every solver carries along.
    flow, marginal = mixture.flow(starts, BEGIN, END), mixture.flow(quantiles, BEGIN, END)

    def sample(solver, noise, steps, **options):
        grid = samplers.logsnr_grid(steps, logsnr_min=BEGIN, logsnr_max=END)
        result = run(mixture.denoise, jnp.asarray(noise)[:, None], grid, solver, **options)
        return np.asarray(result.z)[:, 0], int(result.nfe)

    def error(found: np.ndarray) -> dict:
        return {"rms": float(np.sqrt(np.mean((found - flow) ** 2))), "max": float(np.abs(found - flow).max())}

    results: dict = {"ode": [], "adaptive": [], "stochastic": []}
    with jax.enable_x64(True):
        for solver in ("euler", "heun", "dpmpp_2m"):
            for calls in CALLS:
                found, nfe = sample(solver, starts, calls // 2 if solver == "heun" else calls)
                results["ode"].append({"solver": solver, "nfe": nfe, **error(found)})
        for tolerance in TOLERANCES:
            found, nfe = sample("tsit5", starts, 1, tolerance=tolerance)
            results["adaptive"].append({"solver": "tsit5", "tolerance": tolerance, "nfe": nfe, **error(found)})
        # Independent draws from the exact marginal: what sampling noise alone would give.
        rng = np.random.default_rng(0)
        draws = np.interp(
            rng.uniform(size=settings.draws), (np.arange(settings.draws) + 0.5) / settings.draws, marginal
        )
        results["sampling_noise"] = float(np.mean(np.abs(np.sort(draws) - marginal)))
        noise, keys = rng.standard_normal(settings.draws), jax.random.split(jax.random.key(0), settings.draws)
        for solver, churn in STOCHASTIC:
            for calls in CALLS[1:]:
                steps = calls // 2 if solver == "heun" else calls
                found, nfe = sample(solver, noise, steps, churn=churn, key=keys)
                distance = float(np.mean(np.abs(np.sort(found) - marginal)))
                results["stochastic"].append({"solver": solver, "churn": churn, "nfe": nfe, "w1": distance})
    return {
        "data": "0.4 N(-1, 0.1) + 0.6 N(0.8, 0.2)",
        "logsnr": [BEGIN, END],
        "starts": settings.starts,
        "draws": settings.draws,
        **points.here(),
        **results,
    }


def by_solver(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    label = lambda row: row["solver"] + (f", churn {row['churn']:g}" if row.get("churn") else "")  # noqa: E731
    return [(name, list(group)) for name, group in itertools.groupby(rows, key=label)]


def table(results: dict) -> str:
    cells = lambda values: " | ".join(f"{value:.2g}" if isinstance(value, float) else str(value) for value in values)  # noqa: E731
    header = lambda *columns: [f"| {cells(columns)} |", "|" + "---|" * len(columns)]  # noqa: E731
    lines = ["RMS error against the exact flow map; the order is the slope between the last two.", ""]
    lines += header("solver", *(f"NFE {calls}" for calls in CALLS), "order")
    for name, rows in by_solver(results["ode"]):
        order = math.log2(rows[-2]["rms"] / rows[-1]["rms"])
        lines.append(f"| {name} | {cells(row['rms'] for row in rows)} | {order:.2f} |")
    lines += ["", "tsit5, error against tolerance:", "", *header("tolerance", "NFE", "RMS error", "largest error")]
    lines += [f"| {cells((r['tolerance'], r['nfe'], r['rms'], r['max']))} |" for r in results["adaptive"]]
    noise = results["sampling_noise"]
    lines += [
        "",
        f"W₁ of {results['draws']:,} drawn samples to the exact marginal; sampling noise alone: {noise:.2g}.",
        "",
    ]
    lines += header("solver", *(f"NFE {calls}" for calls in CALLS[1:]))
    lines += [f"| {name} | {cells(row['w1'] for row in rows)} |" for name, rows in by_solver(results["stochastic"])]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (ode, adaptive, stochastic) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for name, rows in by_solver(results["ode"] + results["adaptive"]):
        ode.loglog([row["nfe"] for row in rows], [row["rms"] for row in rows], marker="o", label=name)
    ode.set(xlabel="network calls", ylabel="RMS error", title="ODE solvers, exact flow map")
    rows = results["adaptive"]
    tolerances = [row["tolerance"] for row in rows]
    adaptive.loglog(tolerances, [row["max"] for row in rows], marker="o", label="largest error")
    adaptive.loglog(tolerances, tolerances, color="grey", linestyle="--", label="tolerance")
    adaptive.set(xlabel="tolerance", ylabel="error", title="tsit5")
    for name, rows in by_solver(results["stochastic"]):
        stochastic.loglog([row["nfe"] for row in rows], [row["w1"] for row in rows], marker="o", label=name)
    stochastic.axhline(results["sampling_noise"], color="grey", linestyle="--", label="sampling noise")
    stochastic.set(xlabel="network calls", ylabel="W₁ to the exact marginal", title="Stochastic samplers")
    for axis, calls in ((ode, CALLS), (stochastic, CALLS[1:])):
        axis.set_xticks(calls, [str(count) for count in calls])
        axis.minorticks_off()
    for axis in (ode, adaptive, stochastic):
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = measure(settings)
        text = table(results)
        made = f"Measured by `python benchmarks/solver_orders.py` on {results['date']}: data {results['data']} "
        how = f"with its exact denoiser, λ from {BEGIN:g} to {END:g}, float64. Machine: {results['machine']}."
        points.leave(results, settings.results, "solver_orders", f"{made}{how}\n\n{text}\n")
        plot(results, Path(settings.results) / "solver_orders.png")
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
