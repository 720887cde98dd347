"""Encode a folder of images with a trained run and decode them again.

    python -m ulx.reconstruct runs/openmoji DIR
    python -m ulx.reconstruct runs/openmoji DIR --out rebuilt --sample.decoder-num-steps 64

Images are prepared as for training: upright, on white, centre-cropped and resized to the run's resolution. Written to
--out: a PNG for each under its original's name, and contact_sheet.png, the first 50 originals above their
reconstructions. Prints the mean PSNR. Files that cannot be read are named and skipped. What is decoded is z_0, the
latent with its noise; the noise of an image follows from --seed and its place in the sorted list of files.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from ulx import runs
from ulx.command_line import parse_arguments, run_command
from ulx.data.pixels import to_float, to_uint8
from ulx.diffusion import split_keys
from ulx.generate import decode, encode, in_batches
from ulx.image_files import ImageFolder, claim, contact_sheet, png_names, write_png
from ulx.metrics.images import psnr
from ulx.progress import Progress
from ulx.sample import DecoderOptions
from ulx.seeding import root_key

__all__ = ["Options", "reconstruct"]

SHEET = 50
"""Pairs on the contact sheet."""


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    folder: Path
    """Folder of images, subfolders included."""
    out: Path | None = None
    """Where to write; by default RUN/reconstructions."""
    ema: float | None = None
    """Width σ_rel of the weights' average, for a run with snapshots (`--train.posthoc-ema`); by default the moving
    average of training."""
    seed: int = 0
    """The noise of z_0 and of the decoder follows from it."""
    batch_size: int | None = None
    """Images per call; changes no result. By default the run's `evaluate.batch_size`."""
    overwrite: bool = False
    """Write over files that exist."""
    sample: DecoderOptions = DecoderOptions()

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def reconstruct(options: Options) -> float:
    """Write the reconstructions; returns the mean PSNR in dB, between what was written and the prepared originals."""
    run = runs.load(options.run, ema=options.ema, stage="stage1")
    run.refuse_clips("python -m ulx.reconstruct")
    folder = ImageFolder(options.folder, run.config.data.resolution)
    config = options.sample.over(run.config.sample)
    out = options.out or run.folder / "reconstructions"
    if out.resolve().is_relative_to(options.folder.resolve()):
        raise ValueError(f"--out {out} lies inside {options.folder}: choose one outside, beside the originals' folder")
    *files, sheet = png_names([*folder.names, "contact_sheet.png"])
    claim(out, [*files, sheet], options.overwrite)
    file_of = dict(zip(folder.names, files, strict=True))

    def rebuilt(
        x: UInt8[Array, "b h w c"], *, keys: Key[Array, " b"]
    ) -> tuple[UInt8[Array, "b h w c"], Int[Array, " b"]]:
        latent_keys, decoder_keys = split_keys(keys, 2)
        z_0 = encode(run.model, to_float(x), keys=latent_keys)
        decoded = decode(run.model, z_0, config, keys=decoder_keys)
        return to_uint8(decoded.z), jnp.broadcast_to(decoded.nfe, len(x))

    key = root_key(options.seed, "reconstruct")
    size = min(options.batch_size or run.config.evaluate.batch_size, len(folder.names))
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    decibels: list[float] = []
    nfes: list[int] = []
    with Progress("reconstruct", total=len(folder.names), unit="images") as progress:
        for part, originals in folder.batches(size):
            images, nfe = in_batches(rebuilt, originals, batch_size=size, key=key, start=len(decibels))
            for name, image in zip(part, images, strict=True):
                write_png(out / file_of[name], image)
            nfes += nfe.tolist()
            decibels += np.asarray(psnr(to_float(images), to_float(originals))).tolist()
            shown += list(zip(originals, images, strict=True))[: SHEET - len(shown)]
            progress.total = len(folder.names) - len(folder.skipped)
            progress.advance(len(part))
    write_png(out / sheet, contact_sheet(*(np.stack(images) for images in zip(*shown, strict=True))))

    mean = float(np.mean(decibels))
    error = f" ± {np.std(decibels, ddof=1) / np.sqrt(len(decibels)):.2f}" if len(decibels) > 1 else ""
    print(folder.summary())
    print(f"PSNR {mean:.2f}{error} dB over {len(decibels)} images, decoder NFE {np.mean(nfes):.0f} -> {out}")
    return mean


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: reconstruct(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
