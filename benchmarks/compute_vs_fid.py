"""Distance of samples against training compute (Fig. 4): Unified Latents, a KL autoencoder and pixels, on OpenMoji.

    python benchmarks/compute_vs_fid.py                          three methods, four lengths of the base's training
    python benchmarks/compute_vs_fid.py --methods unified pixels --lengths 0.5
    python benchmarks/compute_vs_fid.py --preset tiny64          at 64×64 pixels
    python benchmarks/compute_vs_fid.py --seeds 0 1
    python benchmarks/compute_vs_fid.py --samplers dpmpp_2m
    python benchmarks/compute_vs_fid.py --tokenizers my_package.my_module:make
    python benchmarks/compute_vs_fid.py --preset smoke           does it work?

The base model is one transformer throughout, on as many tokens: latents, or the patches of pixels that lie under one,
with the decoder's convolutions before and after them where it has any. Each length is a training of its own, warm-up,
decay and average cut to it. Compute is counted by the paper's convention (`ulx.flops`): of the base model alone, as
in Fig. 4, and with the autoencoder's. Pixels, which have none, are also trained for what the longest of Unified
Latents costs altogether, and Unified Latents also with more bits. Each is sampled by each of the samplers, with as many
calls of the base model: what is the best for latents need not be so for pixels. Any other tokenizer (`ulx.tokenizers`)
is one more method: the same base model on its latents, as `ulx.proxy` trains one (centred and scaled to variance 1),
and anew for each sampler; what its own training cost is not known, so that it has no place in the second plot. Every
run is one of the main job, resumed if interrupted (a tokenizer's base model begins anew), and not run again once it is
in the results file. The distance is `fd_efflite0`, or FID with `--inception-weights`. Leaves
benchmarks/results/compute_vs_fid.jsonl, a table, a plot and, of runs that are there, samples.
"""

import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import points

if TYPE_CHECKING:
    from ulx.config import Config
    from ulx.proxy import Recipe

Method = Literal["unified", "kl-autoencoder", "pixels"]
Sampler = Literal["dpmpp_2m", "ancestral", "euler"]
"""Those of one call a step."""
SHOWN = 12
"""Samples of each method in the picture."""
LINES = {"dpmpp_2m": "-", "ancestral": "--", "euler": ":"}
"""Of the samplers in the plot."""


@dataclasses.dataclass(frozen=True)
class Settings(points.DistanceSettings):
    """Distance against training compute."""

    methods: tuple[Method, ...] = ("unified", "kl-autoencoder", "pixels")
    """Which of `ulx.variants`."""
    lengths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Of the base model's training, as parts of the preset's."""
    more: tuple[float, ...] = (2.0,)
    """Unified Latents with so many times the preset's loss factor, at the last of the lengths."""
    tokenizers: tuple[str, ...] = ()
    """Folders of runs, or package.module:function, which is called and returns a tokenizer; on the embedded data.
    Points know them by these names alone: when what is behind one changes, take its lines out of the results."""
    samplers: tuple[Sampler, ...] = ("dpmpp_2m", "ancestral")
    """Of the base model. A run whose folder is gone is trained again for one that it was not measured by."""
    sample_steps: int = 32
    """Their steps, which are calls."""
    seeds: tuple[int, ...] = (0,)
    """Each trains all of them."""

    def __post_init__(self) -> None:
        if self.tokenizers and self.path is not None:
            raise ValueError(
                "--tokenizers with --path: what a base model makes on a tokenizer is held in memory, over 100 GB of "
                "ImageNet at 512 pixels; python -m ulx.proxy measures a tokenizer on it"
            )


