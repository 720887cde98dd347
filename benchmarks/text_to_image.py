"""Captions (Tab. 1, Fig. 6 in small): distance and alignment against the loss factor and the size of the base model,
and of Unified Latents against pixels and a KL autoencoder, on OpenMoji's drawings and their names.

    python benchmarks/text_to_image.py                           three autoencoders, two base models each, two baselines
    python benchmarks/text_to_image.py --factors 4 --methods     Unified Latents alone, at one loss factor
    python benchmarks/text_to_image.py --preset smoke            does it work?

Each point is one run of experiments/text_to_image.py and leaves its own report under runs/; the small base model, an
eighth of the large one, copies the autoencoder. Points that are in the results file already, with the same settings,
are not run again, and interrupted ones are resumed. Alignment is the retrieval score (`ulx.metrics.retrieval`) without
guidance and at the best scale of the sweep: CLIP's weights are in no package. Leaves
benchmarks/results/text_to_image.jsonl, a table and a plot.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitrate_vs_fid
import compute_vs_fid
import points

if TYPE_CHECKING:
    from ulx.config import Config

UNIFIED = "unified"
SIZES = ("large", "small")


@dataclasses.dataclass(frozen=True)
class Settings(points.Settings):
    """Distance and alignment of samples by their prompts."""

    factors: tuple[float, ...] = (2.0, 4.0, 8.0)
    """Loss factors of Unified Latents."""
    methods: tuple[compute_vs_fid.Method, ...] = ("kl-autoencoder", "pixels")
    """What they are compared with, with the large base model."""
    seed: int = 0
    """Seed of every run."""

    def config(self) -> "Config":
        if self.path is not None:
            raise ValueError("--path is ImageNet, which has no captions")
        from text_to_image import PRESETS

        return PRESETS[self.preset]


def configs_of(settings: Settings) -> dict[tuple[str, float, str], "Config"]:
    """The runs by method, loss factor and size of the base model; a small one comes after the large one that it copies
    the autoencoder of."""
    preset = settings.config()
    preset = dataclasses.replace(
        preset,
        runs=settings.runs,
        seed=settings.seed,
        evaluate=dataclasses.replace(preset.evaluate, flow_images=0),
    )
    found = {}
    for factor in settings.factors:
        name = f"text_{settings.label}_c{factor:g}_s{settings.seed}"
        large = dataclasses.replace(preset, name=f"{name}_large", loss_factor=factor)
        model = dataclasses.replace(preset.model, base=bitrate_vs_fid.eighth(preset.model.base))
        small = dataclasses.replace(large, name=f"{name}_small", model=model, autoencoder=str(large.path))
        found |= {(UNIFIED, factor, size): run for size, run in zip(SIZES, (large, small), strict=True)}
    for method in settings.methods:
        config = compute_vs_fid.by_method(preset, method)
        name = f"text_{settings.label}_{method}_s{settings.seed}"
        found[method, config.loss_factor, "large"] = dataclasses.replace(config, name=name)
    return found


Points = dict[tuple[str, float, str], dict[str, Any]]


def retrieved(point: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The retrieval score by guidance scale."""
    return {scale: found["retrieval"] for scale, found in point["alignment"]["by_guidance"].items()}


def best(point: dict[str, Any]) -> str:
    """The scale with the highest score."""
    scores = retrieved(point)
    return max(scores, key=lambda scale: scores[scale]["value"])


COLUMNS = (
    *("method", "c_lf", "base", "bits/pixel", "fd reconstructions", "fd samples", "retrieval", "shuffled prompts"),
    *("best guidance", "its retrieval", "its fd", "retrieval of held-out prompts", "date"),
)


