"""Bits, reconstruction and generation against the loss factor and the bias (Tab. 2, Fig. 6, 7 and 8), on OpenMoji.

    python benchmarks/bitrate_vs_fid.py                          six autoencoders, two base models on each
    python benchmarks/bitrate_vs_fid.py --pairs 1.4 2 1.4 4 --seeds 0 1
    python benchmarks/bitrate_vs_fid.py --preset smoke           does it work?

Every autoencoder is trained once, and a base model of each of `BASES` on its latents; each of these is one run of the
main job and leaves its own report under runs/. Points that are in the results file already, with the same settings, are
not run again, and interrupted ones are resumed. The distance is `fd_efflite0`, or FID with `--inception-weights`:
InceptionV3's are in no package. Leaves benchmarks/results/bitrate_vs_fid.jsonl, a table, a plot and reconstructions.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import points

if TYPE_CHECKING:
    from ulx.config import Config
    from ulx.nn.uvit import UViTConfig

PAIRS = ((1.4, 2.0), (1.4, 4.0), (1.4, 8.0), (1.4, 16.0), (2.5, 1.7), (2.5, 2.5))
PAIRS_OF_IMAGENET = (*((-3.0, factor) for factor in (1.3, 1.5, 1.7, 1.9, 2.1)), (-4.0, 2.0))
SHOWN = 12
"""Held-out images whose reconstructions are shown."""


@dataclasses.dataclass(frozen=True)
class Settings(points.DistanceSettings):
    """Bits and distances against (b, c_lf)."""

    pairs: tuple[tuple[float, float], ...] | None = None
    """The decoder's bias b and loss factor c_lf of each autoencoder; by default six, on ImageNet those of the paper's
    Tab. 2 under the resolution rule's b, and one of another b (Fig. 8)."""
    base_steps: int | None = None
    """Steps of the base models' training; by default half of the preset's."""
    seeds: tuple[int, ...] = (0,)
    """Each trains all of them."""

    @property
    def all_pairs(self) -> tuple[tuple[float, float], ...]:
        if self.pairs is not None:
            return self.pairs
        return PAIRS if self.path is None else PAIRS_OF_IMAGENET


