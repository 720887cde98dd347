"""Bits and distances against the latent's channels (Tab. 3) and its grid (Tab. 4), on OpenMoji at 32×32.

    python benchmarks/latent_shape.py                            four numbers of channels, three grids: six runs
    python benchmarks/latent_shape.py --channels 4 8 --grids 16 8
    python benchmarks/latent_shape.py --preset smoke             does it work?
    python benchmarks/latent_shape.py --path imagenet-512        the paper's shapes around 32×32×32, of ImageNet

The presets' latent is 8×8×8. Channels vary at 8×8; they change the first and the last layer of the networks alone. The
grid varies at 8 channels, and each network's FLOPs stay within 6 % (the table has them); its parameters do not:

* encoder: its last step, from 16×16 to the grid, is by 1, 2 or 4, and the stage on the grid is half as wide on 16×16
  and twice as wide on 4×4;
* prior and base model: 64 tokens of 2×2 positions on 16×16, 64 of one position on 8×8, and on 4×4, which has no more,
  16 tokens of twice the width, in four times the parameters;
* decoder: the same 64 tokens throughout; a latent of another grid is brought to theirs.

ImageNet's vary around 32×32×32 in the same way, and FLOPs stay within 13 %.

Every run is one of the main job, resumed if interrupted, and not run again once it is in the results file. The distance
is `fd_efflite0`, or FID with `--inception-weights`. Leaves benchmarks/results/latent_shape.jsonl, two tables and a
plot.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import points

if TYPE_CHECKING:
    from ulx.config import Config
    from ulx.nn.uvit import UViTConfig

Shape = tuple[int, int]
"""Positions each way, and channels."""


@dataclasses.dataclass(frozen=True)
class Settings(points.DistanceSettings):
    """Tables 3 and 4."""

    channels: tuple[int, ...] | None = None
    """Channels of latents of the preset's grid; by default 2, 4, 8 and 16, of ImageNet 4 to 64 as in the paper."""
    grids: tuple[int, ...] | None = None
    """Positions each way of latents of the preset's channels: its own number of them, half or twice as many."""
    seeds: tuple[int, ...] = (0,)
    """Each trains all of them."""

    def __post_init__(self):
        for each in self.grids or ():
            grid, _ = self.own
            if each not in (2 * grid, grid, grid // 2):
                raise ValueError(f"grids are {2 * grid}, {grid} and {grid // 2} positions each way here, got {each}")

    @property
    def own(self) -> Shape:
        """Of the preset."""
        config = self.config()
        (across, _) = config.model.encoder.reduction(2)
        return config.data.resolution // across, config.model.encoder.latent_channels

    @property
    def shapes(self) -> list[Shape]:
        """Of both tables, each once."""
        grid, channels = self.own
        of_channels = self.channels or ((2, 4, 8, 16) if self.path is None else (4, 8, 16, 32, 64))
        of_grids = self.grids or (2 * grid, grid, grid // 2)
        return list(dict.fromkeys([*((grid, each) for each in of_channels), *((each, channels) for each in of_grids)]))


def config_of(shape: Shape, seed: int, settings: Settings) -> "Config":
    (grid, channels), (own, _) = shape, settings.own
    preset = settings.config()
    model, encoder = preset.model, preset.model.encoder
    step = encoder.down
    assert isinstance(step, int)  # the presets' encoders: all are alike

    def transformer(config: "UViTConfig") -> "UViTConfig":
        width = max(1, own // grid)
        return dataclasses.replace(
            config, patch=max(1, grid // own), channels=tuple(width * size for size in config.channels)
        )

    encoder = dataclasses.replace(encoder, latent_channels=channels)
    if grid != own:
        *outer, inner = encoder.channels
        steps = (*[step] * len(outer[1:]), step * own // grid)
        encoder = dataclasses.replace(encoder, channels=(*outer, inner * own // grid), down=steps)
    return dataclasses.replace(
        preset,
        name=f"latent_{settings.label}_{grid}x{grid}x{channels}_s{seed}",
        runs=settings.runs,
        seed=seed,
        model=dataclasses.replace(model, encoder=encoder, prior=transformer(model.prior), base=transformer(model.base)),
        evaluate=dataclasses.replace(preset.evaluate, flow_images=0),
    )


@dataclasses.dataclass(frozen=True)
class Point:
    shape: Shape
    found: dict[str, Any]

    def distance(self, what: str) -> float:
        return self.found["fd"][what]["value"]


COLUMNS = (
    *("latent", "bits/pixel", "bits/latent dim", "PSNR (dB)", "fd reconstructions", "fd samples", "kd samples"),
    *("MFLOPs encoder", "prior", "decoder", "base", "seed", "date"),
)


def in_words(shape: Shape) -> str:
    return f"{shape[0]}×{shape[0]}×{shape[1]}"


def cells(point: Point) -> list[str]:
    found = point.found
    flops = found["cost"]["forward_flops_per_image"]
    return [
        in_words(point.shape),
        points.plus_minus(found["bits_per_pixel"], 3),
        f"{found['bits_per_latent_dim']['value']:.3f}",
        points.plus_minus(found["psnr"], 2),
        f"{point.distance('reconstruction'):.1f}",
        f"{point.distance('base'):.1f}",
        f"{found['kd']['value']:.3f}",
        *(f"{flops[network] / 1e6:.0f}" for network in ("encoder", "prior", "decoder", "base")),
        str(found["seed"]),
        found["date"],
    ]


def tables(shown: list[Point], own: Shape) -> str:
    """Tab. 3 and Tab. 4, as far as their rows are there."""
    of_channels = sorted((p for p in shown if p.shape[0] == own[0]), key=lambda p: p.shape[1])
    of_grids = sorted((p for p in shown if p.shape[1] == own[1]), key=lambda p: -p.shape[0])
    return "\n\n".join(
        f"{name}:\n\n{points.markdown(COLUMNS, [cells(point) for point in rows])}"
        for name, rows in (("Channels (Tab. 3)", of_channels), ("Grid (Tab. 4)", of_grids))
        if rows
    )


def plot(shown: list[Point], own_shape: Shape, path: Path) -> None:
    """Through the means over seeds; every run is a dot."""
    from matplotlib.figure import Figure

    grid, channels = own_shape
    panels = {
        f"channels of latents of {grid}×{grid} (Tab. 3)": [(p.shape[1], p) for p in shown if p.shape[0] == grid],
        f"positions each way, {channels} channels (Tab. 4)": [(p.shape[0], p) for p in shown if p.shape[1] == channels],
    }
    panels = {title: own for title, own in panels.items() if own}
    figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, own) in zip(axes, panels.items(), strict=True):
        ticks = sorted({at for at, _ in own})
        for what, label in (("reconstruction", "reconstructions"), ("base", "samples")):
            means = [fmean(point.distance(what) for at, point in own if at == tick) for tick in ticks]
            (line,) = axis.plot(ticks, means, label=label)
            axis.scatter([at for at, _ in own], [p.distance(what) for _, p in own], color=line.get_color(), s=16)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set(xlabel=title, ylabel=shown[0].found["distances"][0])
    axes[0].legend()
    figure.savefig(path, dpi=150)


def measured(settings: Settings, file: Path) -> Iterator[list[Point]]:
    shown = []
    for seed in settings.seeds:
        for shape in settings.shapes:
            shown.append(Point(shape, points.compared(config_of(shape, seed, settings), file, points.whole)))
            yield shown


def write(shown: list[Point], settings: Settings, file: Path) -> None:
    first = shown[0].found
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/latent_shape.py {settings.options}`: the `{settings.label}` preset "
        f"on {settings.data}, EMA weights, with latents of other shapes at comparable compute; held-out bits under the "
        f"stage-1 prior; {points.distances(first)}; MFLOPs of one forward pass. ± is one standard error over images. "
        f"Machine: {points.machines(point.found for point in shown)}.\n\n{tables(shown, settings.own)}\n"
    )
    plot(shown, settings.own, file.with_suffix(".png"))


def main() -> None:
    points.command(Settings, __doc__, "latent_shape", measured, write)


if __name__ == "__main__":
    main()
