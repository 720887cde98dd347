"""The estimators of the rate L_z against each other: how large an error does the same number of network calls leave?

    python benchmarks/rate_estimators.py                         exact denoisers, 16 and 256 dimensions, three schedules
    python benchmarks/rate_estimators.py --run runs/openmoji     and the prior of a trained run, on held-out images

The error is that of L_z of given examples, from independent replicates; with the examples' own spread it becomes the
standard error of a data set's rate. For a run the rate under the base model and the probability flow's stand beside it.
Leaves benchmarks/results/rate_estimators.md, .json and .png.
"""

import dataclasses
import math
from pathlib import Path

import points

RESULTS = Path(__file__).parent / "results"
EXAMPLES = 128
BEST = "independent, at best"
"""What no proposal of noise levels that all examples share can go below, by quadrature."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Errors of the estimators of the rate."""

    run: str | None = None
    """Folder of a trained run to measure too."""
    dims: tuple[int, ...] = (16, 256)
    """Dimensions of the data with exact denoisers."""
    draws: int = 16
    """Denoiser calls per example and replicate."""
    replicates: int = 128
    """Independent replicates with exact denoisers: errors are known to 1/sqrt(2 · replicates)."""
    images: int = 64
    """Held-out images of the run."""
    run_replicates: int = 8
    """Independent replicates on the run."""
    probes: int = 4
    """Hutchinson's probes per image for the flow's likelihood."""
    results: str = str(RESULTS)
    """Folder of the results."""


def estimators() -> dict:
    """Placement, and whether the noise levels follow a learned proposal."""
    from ulx.time_sampling import antithetic, independent, low_discrepancy, stratified

    return {
        "independent": (independent, False),
        "stratified": (stratified, False),
        "antithetic": (antithetic, False),
        "low-discrepancy": (low_discrepancy, False),
        "independent, learned": (independent, True),
        "stratified, learned": (stratified, True),
        "low-discrepancy, learned": (low_discrepancy, True),
    }


def exact_data(dims: int) -> dict:
    """Per data set: samples of a NumPy generator, its best denoiser, and its exact rate between two log-SNRs."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ulx import diffusion

    variance = np.geomspace(0.1, 10.0, dims)

    def shrink(z_t, logsnr, *, key=None):
        level = diffusion.expand(logsnr, z_t)
        alpha, sigma = diffusion.alpha(level), diffusion.sigma(level)
        return alpha * variance * z_t / (alpha**2 * variance + sigma**2)

    def sign(z_t, logsnr, *, key=None):
        level = diffusion.expand(logsnr, z_t)
        return jnp.tanh(z_t * jnp.sqrt(jax.nn.sigmoid(level)) / jax.nn.sigmoid(-level))

    def information_of_signs(logsnr: float) -> float:
        """I(x; z) of one x = ±1 in nats, by quadrature: ln 2 − E ln(1 + exp(−2(s + √s ε))), s the SNR."""
        snr = math.exp(logsnr)
        eps = np.linspace(-12, 12, 20_001)
        density = np.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi)
        return math.log(2) - float(np.trapezoid(density * np.logaddexp(0, -2 * (snr + math.sqrt(snr) * eps)), eps))

    return {
        "Gaussian, variances 0.1 to 10": (
            lambda rng: rng.standard_normal((EXAMPLES, dims)) * np.sqrt(variance),
            shrink,
            lambda high, low: 0.5 * np.sum(np.log1p(variance * math.exp(high)) - np.log1p(variance * math.exp(low))),
        ),
        "points {−1, 1}^d": (
            lambda rng: rng.choice([-1.0, 1.0], (EXAMPLES, dims)),
            sign,
            lambda high, low: dims * (information_of_signs(high) - information_of_signs(low)),
        ),
    }


def least_variance(denoise, x, high: float, low: float, levels: int = 256, noises: int = 16) -> float:
    """Of one draw of L_z, averaged over the examples, with the best density of noise levels that they can share.

    With f(λ, ε) = ½ exp(λ) ‖x − x̂‖², so that L_z = ∫ E f dλ, a density q leaves ∫ E f²/q dλ − L_z², least for q in
    proportion to √(E f²), E being over noise and examples: (∫ √(E f²) dλ)² − L_z².
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    def at(level):
        key = jax.random.fold_in(jax.random.key(2), jnp.round(1000 * level).astype(jnp.int32) + 2**20)
        noise = jax.random.normal(key, (noises, *x.shape))
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(level)), jnp.sqrt(jax.nn.sigmoid(-level))
        found = jax.vmap(lambda eps: denoise(alpha * x + sigma * eps, jnp.full(len(x), level)))(noise)
        nats = 0.5 * jnp.exp(level) * jnp.sum((x - found) ** 2, axis=-1)
        return nats.mean(0), (nats**2).mean()

    grid = np.linspace(low, high, levels)
    mean, square = jax.jit(lambda g: jax.lax.map(at, g))(jnp.asarray(grid, jnp.float32))
    exact = np.trapezoid(np.asarray(mean, np.float64), grid, axis=0)
    return float(np.trapezoid(np.sqrt(np.asarray(square, np.float64)), grid) ** 2 - np.mean(exact**2))