def table(found: Points) -> str:
    rows = []
    for (method, factor, size), point in found.items():
        by_guidance, scale, is_coded = point["alignment"]["by_guidance"], best(point), method != "pixels"
        rows.append(
            [
                method,
                f"{factor:g}" if method == UNIFIED else "",
                size,
                points.plus_minus(point["bits_per_pixel"], 3) if is_coded else "",
                f"{point['fd']['reconstruction']['value']:.1f}" if is_coded else "",
                f"{point['fd']['base']['value']:.1f}",
                points.plus_minus(by_guidance["1"]["retrieval"], 3),
                points.plus_minus(by_guidance["1"]["shuffled_prompts"], 3),
                scale,
                points.plus_minus(by_guidance[scale]["retrieval"], 3),
                f"{by_guidance[scale]['fd_efflite0']['value']:.1f}",
                points.plus_minus(point["held_out_prompts"]["retrieval"], 3),
                point["date"],
            ]
        )
    return points.markdown(COLUMNS, rows)


def plot(found: Points, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    unified = {key: point for key, point in found.items() if key[0] == UNIFIED}
    baselines = {key[0]: point for key, point in found.items() if key[0] != UNIFIED}
    for size in SIZES:
        own = {factor: point for (_, factor, other), point in unified.items() if other == size}
        factors = sorted(own)
        (line,) = axes[0].plot(
            factors, [own[f]["fd"]["base"]["value"] for f in factors], marker="o", label=f"{size} base"
        )
        scores = [own[f]["alignment"]["by_guidance"]["1"]["retrieval"] for f in factors]
        values, errors = ([score[name] for score in scores] for name in ("value", "standard_error"))
        axes[1].errorbar(factors, values, errors, marker="o", capsize=3, color=line.get_color(), label=f"{size} base")
    for style, (method, point) in zip((":", "--"), baselines.items(), strict=False):
        axes[0].axhline(point["fd"]["base"]["value"], color="grey", linestyle=style, label=method)
        axes[1].axhline(
            point["alignment"]["by_guidance"]["1"]["retrieval"]["value"], color="grey", linestyle=style, label=method
        )
    for (method, factor, size), point in found.items():
        if size == "large":
            by_guidance = point["alignment"]["by_guidance"]
            label = f"c_lf {factor:g}" if method == UNIFIED else method
            fds = [each["fd_efflite0"]["value"] for each in by_guidance.values()]
            axes[2].plot([each["retrieval"]["value"] for each in by_guidance.values()], fds, marker="o", label=label)
    axes[0].set(xlabel="loss factor c_lf", ylabel="fd_efflite0 of samples", title="Distance (Fig. 6)")
    axes[1].set(xlabel="loss factor c_lf", ylabel="retrieval score", title="Alignment (Fig. 6)")
    axes[2].set(xlabel="retrieval score", ylabel="fd_efflite0", title="Guidance, large base (Fig. 5)")
    for axis in axes:
        axis.legend()
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measured(settings: Settings, file: Path) -> Iterator[Points]:
    found: Points = {}
    for key, config in configs_of(settings).items():
        found[key] = points.compared(config, file, points.whole)
        yield found


def write(found: Points, settings: Settings, file: Path) -> None:
    first = next(iter(found.values()))
    ceiling = first["alignment"]["ceilings"]["real_images"]
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/text_to_image.py {settings.options}`: the `{settings.preset}` preset of "
        f"experiments/text_to_image.py with {first['base_steps']} steps of the base models, EMA weights, on OpenMoji's "
        f"named drawings, split by family; {points.distances(first)}. Retrieval is the share of samples whose nearest "
        "training image is of the prompt's family; without guidance where no scale is named. The prompts' own images, "
        f"themselves left out, find their family in {points.plus_minus(ceiling, 3)} of the cases. Of held-out prompts "
        f"the images of families that no model saw are sought, among all, at guidance "
        f"{first['held_out_prompts']['guidance_scale']:g}. ± is one standard error over images. Machine: "
        f"{points.machines(found.values())}.\n\n{table(found)}\n"
    )
    plot(found, file.with_suffix(".png"))


def main() -> None:
    points.command(Settings, __doc__, "text_to_image", measured, write)


if __name__ == "__main__":
    main()
