"""Distance against network calls, for every sampler, of the base model's latents and of the decoder's images.

    python benchmarks/sampling.py                            on RUNS/openmoji, which is trained if it is not there
    python benchmarks/sampling.py --run runs/mine --samplers heun dpmpp_2m --calls 8 16 32
    python benchmarks/sampling.py --preset smoke             does it work?

One trained run throughout, and the noise and labels of its evaluation. First the latent's sampler varies: samples of
the base model, which the decoder draws as the run's settings say, by their distance to the training images. Then the
decoder's: reconstructions of held-out images from the same latents, by PSNR and by their distance to the originals.
Samplers get steps for the same number of network calls; tsit5 gets a tolerance and takes what it takes. Nothing that is
in the results files is measured again. Leaves benchmarks/results/sampling_latents.jsonl, sampling_decoder.jsonl,
sampling.md and sampling.png.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import points

if TYPE_CHECKING:
    import numpy as np

    from ulx.config import Config
    from ulx.data.source import Dataset
    from ulx.runs import Run

Sampler = Literal["euler", "heun", "dpmpp_2m", "ancestral", "euler-churn", "tsit5"]
Part = Literal["latents", "decoder"]

MOST = 4096
"""Images of prepared data, each way, where nothing is said."""
CHURN = 1.0
"""Of "euler-churn": in the limit of short steps the SDE that undoes the noising."""


@dataclasses.dataclass(frozen=True)
class Settings(points.Settings):
    """Distance against network calls."""

    run: str | None = None
    """Folder of a trained run; by default the preset's under RUNS, trained first if it is not there."""
    samplers: tuple[Sampler, ...] = get_args(Sampler)
    """Solvers of `ulx.samplers`; "euler-churn" is euler with churn 1, the reverse SDE."""
    calls: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Network calls a sample."""
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Of tsit5."""
    num_samples: int | None = None
    """Samples of the base model; by default as many as in the run's evaluation, of prepared data at most 4,096: they
    are held in memory."""
    held_out: int | None = None
    """Held-out images that are reconstructed; by default likewise."""


