"""What each part of the method is worth (Tab. 5 and 6): other priors, decoders, noise and encoders, on OpenMoji.

    python benchmarks/ablations.py                                      seven rows, one run each
    python benchmarks/ablations.py --rows unified learned-variance --seeds 0 1
    python benchmarks/ablations.py --other-data DIR                     Tab. 6, C too: an autoencoder of your images
    python benchmarks/ablations.py --preset smoke                       does it work?

A row is the preset with one of `ulx.variants`, or two, and is a run of the main job: resumed if interrupted, and not
run again once it is in the results file. All rows are trained for the same steps; the diffusion decoder that follows an
MSE autoencoder gets as many again, by stage 1's recipe. N(0, I) under an MSE autoencoder is not in the paper: it
completes Tab. 5's square. A has the paper's 8 channels, which are a quarter of all there, and all of the presets'. C's
images, of your choice, stand in for the paper's text-to-image data. The distance is `fd_efflite0`, or FID with
`--inception-weights`. Leaves benchmarks/results/ablations.jsonl, two tables and a plot.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import points

if TYPE_CHECKING:
    from ulx.config import Config


@dataclasses.dataclass(frozen=True)
class Row:
    variants: tuple[str, ...]
    """Of `ulx.variants`, one on top of the other."""
    table_5: tuple[str, str] | None = None
    """The prior and the reconstruction."""
    table_6: tuple[str, str] | None = None
    """The paper's letter, and what is changed."""


OTHER_DATA = "other-data"
ROWS = {
    "unified": Row((), table_5=("diffusion", "diffusion"), table_6=("", "none")),
    "mse": Row(("mse",), table_5=("diffusion", "MSE")),
    "normal-prior": Row(("normal-prior",), table_5=("N(0, I)", "diffusion")),
    "normal-prior-mse": Row(("normal-prior", "mse"), table_5=("N(0, I)", "MSE")),
    "stop-gradient": Row(("stop-gradient",), table_6=("A", "no gradient from the prior, a small KL instead")),
    "low-noise": Row(("low-noise",), table_6=("B", "λ_z(0) = 10")),
    OTHER_DATA: Row((), table_6=("C", "autoencoder trained on other data")),
    "learned-variance": Row(("learned-variance",), table_6=("D", "an encoder of mean and variance")),
}


RowName = Literal[
    "unified", "mse", "normal-prior", "normal-prior-mse", "stop-gradient", "low-noise", "learned-variance"
]


@dataclasses.dataclass(frozen=True)
class Settings(points.DistanceSettings):
    """Tables 5 and 6."""

    rows: tuple[RowName, ...] = get_args(RowName)
    """Which of the rows."""
    other_data: str | None = None
    """Folder of images to train row C's autoencoder on; without one there is no row C."""
    seeds: tuple[int, ...] = (0,)
    """Each trains all of them."""

    @property
    def all_rows(self) -> tuple[str, ...]:
        return self.rows if self.other_data is None else (*self.rows, OTHER_DATA)


def config_of(row: str, seed: int, settings: Settings) -> "Config":
    from ulx.variants import VARIANTS

    preset = settings.config()
    config = dataclasses.replace(
        preset,
        name=f"ablations_{settings.label}_{row}_s{seed}",
        # Of a row C it is not the settings that differ, but where its autoencoder comes from.
        variant=f"autoencoder of {settings.other_data}" if row == OTHER_DATA else row,
        runs=settings.runs,
        seed=seed,
        evaluate=dataclasses.replace(preset.evaluate, flow_images=0),
    )
    for variant in ROWS[row].variants:
        config = VARIANTS[variant].change(config)
    return config


def of_other_data(config: "Config", folder: str) -> "Config":
    """Whose stage 1 is row C's."""
    data = dataclasses.replace(config.data, source="folder", path=folder)
    return dataclasses.replace(config, name=f"{config.name}_autoencoder", data=data)


@dataclasses.dataclass(frozen=True)
class Point:
    row: str
    found: dict[str, Any]

    def value(self, *path: str) -> float:
        """A number of metrics.json."""
        entry = self.found
        for name in path:
            entry = entry[name]
        return entry["value"]


