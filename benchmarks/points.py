"""What benchmarks share: train with some settings, measure the run once, and keep the result as a line of a file; their
options, their `main` and their tables.

`experiments/` is on the path of whatever imports this, for its presets.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ulx.config import Config, TrainConfig

    Measure = Callable[[Config], dict[str, Any]]

__all__ = [
    "RESULTS",
    "DistanceSettings",
    "Settings",
    "add",
    "command",
    "compared",
    "distance_names",
    "distances",
    "find",
    "here",
    "leave",
    "machines",
    "markdown",
    "measured",
    "of_length",
    "plus_minus",
    "read",
    "resumable",
    "same",
    "stage1",
    "too_few",
    "whole",
]

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
NOT_MEASURED = (
    "autoencoder",  # where it was copied from tells nothing that its settings, which are there too, do not
    # Add to what is measured, or to what is shown, or to the memory that it takes.
    *("evaluate.inception_weights", "evaluate.inception_resize", "evaluate.lpips", "evaluate.clip_weights"),
    *("evaluate.prompts", "evaluate.batch_size"),
)
"""Settings by which no point differs from another, beside those that a run may go on with other ones of (where a loss
rose so that a run went back, how often it may is one of them all the same)."""
MEASURED = ("variant", "sample", "evaluate", "data.path", "data.captions", "text.encoder")
"""Which of the latter do make another point: a benchmark may give one a name of its own by `variant`."""
SAID_OTHERWISE = ("preset", "path", "results", "runs", "inception_weights", "inception_resize")
"""Options of benchmarks that `options` has a form of its own for, or leaves out."""
OF_BASE = ("train_base", "model.base", "base_bias", "cache_latents")
"""Settings that a measurement of stage 1 knows nothing of."""


def same(point: dict[str, Any], config: "Config", ignore: tuple[str, ...] = ()) -> bool:
    """Whether the point was measured with these settings; fields that it does not know yet count at their defaults.
    The code is not among them: after a change of the method, take its lines out of the file."""
    from ulx.config import differences, from_json
    from ulx.run_folder import HARMLESS

    ignore = (*NOT_MEASURED, *(name for name in HARMLESS if name not in MEASURED), *ignore)
    try:
        return not differences(from_json(json.dumps(point["config"])), config, ignore=ignore)
    except (KeyError, TypeError, ValueError):  # of other settings than there are now
        return False


def find(points: list[dict[str, Any]], config: "Config", ignore: tuple[str, ...] = ()) -> dict[str, Any] | None:
    return next((point for point in points if same(point, config, ignore)), None)


def read(file: Path) -> list[dict[str, Any]]:
    """Its points; a last line that was cut off while it was written is none. Raises ValueError for another damage."""
    text = file.read_text() if file.exists() else ""
    found = []
    for number, line in enumerate(text.removesuffix(_cut_off(text)).splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is no JSON: {error}; take it out, or mend it") from error
    return found


def _cut_off(text: str) -> str:
    """What an interrupted write left at the end of a file of lines."""
    last = text[text.rfind("\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        return last
    return ""


def of_length(train: "TrainConfig", steps: int) -> "TrainConfig":
    """That recipe in so many steps: its warm-up and the reach of its average are cut, or grow, with them."""
    part = steps / train.steps
    return dataclasses.replace(
        train,
        steps=steps,
        warmup_steps=round(part * train.warmup_steps),
        ema_decay=max(0.0, 1 - (1 - train.ema_decay) / part),
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a benchmark that trains."""

    preset: Literal["tiny", "tiny64", "smoke"] = "tiny"
    """What is trained: a preset of experiments/openmoji.py."""
    path: str | None = None
    """ImageNet at 512 pixels, made by `python -m ulx.data.prepare imagenet`: then it is the preset `small` of
    experiments/imagenet512.py."""
    results: str = str(RESULTS)
    """Folder of the results."""
    runs: str = "runs"
    """Folder of the runs."""

    def file(self, name: str) -> Path:
        """The results of a benchmark, one point a line; those of other presets are kept apart."""
        return Path(self.results) / (f"{name}.jsonl" if self.label == "tiny" else f"{name}_{self.label}.jsonl")

    @property
    def label(self) -> str:
        """Of what is trained, in the names of runs and files."""
        return self.preset if self.path is None else "imagenet512"

    @property
    def options(self) -> str:
        """On the command line: whatever is not the default, but for folders."""
        given = f"--preset {self.preset}" if self.path is None else f"--path {self.path}"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in SAID_OTHERWISE and value != field.default:
                words = np.ravel(value).astype(str) if isinstance(value, tuple) else [str(value)]
                given += " ".join([f" --{field.name.replace('_', '-')}", *words])
        return given

    @property
    def data(self) -> str:
        return "OpenMoji, split by family" if self.path is None else "ImageNet at 512 pixels"

    def config(self) -> "Config":
        """What is trained, before a benchmark changes it."""
        if self.path is None:
            from openmoji import PRESETS

            return PRESETS[self.preset]
        from imagenet512 import SMALL

        return dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, source="prepared", path=self.path))