def eighth(base: "UViTConfig") -> "UViTConfig":
    """An eighth of the FLOPs in its products: half of the width, in heads of half the size, and half of the blocks."""
    block = dataclasses.replace(base.block, head_size=base.block.head_size // 2)
    halves = [tuple(max(1, number // 2) for number in numbers) for numbers in (base.channels, base.blocks)]
    return dataclasses.replace(base, channels=halves[0], blocks=halves[1], block=block)


def configs_of(pair: tuple[float, float], seed: int, settings: Settings) -> dict[str, "Config"]:
    """The runs of one autoencoder, by the size of the base model; those after the first copy its stage 1."""
    preset, (bias, factor) = settings.config(), pair
    name = f"sweep_{settings.label}_b{bias:g}_c{factor:g}_s{seed}"
    train_base = points.of_length(preset.train_base, settings.base_steps or preset.train_base.steps // 2)
    large = dataclasses.replace(
        preset,
        name=f"{name}_large",
        runs=settings.runs,
        seed=seed,
        loss_factor=factor,
        sigmoid_bias=bias,
        train_base=train_base,
        evaluate=dataclasses.replace(preset.evaluate, flow_images=0),
    )
    model = dataclasses.replace(large.model, base=eighth(preset.model.base))
    return {
        "large": large,
        "small": dataclasses.replace(large, name=f"{name}_small", model=model, autoencoder=str(large.path)),
    }


@dataclasses.dataclass(frozen=True)
class Point:
    """One autoencoder and what was measured with each base model."""

    pair: tuple[float, float]
    seed: int
    runs: dict[str, "Config"]
    found: dict[str, dict[str, Any]]

    @property
    def autoencoder(self) -> dict[str, Any]:
        return self.found["large"]

    def value(self, *path: str, base: str = "large") -> float:
        """A number of metrics.json."""
        entry = self.found[base]
        for name in path:
            entry = entry[name]
        return entry["value"]

    @property
    def bits(self) -> float:
        return self.value("bits_per_pixel")


COLUMNS = (
    *("b", "c_lf", "λ*", "bits/pixel", "PSNR (dB)", "fd reconstructions"),
    *("fd small base", "fd large base", "kd small", "kd large"),
    *("bits/pixel under small", "under large", "seed", "date"),
)


def table(shown: list[Point]) -> str:
    rows = []
    for point in shown:
        bias, factor = point.pair
        both = lambda digits, *path, of=point: [  # noqa: E731
            f"{of.value(*path, base=base):.{digits}f}" for base in ("small", "large")
        ]
        cells = [
            f"{bias:g}",
            f"{factor:g}",
            f"{cut_off(point.pair):.2f}",
            points.plus_minus(point.autoencoder["bits_per_pixel"], 3),
            points.plus_minus(point.autoencoder["psnr"], 2),
            f"{point.value('fd', 'reconstruction'):.1f}",
            *both(1, "fd", "base"),
            *(points.plus_minus(point.found[base]["kd"], 3) for base in ("small", "large")),
            *both(3, "bits_per_pixel_base"),
            str(point.seed),
            point.autoencoder["date"],
        ]
        rows.append(cells)
    return points.markdown(COLUMNS, rows)


def cut_off(pair: tuple[float, float]) -> float:
    """λ* = b + ln(c_lf − 1); at c_lf of 1 or less no noise level is worth its bits: −∞."""
    return pair[0] + math.log(pair[1] - 1) if pair[1] > 1 else -math.inf


def plot(shown: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    pairs = sorted({point.pair for point in shown}, key=cut_off)

    def mean(pair: tuple[float, float], value: Callable[[Point], float]) -> float:
        return statistics.fmean(value(point) for point in shown if point.pair == pair)

    def draw(axis, value: Callable[[Point], float], label: str | None = None) -> None:
        """Against bits, through the mean over seeds; every run is a dot."""
        order = sorted(pairs, key=lambda pair: mean(pair, lambda p: p.bits))
        (line,) = axis.plot(
            [mean(pair, lambda p: p.bits) for pair in order], [mean(pair, value) for pair in order], label=label
        )
        axis.scatter([p.bits for p in shown], [value(p) for p in shown], color=line.get_color(), s=16)

    for bias in sorted({pair[0] for pair in pairs}):
        own = [pair for pair in pairs if pair[0] == bias]
        bits = [mean(pair, lambda p: p.bits) for pair in own]
        axes[0, 0].plot([pair[1] for pair in own], bits, marker="o", label=f"b = {bias:g}")
    factors = sorted({pair[1] for pair in pairs})
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes[0, 0].set(xlabel="loss factor c_lf", ylabel="held-out bits/pixel", title="Rate (Fig. 8)")
    axes[0, 0].legend()
    draw(axes[0, 1], lambda p: p.value("psnr"))
    axes[0, 1].set(xlabel="held-out bits/pixel", ylabel="PSNR (dB)", title="Reconstruction (Tab. 2)")
    frechet, _ = shown[0].autoencoder["distances"]
    draw(axes[1, 0], lambda p: p.value("fd", "reconstruction"))
    axes[1, 0].set(xlabel="held-out bits/pixel", ylabel=frechet, title="Reconstructions to their originals")
    for base in ("small", "large"):
        draw(axes[1, 1], lambda p, base=base: p.value("fd", "base", base=base), label=f"{base} base")
    axes[1, 1].set(xlabel="held-out bits/pixel", ylabel=frechet, title="Samples to the training set (Fig. 6)")
    axes[1, 1].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pictures(shown: list[Point], path: Path) -> None:
    """Reconstructions by rate (Fig. 7), of the first seed's runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from ulx.evaluation import Evaluation

    own = sorted((point for point in shown if point.seed == shown[0].seed), key=lambda point: point.bits)
    saved = [Evaluation.load(point.runs["large"].path / "evaluation").pictures for point in own]
    rows = [saved[0]["originals"], *(entry["reconstructions"] for entry in saved)]
    credit = json.loads((own[0].runs["large"].path / "dataset.json").read_text())["attribution"]
    (path.parent / "ATTRIBUTION.txt").write_text(credit + "\n", encoding="utf-8")
    names = ["original", *(f"{p.bits:.2f} bits/pixel\nb {p.pair[0]:g}, c_lf {p.pair[1]:g}" for p in own)]
    figure, axes = plt.subplots(len(rows), 1, figsize=(SHOWN * 0.75 + 1.2, len(rows) * 0.8), layout="constrained")
    for axis, row, name in zip(axes, rows, names, strict=True):
        axis.imshow(np.concatenate(list(row[:SHOWN]), axis=1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measured(settings: Settings, file: Path) -> Iterator[list[Point]]:
    shown = []
    for seed in settings.seeds:
        for pair in settings.all_pairs:
            runs = configs_of(pair, seed, settings)
            found = {size: points.compared(config, file, points.whole) for size, config in runs.items()}
            shown.append(Point(pair, seed, runs, found))
            yield sorted(shown, key=lambda point: (cut_off(point.pair), point.seed))


def write(shown: list[Point], settings: Settings, file: Path) -> None:
    first = shown[0].autoencoder
    machines = points.machines(run for point in shown for run in point.found.values())
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/bitrate_vs_fid.py {settings.options}`: the "
        f"`{settings.label}` preset with {first['base_steps']} steps of the base models, EMA weights, held-out "
        f"{settings.data}; {points.distances(first)}. λ* = b + ln(c_lf − 1). ± is one "
        f"standard error over images. Machine: {machines}.\n\n{table(shown)}\n"
    )
    plot(shown, file.with_suffix(".png"))
    if all((point.runs["large"].path / "evaluation").exists() for point in shown):
        pictures(shown, file.with_name(f"{file.stem}_reconstructions.png"))


def main() -> None:
    points.command(Settings, __doc__, "bitrate_vs_fid", measured, write)


if __name__ == "__main__":
    main()