def by_method(preset: "Config", method: Method) -> "Config":
    """That preset by another method, with one architecture of base model: on pixels it is the same transformer on as
    many tokens, and has what the decoder has between pixels and tokens."""
    from ulx.variants import VARIANTS

    config, base = VARIANTS[method].change(preset), preset.model.base
    if config.model.latent == "pixels":
        outside, of_latents = preset.model.decoder, base
        base = dataclasses.replace(
            base, patch=outside.patch, conv_channels=outside.conv_channels, conv_blocks=outside.conv_blocks
        )
        under_one = [r * s for r, s in zip(preset.model.encoder.reduction(2), of_latents.reduction(2), strict=True)]
        if [*base.reduction(2)] != under_one:
            raise ValueError(
                f"a base model on pixels with the decoder's way to tokens has {base.reduction(2)} pixels under one, on "
                f"latents {under_one}"
            )
    return dataclasses.replace(config, variant=method, model=dataclasses.replace(config.model, base=base))


def config_of(method: Method, steps: int, seed: int, settings: Settings) -> "Config":
    """The run of one method whose base model is trained for so many steps."""
    config = by_method(settings.config(), method)
    return dataclasses.replace(
        config,
        name=f"compute_{settings.label}_{method}_{steps}_s{seed}",
        runs=settings.runs,
        seed=seed,
        train_base=points.of_length(config.train_base, steps),
        sample=dataclasses.replace(config.sample, num_steps=settings.sample_steps),
        evaluate=dataclasses.replace(config.evaluate, flow_images=0),
    )


def configs_of(method: Method, seed: int, settings: Settings) -> list["Config"]:
    """The runs of one method by length; those after the first copy its stage 1."""
    whole = settings.config().train_base.steps
    runs = []
    for part in sorted(settings.lengths):
        config = config_of(method, max(1, round(part * whole)), seed, settings)
        if runs and config.model.latent != "pixels":
            config = dataclasses.replace(config, autoencoder=str(runs[0].path))
        runs.append(config)
    return runs


def with_more_bits(times: float, seed: int, settings: Settings) -> "Config":
    """Unified Latents with a larger loss factor, at the last of the lengths."""
    config = configs_of("unified", seed, settings)[-1]
    factor = times * config.loss_factor
    return dataclasses.replace(config, name=f"{config.name}_c{factor:g}", loss_factor=factor, autoencoder=None)


def of_equal_total(pixels: dict[str, Any], other: dict[str, Any], seed: int, settings: Settings) -> "Config":
    """Pixels for as many steps as the other method's base model and autoencoder cost together."""
    alone, together = compute(pixels)[0], compute(other)[1]
    assert together is not None  # Unified Latents' autoencoder was trained here
    return config_of("pixels", round(together / alone * pixels["base_steps"]), seed, settings)


def configs_of_tokenizer(name: str, seed: int, settings: Settings) -> list["Config"]:
    """What stands for the base models on a tokenizer's latents among the points, by length."""
    from ulx.proxy import RECIPE

    plain = re.sub(r"\W+", "-", name).strip("-")
    changes: dict[str, Any] = {"variant": name, "autoencoder": None}
    changes["base_bias"] = RECIPE.bias  # Unified Latents' own is for the spread of theirs, and these get variance 1
    return [
        dataclasses.replace(config, name=config.name.replace("unified", plain), **changes)
        for config in configs_of("unified", seed, settings)
    ]


def recipe_of(config: "Config") -> "Recipe":
    """The base model of these settings, and its training, for latents of any shape: in as many tokens."""
    from ulx.nn.grid import per_axis
    from ulx.proxy import Recipe

    under_one = config.model.encoder.reduction(2)[0] * per_axis(config.model.base.patch, 2)[0]
    return Recipe(
        base=config.model.base,
        grid=config.data.resolution // under_one,
        bias=config.base_bias,
        logsnr_1=config.model.logsnr_1,
        train=config.train_base,
        sample=config.sample,
        num_samples=config.evaluate.num_samples,
        num_held_out=config.evaluate.held_out or sys.maxsize,
    )