@dataclasses.dataclass(frozen=True)
class DistanceSettings(Settings):
    """Options of one that trains whole runs and compares their distances."""

    inception_weights: str | None = None
    """The file of FID's InceptionV3: distances are FID and KID, in place of fd_efflite0 and kd_efflite0. Runs that were
    measured without are evaluated again, and trained again if their folders are gone."""
    inception_resize: Literal["tf1-bilinear", "clean-bicubic"] = "tf1-bilinear"
    """How it is shown the images: "clean-bicubic" is Clean-FID's way."""

    @property
    def options(self) -> str:
        if self.inception_weights is None:
            return super().options
        return f"{super().options} --inception-weights FILE --inception-resize {self.inception_resize}"

    def config(self) -> "Config":
        config = super().config()
        by = {"inception_weights": self.inception_weights, "inception_resize": self.inception_resize}
        return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **by))


Options = TypeVar("Options", bound=Settings)
Found = TypeVar("Found")


def command(
    options: type[Options],
    description: str | None,
    name: str,
    found: Callable[[Options, Path], Iterable[Found]],
    write: Callable[[Found, Options, Path], None],
) -> None:
    """The `main` of a benchmark.

    `found(settings, file)` measures point by point and yields, after each, all that is there by now; `write` makes the
    page beside `file`, a .md, and the pictures of it, anew every time. The last page is printed.
    """
    import tyro

    settings = tyro.cli(options, description=description)
    from ulx.command_line import run_command

    def work() -> None:
        commit()
        file = settings.file(name)
        for so_far in found(settings, file):
            write(so_far, settings, file)
        print(file.with_suffix(".md").read_text())

    run_command(work)


@functools.cache
def commit() -> str | None:
    """Of the code when it was first asked for: by hours of training later the checkout may be at another."""
    from ulx.metrics import compare

    return compare.commit()