def configs_of(sampler: Sampler, part: Part, config: "Config", settings: Settings) -> list["Config"]:
    """The run's settings with this sampler in one part, by rising cost; the other part keeps the run's."""
    prefix = "decoder_" if part == "decoder" else ""
    solver, churn = ("euler", CHURN) if sampler == "euler-churn" else (sampler, 0.0)
    if sampler == "tsit5":
        changes = [{"tolerance": tolerance} for tolerance in sorted(settings.tolerances, reverse=True)]
    else:
        steps = [calls // 2 if sampler == "heun" else calls for calls in sorted(settings.calls)]
        changes = [{"num_steps": number} for number in steps]
    options = [
        {f"{prefix}{name}": value for name, value in {"solver": solver, "churn": churn, **change}.items()}
        for change in changes
    ]
    return [dataclasses.replace(config, sample=dataclasses.replace(config.sample, **each)) for each in options]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained run, its data, and what is compared with; each is read when it is first needed."""

    config: "Config"

    @cached_property
    def run(self) -> "Run":
        from ulx import runs
        from ulx.decoders import DiffusionDecoder

        run = runs.load(self.config.path)
        # Points are known by the run's settings, so it has to be what these say: trained to the end.
        last = run.config.stages[-1]
        steps = run.step[1] if last == "stage2" else run.step[0]
        if run.base is None or steps < run.config.train_configs[last].steps:
            raise ValueError(f"{run.path} has not finished its base model: train on first (--resume)")
        if not isinstance(run.model.decoder, DiffusionDecoder) or self.config.data.clips:
            raise ValueError(f"{run.path} has no diffusion decoder of images, whose sampler could vary")
        return run

    @cached_property
    def dataset(self) -> "Dataset":
        from ulx.data import open_dataset

        return open_dataset(self.config.data)

    @cached_property
    def network(self):
        from ulx.metrics import efficientnet

        return efficientnet.load()

    @cached_property
    def training(self):
        from ulx.metrics.reference import training_moments

        return training_moments(self.dataset, self.network, self.config.data.cache_dir)

    @cached_property
    def held_out(self) -> "np.ndarray":
        from ulx.evaluation_data import held_out_examples

        return held_out_examples(self.dataset, self.config.evaluate)[0]

    @cached_property
    def originals(self):
        from ulx.metrics.frechet import Moments

        return Moments.of(self.seen(self.held_out, "held-out images"))

    @cached_property
    def text(self):
        """What embeds captions, of a run that has them."""
        return self.run.open_text() if self.run.text else None

    @cached_property
    def latents(self) -> "np.ndarray":
        """Of the held-out images."""
        from ulx.progress import Progress
        from ulx.runner import Runner

        with Progress("encode", total=len(self.held_out), unit="images") as progress:
            return Runner(self.run.model, self.config, progress).encode(self.held_out)

    def seen(self, images: "np.ndarray", what: str) -> "np.ndarray":
        from ulx.metrics.features import features

        return features(self.network, images, description=f"features: {what}")

    def of_latents(self, config: "Config") -> dict[str, Any]:
        """Samples of the base model by the settings in `config.sample`."""
        from ulx.evaluation import SAMPLE
        from ulx.evaluation_data import rows_like, told_of
        from ulx.metrics.entries import frechet
        from ulx.progress import Progress
        from ulx.runner import Runner
        from ulx.seeding import root_int

        assert self.run.base is not None
        count = config.evaluate.num_samples
        rows = rows_like(self.dataset.train, count, root_int(config.seed, "evaluation labels"))
        told = told_of(self.dataset.train, rows, self.run.base.conditions, self.text)
        with Progress("sample", total=count, unit="images") as progress:
            z_0, nfe = Runner(self.run.model, config, progress).latents(self.run.base, count, SAMPLE, told)
            # By the run's own settings, which decode the same: so the decoder is compiled once for all points.
            images, _ = Runner(self.run.model, self.config, progress).decode(z_0, SAMPLE, told)
        return {"nfe": nfe, "fd_efflite0": frechet(self.seen(images, "samples"), self.training)}

    def of_decoder(self, config: "Config") -> dict[str, Any]:
        """Reconstructions of held-out images by the settings in `config.sample`."""
        from ulx.evaluation import RECONSTRUCT
        from ulx.evaluation_data import held_out_rows, told_of
        from ulx.evaluation_pairs import mean_psnr
        from ulx.metrics.entries import frechet
        from ulx.progress import Progress
        from ulx.runner import Runner

        rows = held_out_rows(self.dataset, self.config.evaluate)
        told = told_of(self.dataset.validation, rows, self.run.model.decoder.conditions, self.text)
        with Progress("decode", total=len(self.held_out), unit="images") as progress:
            images, nfe = Runner(self.run.model, config, progress).decode(self.latents, RECONSTRUCT, told)
        return {
            "nfe": nfe,
            "psnr": mean_psnr(images, self.held_out),
            "fd_efflite0": frechet(self.seen(images, "reconstructions"), self.originals),
        }


@dataclasses.dataclass(frozen=True)
class Point:
    sampler: Sampler
    part: Part
    config: "Config"
    found: dict[str, Any]

    @property
    def distance(self) -> float:
        return self.found["fd_efflite0"]["value"]

    def cells(self) -> list[str]:
        how = self.sampler if self.sampler != "tsit5" else f"tsit5, tolerance {self.tolerance:g}"
        psnr = [points.plus_minus(self.found["psnr"], 2)] if self.part == "decoder" else []
        return [how, str(self.found["nfe"]), *psnr, f"{self.distance:.1f}", self.found["date"]]

    @property
    def tolerance(self) -> float:
        sample = self.config.sample
        return sample.decoder_tolerance if self.part == "decoder" else sample.tolerance


COLUMNS: dict[Part, tuple[str, ...]] = {
    "latents": ("sampler of latents", "NFE", "fd samples", "date"),
    "decoder": ("sampler of the decoder", "NFE", "PSNR (dB)", "fd reconstructions", "date"),
}


def tables(shown: list[Point]) -> str:
    rows = {part: [point.cells() for point in shown if point.part == part] for part in COLUMNS}
    return "\n\n".join(points.markdown(COLUMNS[part], rows[part]) for part in COLUMNS if rows[part])


def plot(shown: list[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = [("latents", "fd_efflite0 of samples", lambda point: point.distance)]
    if any(point.part == "decoder" for point in shown):
        panels += [
            ("decoder", "fd_efflite0 of reconstructions", lambda point: point.distance),
            ("decoder", "PSNR of reconstructions (dB)", lambda point: point.found["psnr"]["value"]),
        ]
    figure = Figure(figsize=(4 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (part, title, value) in zip(axes, panels, strict=True):
        own = [point for point in shown if point.part == part]
        for sampler in dict.fromkeys(point.sampler for point in own):
            line = sorted((point.found["nfe"], value(point)) for point in own if point.sampler == sampler)
            axis.plot(*zip(*line, strict=True), marker="o", label=sampler)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=f"network calls of the {'base model' if part == 'latents' else 'decoder'}", ylabel=title)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def trained(settings: Settings) -> "Config":
    """The settings of the run, which is trained now if it is the preset's and not there."""
    from ulx import job, run_folder

    if settings.run is None:
        preset = dataclasses.replace(settings.config(), runs=settings.runs)
        path = preset.path
        if not (path / "evaluation" / "metrics.json").exists():
            job.run(points.resumable(preset))
    else:
        path = Path(settings.run)
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"--run {path} is not a run: it has no config.json")
    # Wherever it was trained, and whatever it was called then.
    path = path.resolve()
    config = dataclasses.replace(run_folder.read_config(path), runs=str(path.parent), name=path.name)
    counts = {}
    for name in ("num_samples", "held_out"):
        own = getattr(config.evaluate, name)
        if config.data.source == "prepared":
            own = min(own or MOST, MOST)
        counts[name] = getattr(settings, name) or own
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **counts))