def of_tokenizer(config: "Config") -> dict[str, Any]:
    """The point of a base model on the latents of the tokenizer that `variant` names, laid out as those of runs."""
    from ulx import proxy, run_folder, tokenizers
    from ulx.data import open_dataset
    from ulx.metrics import inception

    tokenizer, dataset, weights = tokenizers.load(config.variant), open_dataset(config.data), config.evaluate
    network = None
    if weights.inception_weights is not None:
        network = inception.load(weights.inception_weights, weights.inception_resize)
    found = proxy.measure(
        tokenizer,
        dataset,
        recipe_of(config),
        network=network,
        seed=config.seed,
        batch_size=config.evaluate.batch_size,
        cache_dir=config.data.cache_dir,
    )
    config.path.mkdir(parents=True, exist_ok=True)
    run_folder.remember_data(config.path, dataset)
    metrics, (frechet, kernel) = found.metrics, points.distance_names(config)
    return {
        **{name: metrics[name] for name in ("psnr", "bits_per_pixel") if name in metrics},
        frechet: {"base": metrics[frechet], "reconstruction": metrics[f"{frechet}_reconstruction"]},
        "against_held_out_images": {"base": {kernel: metrics[kernel]}},
        "definitions": {frechet: {name: metrics[frechet][name] for name in ("definition", "network")}},
        "cost": {"training_flops_stage1": None, "training_flops_stage2": found.training_flops},
    }


def by_samplers(config: "Config", settings: Settings) -> list["Config"]:
    """One run to be measured by each sampler: it is trained once, and evaluated again."""
    return [
        dataclasses.replace(config, sample=dataclasses.replace(config.sample, solver=solver))
        for solver in settings.samplers
    ]


def compute(point: dict[str, Any]) -> tuple[float, float | None]:
    """Training FLOPs of the base model, and of all: None of a tokenizer that was trained elsewhere."""
    cost = point["cost"]
    stages = [value for name, value in cost.items() if name.startswith("training_flops_")]
    return cost["training_flops_stage2"], None if None in stages else sum(stages)


COLUMNS = (
    *("method", "base steps", "base TFLOPs", "all TFLOPs", "bits/pixel", "fd reconstructions", "fd samples"),
    *("kd samples", "sampler", "NFE", "seed", "date"),
)


def sampler(point: dict[str, Any]) -> str:
    return point["config"]["sample"]["solver"]