COLUMNS = (
    *("bits/pixel, prior", "bits/pixel, base", "bits/latent dim, prior", "PSNR (dB)"),
    *("fd reconstructions", "fd samples", "kd samples", "seed", "date"),
)


def cells(point: Point) -> list[str]:
    return [
        points.plus_minus(point.found["bits_per_pixel"], 3),
        points.plus_minus(point.found["bits_per_pixel_base"], 3),
        f"{point.value('bits_per_latent_dim'):.3f}",
        points.plus_minus(point.found["psnr"], 2),
        f"{point.value('fd', 'reconstruction'):.1f}",
        f"{point.value('fd', 'base'):.1f}",
        f"{point.value('kd'):.3f}",
        str(point.found["seed"]),
        point.found["date"],
    ]


def tables(shown: list[Point]) -> str:
    """Tab. 5 and Tab. 6, as far as their rows are there."""
    parts = []
    for name, columns, place in (
        ("Tab. 5", ("prior", "reconstruction"), lambda row: row.table_5),
        ("Tab. 6", ("", "change"), lambda row: row.table_6),
    ):
        rows = [[*place(ROWS[row]), *cells(p)] for row in ROWS if place(ROWS[row]) for p in shown if p.row == row]
        if rows:
            parts.append(f"{name}:\n\n{points.markdown((*columns, *COLUMNS), rows)}")
    return "\n\n".join(parts)


def plot(shown: list[Point], path: Path) -> None:
    """A row each; a bar is the mean over seeds, and every run a dot."""
    from statistics import fmean

    from matplotlib.figure import Figure

    rows = [row for row in reversed(ROWS) if any(point.row == row for point in shown)]
    figure = Figure(figsize=(10, 1 + 0.45 * len(rows)), layout="constrained")
    frechet, _ = shown[0].found["distances"]
    panels = {
        "held-out bits/pixel": {"prior": ("bits_per_pixel",), "base": ("bits_per_pixel_base",)},
        f"{frechet} of reconstructions": {"": ("fd", "reconstruction")},
        f"{frechet} of samples": {"": ("fd", "base")},
    }
    for axis, (title, bars) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for index, (label, value) in enumerate(bars.items()):
            size = 0.8 / len(bars)
            places = [place + size * ((len(bars) - 1) / 2 - index) for place in range(len(rows))]
            found = [[point.value(*value) for point in shown if point.row == row] for row in rows]
            axis.barh(places, [fmean(values) for values in found], size, label=label, alpha=0.6)
            dots = [(one, place) for place, values in zip(places, found, strict=True) for one in values]
            axis.scatter(*zip(*dots, strict=True), s=12, color="black", zorder=3)
        axis.set(xlabel=title, yticks=range(len(rows)), yticklabels=rows)
        if len(bars) > 1:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(bars), frameon=False)
    figure.savefig(path, dpi=150)


def measured(settings: Settings, file: Path) -> Iterator[list[Point]]:
    def with_other_autoencoder(config: "Config") -> dict[str, Any]:
        assert settings.other_data is not None
        other = points.resumable(of_other_data(config, settings.other_data))
        points.stage1(other)
        return points.whole(dataclasses.replace(config, autoencoder=str(other.path)))

    shown = []
    for seed in settings.seeds:
        for row in settings.all_rows:
            measure = with_other_autoencoder if row == OTHER_DATA else points.whole
            shown.append(Point(row, points.compared(config_of(row, seed, settings), file, measure)))
            yield shown


def write(shown: list[Point], settings: Settings, file: Path) -> None:
    first = shown[0].found
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/ablations.py {settings.options}`: the `{settings.label}` preset on "
        f"{settings.data}, EMA weights. Bits are held-out, of the latent under the stage-1 prior and under the base "
        f"model; {points.distances(first)}. ± is one standard error over images. Machine: "
        f"{points.machines(point.found for point in shown)}.\n\n"
        f"{tables(shown)}\n"
    )
    plot(shown, file.with_suffix(".png"))


def main() -> None:
    points.command(Settings, __doc__, "ablations", measured, write)


if __name__ == "__main__":
    main()
