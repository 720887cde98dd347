"""Raw files to shards that a run reads: once, in parallel, and from where it stopped if it is interrupted.

    python -m ulx.data.prepare imagenet --root ILSVRC2012 --resolution 512 --out imagenet-512
    python -m ulx.data.prepare kinetics600 --root videos --annotations train.csv val.csv --out kinetics-128
    python experiments/imagenet512.py --data.path imagenet-512
    python experiments/kinetics600.py --data.path kinetics-128

Images are centre-cropped as the ADM paper did and kept as lossless WebP (or JPEG of quality 95); clips are kept whole,
cropped the same way, as H.264. Files that are missing, damaged or too short are listed in the folder's manifest.json
with the reason and left out. The same files give the same shards, byte for byte, in any number of workers.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated

from ulx.command_line import run_command
from ulx.data import imagenet, kinetics
from ulx.data.cache import Prepared, Recipe, prepare_in
from ulx.data.encoded import CRF, ImageCodec
from ulx.data.extras import optional

__all__ = ["ImageNet", "Kinetics", "main", "prepare"]

NAMED = 10  # refused files named on the terminal; all are in the manifest


@dataclasses.dataclass(frozen=True)
class ImageNet:
    """ImageNet: folders of classes (train/, val/), or the original tar files."""

    root: str
    """Where the files are."""
    out: str
    """Folder for the shards."""
    resolution: int = 512
    """Height and width."""
    codec: ImageCodec = "webp"
    """webp: lossless. jpeg: quality 95, less than half as large and faster to read."""
    workers: int | None = None
    """Threads that read and compress; by default one for each core."""

    def recipe(self) -> Recipe:
        return imagenet.recipe(Path(self.root).expanduser(), self.resolution, self.codec, self.workers)


@dataclasses.dataclass(frozen=True)
class Kinetics:
    """Kinetics-600, or what is laid out like it: videos anywhere under a folder, and CSV files that name them."""

    root: str
    """Where the videos are."""
    annotations: tuple[str, ...]
    """CSV files with the columns label, youtube_id, time_start, time_end and split."""
    out: str
    """Folder for the shards."""
    resolution: int = 128
    """Height and width."""
    at_least: int = 16
    """Videos with fewer frames are left out."""
    crf: int = CRF
    """H.264's quality: lower is better and larger."""
    workers: int | None = None
    """Threads that read and compress; by default one for each core."""

    def recipe(self) -> Recipe:
        files = [Path(file).expanduser() for file in self.annotations]
        root = Path(self.root).expanduser()
        return kinetics.recipe(root, files, self.resolution, at_least=self.at_least, crf=self.crf, workers=self.workers)


def prepare(options: ImageNet | Kinetics) -> Prepared:
    """Prepare into `options.out`, and say what came of it."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"workers must be at least 1, got {options.workers}")
    out = Path(options.out).expanduser()
    recipe = options.recipe()
    prepared = prepare_in(out, recipe)
    print(summary(out, prepared, recipe.unit))
    return prepared


def summary(out: Path, prepared: Prepared, unit: str) -> str:
    """What is in the folder, and what was left out and why."""
    dataset = prepared.dataset
    size = sum(shard["bytes"] for shard in json.loads((out / "manifest.json").read_text())["shards"])
    count = len(dataset.train) + len(dataset.validation)
    lines = [
        f"{out}: {len(dataset.train)} training and {len(dataset.validation)} held-out {unit} of "
        f"{len(dataset.class_names)} classes at {dataset.resolution} pixels, {size / 1e9:.3g} GB "
        f"({size / max(count, 1) / 1e3:.3g} kB each)"
    ]
    if prepared.remarks:
        what = Counter(remark for _, remark in prepared.remarks)
        lines += [f"{number} of them {remark}: enlarged" for remark, number in what.items()]
    if prepared.refused:
        listed = [f"  {name} {reason}" for name, reason in prepared.refused[:NAMED]]
        more = len(prepared.refused) - len(listed)
        lines.append(f"{len(prepared.refused)} left out (all of them in {out / 'manifest.json'}):")
        lines += listed + ([f"  and {more} more"] if more else [])
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    tyro = optional("tyro", extra="run")
    kinds = (
        Annotated[ImageNet, tyro.conf.subcommand("imagenet")] | Annotated[Kinetics, tyro.conf.subcommand("kinetics600")]
    )
    options = tyro.cli(kinds, prog="python -m ulx.data.prepare", description=__doc__, args=args)
    run_command(lambda: prepare(options))


if __name__ == "__main__":
    main()