def on_exact_data(dims: int, settings: Settings) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ulx import schedules
    from ulx.bound import estimate_rate

    shapes = {
        "linear": schedules.linear(5.0, -10.0),
        "cosine": schedules.cosine(5.0, -10.0),
        "cosine shifted by −3": schedules.cosine(8.0, -7.0).shifted(-3.0),
    }
    rows = []
    for data, (draw, denoise, integral) in exact_data(dims).items():
        x, other = (jnp.asarray(draw(np.random.default_rng(seed)), jnp.float32) for seed in (0, 1))
        for shape, schedule in shapes.items():
            pilot = jax.jit(lambda z, key, d=denoise, s=schedule: estimate_rate(d, z, s, key=key))
            proposal = pilot(other, jax.random.key(1)).diffusion.proposal()
            for name, (placement, learned) in estimators().items():
                found = estimate_rate(
                    denoise,
                    x,
                    schedule,
                    key=jax.random.key(0),
                    draws=settings.draws,
                    replicates=settings.replicates,
                    placement=placement,
                    proposal=proposal if learned else None,
                )
                exact = float(integral(schedule.logsnr_max, schedule.logsnr_min))
                rows.append({"data": data, "schedule": shape, "dims": dims, "estimator": name, "exact": exact})
                rows[-1] |= _row(found.diffusion.mean, settings.replicates)
            least = least_variance(denoise, x, schedule.logsnr_max, schedule.logsnr_min)
            error = math.sqrt(least / settings.draws / EXAMPLES)
            rows.append(rows[-1] | {"estimator": BEST, "value": None, "estimator_error_of_one_replicate": error})
    return rows


def _row(mean, replicates: int, scale: float = 1.0) -> dict:
    """Errors of one replicate, not of the mean over all of them: what one evaluation would have."""
    one = math.sqrt(replicates) * float(mean.estimator_error)
    return {
        "value": scale * float(mean.value),
        "standard_error": scale * float(mean.standard_error),
        "estimator_error_of_one_replicate": scale * one,
        "replicates": replicates,
    }