def measured(settings: Settings, file: Path) -> Iterator[list[Point]]:
    config = trained(settings)
    subject, shown = Subject(config), []
    measures: dict[Part, Callable[[Config], dict[str, Any]]] = {
        "latents": subject.of_latents,
        "decoder": subject.of_decoder,
    }
    for part, measure in measures.items():
        own = file.with_name(f"{file.stem}_{part}.jsonl")
        for sampler in settings.samplers:
            for changed in configs_of(sampler, part, config, settings):
                shown.append(Point(sampler, part, changed, points.measured(changed, own, measure)))
                yield shown


def write(shown: list[Point], settings: Settings, file: Path) -> None:
    first = shown[0]
    samples, own = first.found["fd_efflite0"], first.config
    reconstructed = next((p.found["fd_efflite0"]["n"] for p in shown if p.part == "decoder"), "no")
    remark = points.too_few(*(point.found["fd_efflite0"] for point in shown))
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/sampling.py {settings.options}` on the run `{own.name}` "
        f"({own.train.steps} + {own.train_base.steps} steps), EMA weights, the same noise and labels in every row. fd "
        f"is fd_efflite0 of {samples['n']} samples without guidance to the {samples['n_reference']} training images, "
        f"or of reconstructions of {reconstructed} held-out images to their originals{remark}; NFE are the calls "
        "of the one network. ± is one standard error over images. Machine: "
        f"{points.machines(point.found for point in shown)}.\n\n{tables(shown)}\n"
    )
    plot(shown, file.with_suffix(".png"))


def main() -> None:
    points.command(Settings, __doc__, "sampling", measured, write)


if __name__ == "__main__":
    main()