def calls(point: dict[str, Any]) -> str:
    """Network calls a sample: of the base model, and of the decoder where they are known and any."""
    base, decoder = point["fd"]["base"]["nfe"], point["fd"]["reconstruction"].get("nfe")
    return f"{base} + {decoder}" if decoder else str(base)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for method, shown in found.items():
        for p in shown:
            alone, together = compute(p)
            is_coded = method != "pixels"  # pixels are their own latent, without loss
            has_rate = is_coded and "bits_per_pixel" in p
            cells = [
                method,
                str(p["base_steps"]),
                f"{alone / 1e12:.3g}",
                "" if together is None else f"{together / 1e12:.3g}",
                f"{p['bits_per_pixel']['value']:.3f}" if has_rate else "",
                f"{p['fd']['reconstruction']['value']:.1f}" if is_coded else "",
                f"{p['fd']['base']['value']:.1f}",
                points.plus_minus(p["kd"], 3),
                sampler(p),
                calls(p),
                str(p["seed"]),
                p["date"],
            ]
            rows.append(cells)
    return points.markdown(COLUMNS, rows)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frechet, _ = next(iter(found.values()))[0]["distances"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for which, (axis, what) in enumerate(zip(axes, ("the base model (Fig. 4)", "all that is trained"), strict=True)):
        for number, (method, shown) in enumerate(found.items()):
            # Through the mean over seeds; every run is a dot.
            by_sampler: dict[str, dict[float, list[float]]] = {}
            for p in shown:
                spent = compute(p)[which]
                if spent is not None:
                    by_compute = by_sampler.setdefault(sampler(p), {})
                    by_compute.setdefault(spent / 1e12, []).append(p["fd"]["base"]["value"])
            for solver, by_compute in by_sampler.items():
                flops = sorted(by_compute)
                means = [statistics.fmean(by_compute[x]) for x in flops]
                axis.plot(flops, means, LINES[solver], color=f"C{number}", label=f"{method}, {solver}")
                dots = [(x, y) for x in flops for y in by_compute[x]]
                axis.scatter(*zip(*dots, strict=True), color=f"C{number}", s=16)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=f"training TFLOPs of {what}", ylabel=f"{frechet} of samples")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pictures(found: dict[str, list[dict[str, Any]]], settings: Settings, path: Path) -> None:
    """Samples of the longest training of each method, of the first seed and by the last sampler, as far as their runs
    are there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from ulx.evaluation import Evaluation

    rows: dict[str, np.ndarray] = {}
    for method, shown in found.items():
        longest = max((p for p in shown if p["seed"] == settings.seeds[0]), key=lambda p: p["base_steps"])
        run = Path(settings.runs) / longest["config"]["name"]
        if (run / "evaluation" / "pictures.npz").exists():
            together = compute(longest)[1]
            of_all = "" if together is None else f", {together / 1e12:.3g} TFLOPs in all"
            samples = Evaluation.load(run / "evaluation").pictures["base_samples"][:SHOWN]
            name = f"{method}, {longest['base_steps']} steps of the base model{of_all}"
            rows[name] = np.concatenate(list(samples), axis=1)
            credit = json.loads((run / "dataset.json").read_text())["attribution"]
            (path.parent / "ATTRIBUTION.txt").write_text(credit + "\n", encoding="utf-8")
    if not rows:
        return
    figure, axes = plt.subplots(len(rows), 1, figsize=(SHOWN * 0.8, len(rows) * 1.05), layout="constrained")
    for axis, (name, row) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        axis.imshow(row, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, loc="left", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measured(settings: Settings, file: Path) -> Iterator[dict[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}

    def add(label: str, config: "Config", measure: "points.Measure" = points.whole) -> Iterator[None]:
        for sampled in by_samplers(config, settings):
            found.setdefault(label, []).append(points.compared(sampled, file, measure))
            yield

    def trained(seed: int) -> Iterator[None]:
        for method in settings.methods:
            for config in configs_of(method, seed, settings):
                yield from add(method, config)
        for name in settings.tokenizers:
            for config in configs_of_tokenizer(name, seed, settings):
                yield from add(name, config, of_tokenizer)
        if "unified" not in settings.methods:
            return
        for config in (with_more_bits(times, seed, settings) for times in settings.more):
            yield from add(f"unified, c_lf {config.loss_factor:g}", config)
        if "pixels" in settings.methods:
            yield from add("pixels", of_equal_total(found["pixels"][-1], found["unified"][-1], seed, settings))

    for seed in settings.seeds:
        for _ in trained(seed):
            yield found


def write(found: dict[str, list[dict[str, Any]]], settings: Settings, file: Path) -> None:
    first = next(iter(found.values()))[0]
    samples, reconstructions = (first["fd"][what] for what in ("base", "reconstruction"))
    frechet, kernel = first["distances"]
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/compute_vs_fid.py {settings.options}`: the "
        f"`{settings.label}` preset on {settings.data}, EMA "
        f"weights; fd is {frechet} of {samples['n']} samples without guidance to the {samples['n_reference']} "
        f"training images{points.too_few(samples, reconstructions)}, kd {kernel}, the kernel distance to "
        "the held-out images; FLOPs of training by the paper's convention; NFE the base model's calls, by the "
        "sampler named, and the decoder's, where it makes any. Machine: "
        f"{points.machines(point for of in found.values() for point in of)}.\n\n{table(found)}\n"
    )
    plot(found, file.with_suffix(".png"))
    pictures(found, settings, file.with_name(f"{file.stem}_samples.png"))


def main() -> None:
    points.command(Settings, __doc__, "compute_vs_fid", measured, write)


if __name__ == "__main__":
    main()