def here() -> dict[str, str | None]:
    """The machine, the day and the code's commit, for a results file."""
    import jax

    device = "CPU" if jax.default_backend() == "cpu" else f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    return {
        "machine": f"{os.cpu_count()} cores, {_processor()}, {device}",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def machines(found: Iterable[dict[str, Any]]) -> str:
    """All that the points were measured on."""
    return "; ".join(dict.fromkeys(point["machine"] for point in found))


def _processor() -> str:
    """Its name, which Linux keeps in a file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def leave(results: dict[str, Any], folder: str, name: str, page: str | None = None) -> None:
    """Write results, and a page that says what they are, as NAME.json and NAME.md."""
    file = Path(folder) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    if page is not None:
        file.with_suffix(".md").write_text(page)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(
        ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *("| " + " | ".join(r) + " |" for r in rows)]
    )


def plus_minus(metric: dict[str, Any], digits: int) -> str:
    return f"{metric['value']:.{digits}f} ± {metric['standard_error']:.{digits}f}"


def weights_of(point: dict[str, Any], distance: str) -> str | None:
    """sha256 of the network by which a point has that distance; None if it has not."""
    entry = point.get("definitions", {}).get(distance) if distance in point else None
    return None if entry is None else entry["network"]["sha256"]


def distance_names(config: "Config") -> tuple[str, str]:
    """What the Fréchet and the kernel distance are called that a benchmark with these settings compares."""
    from ulx.metrics import efficientnet, inception

    if config.evaluate.inception_weights is None:
        return efficientnet.METRIC, efficientnet.KERNEL_METRIC
    resize = config.evaluate.inception_resize
    return inception.METRICS[resize], inception.KERNEL_METRICS[resize]


def distances(found: dict[str, Any]) -> str:
    """What fd and kd are in a table of whole runs, in words."""
    samples, reconstructions = (found["fd"][what] for what in ("base", "reconstruction"))
    frechet, kernel = found["distances"]
    return (
        f"fd is {frechet} of {samples['n']} samples without guidance to the {samples['n_reference']} training "
        f"images, or of {found['held_out']['n']} reconstructions to their originals"
        f"{too_few(samples, reconstructions)}, kd {kernel}, the kernel distance to the held-out images"
    )


def too_few(*distances: dict[str, Any]) -> str:
    """What a table says of Fréchet distances of too few examples; of enough, nothing."""
    return " (fewer than features: compare within the table alone)" * any(d["rank_deficient"] for d in distances)


def resumable(config: "Config") -> "Config":
    """`config`, to be continued if its run was begun; with an autoencoder of its own if the run to copy is gone."""
    begun = (config.path / "config.json").exists()
    if config.autoencoder is not None and not (begun or (Path(config.autoencoder) / "config.json").exists()):
        config = dataclasses.replace(config, autoencoder=None)
    return dataclasses.replace(config, resume=begun)


def stage1(config: "Config") -> dict[str, Any]:
    """Train stage 1 and measure it on held-out images: bits and PSNR."""
    from ulx import job, run_folder, runs
    from ulx.data import open_dataset
    from ulx.evaluation import evaluate_autoencoder
    from ulx.metrics_log import read_metrics
    from ulx.stages import collapsed

    path = run_folder.open_folder(config)
    dataset = open_dataset(config.data)
    run_folder.remember_data(path, dataset)
    model = job.train_autoencoder(runs.stage1_state(config), dataset, config)
    found = evaluate_autoencoder(model, dataset, config)
    log = read_metrics(path / "stage1.jsonl")
    return {
        "loss_factor": log[-1].get("felt_loss_factor", config.loss_factor),
        "target_bits_per_pixel": config.rate.target_bits_per_pixel,
        "bits_per_pixel": found["bits_per_pixel"],
        "psnr": found["psnr"],
        "collapsed": collapsed(config, log),
    }


def whole(config: "Config") -> dict[str, Any]:
    """The main job with these settings, report and all; the point is its metrics.json."""
    from ulx import job

    metrics = job.run(config).parent / "evaluation" / "metrics.json"
    return {"loss_factor": config.loss_factor, "sigmoid_bias": config.decoder_weighting.bias} | json.loads(
        metrics.read_text()
    )


def measured(
    config: "Config",
    file: Path,
    measure: "Measure" = stage1,
    will_do: Callable[[dict[str, Any]], bool] = lambda point: True,
) -> dict[str, Any]:
    """The point of `config`: as it is in `file` already, if that will do, or else measured and added to it."""
    known = [point for point in read(file) if will_do(point)]
    ignore = OF_BASE if measure is stage1 else ()
    return find(known, config, ignore) or add(measure(resumable(config)), config, file)


def compared(config: "Config", file: Path, measure: "Measure") -> dict[str, Any]:
    """The same of a whole run, with the distances that are asked for, by the weights that are given, under names of
    their own: `fd` and `kd`, and what they are as `distances`."""
    frechet, kernel = names = distance_names(config)
    given = config.evaluate.inception_weights
    wanted = None if given is None else hashlib.sha256(Path(given).read_bytes()).hexdigest()
    point = measured(config, file, measure, lambda point: wanted in (None, weights_of(point, frechet)))
    of_kernel = point["against_held_out_images"]["base"][kernel]
    return point | {"fd": point[frechet], "kd": of_kernel, "distances": names}


def add(found: dict[str, Any], config: "Config", file: Path) -> dict[str, Any]:
    """A line of the file: what was found, by which settings, of which data, where and when."""
    from ulx.config import to_json

    point = found | {
        "steps": config.train.steps,
        "base_steps": config.train_base.steps,
        "seed": config.seed,
        "data": json.loads((config.path / "dataset.json").read_text())["fingerprint"],
        **here(),
        "config": json.loads(to_json(config)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_bytes() if file.exists() else b""
    cut_off = _cut_off(text.decode()).encode()
    whole = text.removesuffix(cut_off)
    with file.open("ab") as out:
        if cut_off:  # else another process may have written since
            out.truncate(len(whole))
        begin = "\n" * (whole != b"" and not whole.endswith(b"\n"))
        out.write((begin + json.dumps(point) + "\n").encode())
    return point