def on_a_run(settings: Settings) -> dict:
    """Bits per pixel of held-out images under the run's prior by every estimator, its base model and its flow."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    import ulx
    from ulx import losses
    from ulx.bound import Mean, estimate_rate
    from ulx.data import open_dataset
    from ulx.data.pixels import to_float
    from ulx.likelihood import flow_rate

    run = ulx.load(settings.run)
    dataset = open_dataset(run.config.data)
    x, other = (
        to_float(np.stack([split[i]["image"] for i in range(min(settings.images, len(split)))]))
        for split in (dataset.validation, dataset.train)
    )
    schedule, pixels = run.model.latent_schedule, x[0, ..., 0].size
    encode = eqx.filter_jit(lambda model, images: model.posterior(images))
    posterior, pilot = (encode(run.model, jnp.asarray(images)) for images in (x, other))
    if posterior.std is not None:
        raise ValueError(f"{settings.run} has an encoder of variance, whose L_e this comparison leaves out")
    z_clean, pilot_z = posterior.mean, pilot.mean

    @eqx.filter_jit
    def rate(denoiser, z, key, placement, proposal, replicates):
        return estimate_rate(
            denoiser.given(),
            z,
            schedule,
            key=key,
            draws=settings.draws,
            replicates=replicates,
            placement=placement,
            proposal=proposal,
        )

    from ulx.time_sampling import stratified

    proposal = rate(run.model.prior, pilot_z, jax.random.key(1), stratified, None, 1).diffusion.proposal()
    bits = float(losses.bits_per_pixel(jnp.ones(()), num_pixels=pixels))
    key, count = jax.random.key(0), settings.run_replicates
    rows = []
    for name, (placement, learned) in estimators().items():
        found = rate(run.model.prior, z_clean, key, placement, proposal if learned else None, count)
        rows.append({"estimator": name} | _row(found.mean, count, bits))
    flow = eqx.filter_jit(
        lambda model, z, key: flow_rate(model.prior.given(), z, schedule, key=key, probes=settings.probes)
    )(run.model, z_clean, key)
    per_image = np.asarray(flow.rate, np.float64) * bits
    results = {
        "run": Path(settings.run or "").name,
        "images": len(x),
        "step": list(run.step),
        "rows": rows,
        "flow": {
            "value": per_image.mean(),
            "standard_error": per_image.std(ddof=1) / math.sqrt(len(per_image)),
            "probes": settings.probes,
            "solver_steps": int(flow.num_steps),
        },
    }
    if run.base is not None:
        base = rate(run.base, z_clean, key, stratified, None, count)
        prior = rate(run.model.prior, z_clean, key, stratified, None, count)
        results["base"] = _row(base.mean, count, bits)
        paired = base.diffusion.samples.sum(axis=2) - prior.diffusion.samples.sum(axis=2)
        results["base_minus_prior"] = _row(Mean.of(paired), count, bits)
    return results


def table(rows: list[dict]) -> str:
    lines = [
        "| data | d | schedule | estimator | exact, nats | measured | error of one replicate | against independent "
        "| against stratified |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = lambda r: (r["data"], r["schedule"], r["dims"])  # noqa: E731
        same = {r["estimator"]: r for r in rows if where(r) == where(row)}
        error = row["estimator_error_of_one_replicate"]
        measured = "" if row["value"] is None else f"{row['value']:.3f} ± {row['standard_error']:.3f}"
        gains = [same[name]["estimator_error_of_one_replicate"] / error for name in ("independent", "stratified")]
        lines.append(
            f"| {row['data']} | {row['dims']} | {row['schedule']} | {row['estimator']} | {row['exact']:.3f} "
            f"| {measured} | {error:.3f} | {gains[0]:.2f}× | {gains[1]:.2f}× |"
        )
    return "\n".join(lines)


def table_of_run(found: dict) -> str:
    lines = [
        f"Run `{found['run']}`, {found['images']} held-out images, bits/pixel:\n",
        "| | value | error of one replicate | against independent |",
        "|---|---|---|---|",
    ]
    first = found["rows"][0]["estimator_error_of_one_replicate"]
    for row in found["rows"]:
        error = row["estimator_error_of_one_replicate"]
        lines.append(
            f"| prior, {row['estimator']} | {row['value']:.4f} ± {row['standard_error']:.4f} | {error:.5f} "
            f"| {first / error:.2f}× |"
        )
    if "base" in found:
        for name in ("base", "base_minus_prior"):
            row = found[name]
            lines.append(
                f"| {name.replace('_', ' ')}, stratified | {row['value']:.4f} ± {row['standard_error']:.4f} "
                f"| {row['estimator_error_of_one_replicate']:.5f} | |"
            )
    flow = found["flow"]
    lines.append(
        f"| prior's probability flow, {flow['probes']} probes, {flow['solver_steps']} steps | {flow['value']:.4f} ± "
        f"{flow['standard_error']:.4f} | | |"
    )
    lines.append(
        "\nThe flow is another model than the one that L_z bounds: with a trained network their difference is no gap."
    )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["estimator"] for row in rows))
    sizes = list(dict.fromkeys(row["dims"] for row in rows))
    figure, axes = plt.subplots(len(sizes), 1, figsize=(9, 3.6 * len(sizes)), layout="constrained", squeeze=False)
    for axis, dims in zip(axes[:, 0], sizes, strict=True):
        own = [row for row in rows if row["dims"] == dims]
        groups = list(dict.fromkeys((row["data"], row["schedule"]) for row in own))
        for index, name in enumerate(names):
            of_name = {(row["data"], row["schedule"]): row for row in own if row["estimator"] == name}
            found = [of_name[group] for group in groups]
            relative = [row["estimator_error_of_one_replicate"] / row["exact"] for row in found]
            axis.bar([i + 0.11 * (index - 3.5) for i in range(len(groups))], relative, 0.1, label=name)
        axis.set(yscale="log", ylabel="error of one replicate / L_z", title=f"{EXAMPLES} examples, {dims} dimensions")
        axis.set_xticks(range(len(groups)), [f"{data.split()[0].strip(',')}\n{shape}" for data, shape in groups])
        axis.set_ylim(top=2 * axis.get_ylim()[1])
    axes[0, 0].legend(fontsize=8, ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results, here = Path(settings.results), points.here()
        results.mkdir(parents=True, exist_ok=True)
        rows = [row for dims in settings.dims for row in on_exact_data(dims, settings)]
        plot(rows, results / "rate_estimators.png")
        found = {"exact_data": rows, "draws": settings.draws, "examples": EXAMPLES}
        text = (
            f"Measured by `python benchmarks/rate_estimators.py`, {here['date']}, "
            f"{here['machine']}: the diffusion term of L_z with exact denoisers, {EXAMPLES} examples of d "
            f"dimensions, {settings.draws} calls per example. ± is one standard error over data and noise. The error "
            f"of one replicate is the estimator's own, from {settings.replicates} independent replicates (known to "
            f"{100 / math.sqrt(2 * settings.replicates):.0f} %); the last row of each group is what no density of "
            f"independent noise levels that the examples share goes below.\n\n{table(rows)}\n"
        )
        if settings.run:
            found["run"] = on_a_run(settings)
            text += f"\n{table_of_run(found['run'])}\n"
        points.leave(found, settings.results, "rate_estimators", text)
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
