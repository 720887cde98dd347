"""Encode a folder of images with a trained run.

    python -m ulx.encode runs/openmoji DIR
    python -m ulx.encode runs/openmoji DIR --out latents.npz

Images are prepared as for training: upright, on white, centre-cropped and resized to the run's resolution; files that
cannot be read are named and skipped. Writes one .npz file (`numpy.load` without pickles) with

    z_clean       float32 `n h w k`, the encoder's output (EMA weights); of an encoder of variance its mean
    z_std         of an encoder of variance its standard deviation, in the same shape; else not there
    names         the files, relative to DIR with /, in the order of the rows
    logsnr_0      λ_z(0), the noise level of the latent
    run, step     the run's folder and the steps of stage 1 that its encoder was trained for
    weights       which average of the weights: EMA, or with --ema its width too
    config        the run's config.json, as text
    encoder       sha256 of the encoder's weights: latents of different encoders cannot be mixed up

Decoder, prior and base model work on z_0, not on z_clean. It is left to the reader to draw, as often as wanted:

    alpha, sigma = sigmoid(logsnr_0) ** 0.5, sigmoid(-logsnr_0) ** 0.5
    z_0 = alpha * z_clean + sigma * standard_normal(z_clean.shape)

with z_clean + z_std * standard_normal(z_clean.shape) in z_clean's place where there is a z_std.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from ulx import runs
from ulx.aside import write_aside
from ulx.command_line import parse_arguments, run_command
from ulx.config import to_json
from ulx.data.pixels import to_float
from ulx.generate import in_batches
from ulx.image_files import ImageFolder
from ulx.latents import posterior, weights_hash
from ulx.progress import Progress
from ulx.seeding import root_key

__all__ = ["Options", "encode"]


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    folder: Path
    """Folder of images, subfolders included."""
    out: Path | None = None
    """The .npz file to write; by default RUN/latents.npz."""
    ema: float | None = None
    """Width σ_rel of the weights' average, for a run with snapshots (`--train.posthoc-ema`); by default the moving
    average of training."""
    batch_size: int | None = None
    """Images per call; changes no result. By default the run's `evaluate.batch_size`."""
    overwrite: bool = False
    """Write over a file that exists."""

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.out is not None and self.out.suffix != ".npz":
            raise ValueError(f"--out is the .npz file to write, got {self.out}")


def encode(options: Options) -> Path:
    """Write the latents; returns the file. All of them are held in memory until then."""
    run = runs.load(options.run, ema=options.ema, stage="stage1")
    run.refuse_clips("python -m ulx.encode")
    folder = ImageFolder(options.folder, run.config.data.resolution)
    out = options.out or run.folder / "latents.npz"
    if out.exists() and (out.is_dir() or not options.overwrite):
        raise FileExistsError(
            f"{out} exists already: choose another --out" + ("" if out.is_dir() else ", or --overwrite")
        )
    out.parent.mkdir(parents=True, exist_ok=True)

    def latents(x: UInt8[Array, "b h w c"], *, keys: Key[Array, " b"]) -> dict[str, Float[Array, "b *latent k"]]:
        found = posterior(run.model, to_float(x))  # which draws nothing: the keys are not needed
        return {"z_clean": found.mean} | ({} if found.std is None else {"z_std": found.std})

    size = min(options.batch_size or run.config.evaluate.batch_size, len(folder.names))
    names: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    with Progress("encode", total=len(folder.names), unit="images") as progress:
        for part, images in folder.batches(size):
            parts.append(in_batches(latents, images, batch_size=size, key=root_key(0, "encode")))
            names += part
            progress.total = len(folder.names) - len(folder.skipped)
            progress.advance(len(part))

    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    with write_aside(out) as aside, aside.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            **found,
            names=np.array(names),
            logsnr_0=np.float32(run.model.latent_schedule.logsnr_max),
            run=np.array(str(options.run)),
            step=np.array(run.step[0]),
            weights=np.array(run.weights),
            config=np.array(to_json(run.config)),
            encoder=np.array(weights_hash(run.model.encoder)),
        )
    print(folder.summary())
    mean = found["z_clean"]
    print(f"z_clean {' × '.join(map(str, mean.shape))}, standard deviation {mean.std(axis=0).mean():.3f} -> {out}")
    return out


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: encode(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
