"""Continue held-out clips of a run's data from their first frames, and write these clips beside it.

    python -m ulx.predict runs/kinetics600                               16 clips of the run's own length
    python -m ulx.predict runs/kinetics600 --frames 60                   further, by rolling the window
    python -m ulx.predict runs/kinetics600 --num 2048 --out predicted
    python -m ulx.metrics predicted/originals predicted/clips --given 5  FVD, given frames included; PSNR without them

A clip of a seed is the same whatever --num and --batch-size. Written to --out, as animated PNGs: `clips/` and
`originals/`, the same names in both; sheets of the first of them, originals above, given frames marked, one as strips
and one that moves; and a JSON file with all settings and, frame by frame, the PSNR of the continuations and of the last
given frame in their place, in dB: means over clips with their standard errors.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ulx import runs
from ulx.command_line import parse_arguments, run_command
from ulx.data import open_dataset
from ulx.data.pixels import to_float, to_uint8
from ulx.data.source import Split
from ulx.data.video import ShortError
from ulx.evaluation_data import told_of
from ulx.generate import extend, in_batches
from ulx.image_files import STRIPS, claim, contact_sheet, film_strips, framed, moving_sheet, write_png
from ulx.metrics.copies import spread_over
from ulx.metrics.entries import as_json, mean
from ulx.metrics.images import psnr
from ulx.nn.conditions import Conditions
from ulx.progress import Progress
from ulx.sample import SamplerOptions
from ulx.seeding import root_key

__all__ = ["Options", "predict"]

Clips = UInt8[np.ndarray, "n t h w 3"]


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    out: Path | None = None
    """Where to write; by default RUN/predictions."""
    num: int = STRIPS
    """How many held-out clips, spread over all of them."""
    frames: int | None = None
    """Length of the clips, the given frames included; by default the run's own."""
    ema: float | None = None
    """Width σ_rel of the base model's average, for a run with snapshots (`posthoc_ema`); by default the moving average
    of training."""
    guidance_scale: float = 1.0
    """Classifier-free guidance towards the clip's class: 1 is off."""
    seed: int = 0
    """The noise follows from it."""
    batch_size: int | None = None
    """Clips per call; changes no result. By default the run's `evaluate.batch_size`."""
    overwrite: bool = False
    """Write over files that exist."""
    sample: SamplerOptions = SamplerOptions()

    def __post_init__(self):
        for name in ("num", "batch_size", "frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale}")


def predict(options: Options) -> Path:
    """Write the clips; returns the folder.

    Raises FileNotFoundError for a run that has no base model yet, and ValueError for one that is given no frames, that
    was trained on other data than are there now, or with fewer held-out clips than are asked for, and for no frames
    to predict.
    """
    run = runs.load(options.run, ema=options.ema)
    base, data, given = run.base, run.config.data, run.config.model.given_frames
    if base is None:
        raise FileNotFoundError(f"{options.run} has no base model: finish stage 2 first (--resume)")
    if not given:
        raise ValueError(f"{options.run} is given no frames (model.given_frames=0): there is nothing to continue from")
    length = options.frames or data.frames
    if length <= given:
        raise ValueError(f"frames must be above the {given} that {options.run} is given, got {length}")
    run.check_guidance(options.guidance_scale)
    run.check_data(open_dataset(data))
    held_out = open_dataset(data, frames=length).validation
    if options.num > len(held_out):
        raise ValueError(f"num must be at most the {len(held_out)} held-out clips of {data.source}, got {options.num}")
    # Only videos in files may be too short, for more frames than the run's own.
    of_files = data.source in ("folder", "prepared") and length > data.frames
    rows = long_enough(held_out, options.num) if of_files else spread_over(len(held_out), options.num)
    if len(rows) < options.num:
        raise ValueError(
            f"num must be at most the {len(rows)} held-out clips of {data.source} that have {length} frames, got "
            f"{options.num}"
        )
    stem = f"seed{options.seed}"
    names = [f"{stem}-{row:06d}.png" for row in rows]
    sheets = [f"{stem}-sheet.png", f"{stem}-sheet-moving.png"]
    out = options.out or run.folder / "predictions"
    wanted = [f"{folder}/{name}" for folder in ("clips", "originals") for name in names]
    claim(out, [*wanted, *sheets, f"{stem}.json"], options.overwrite)

    told, config = told_of(held_out, rows, base.conditions, None), options.sample.over(run.config.sample)
    key, numbers = root_key(options.seed, "predict"), np.array(rows)

    def continued(
        first: UInt8[Array, "b _t h w 3"], told: Any, row: Int[Array, " b"], **_: Any
    ) -> UInt8[Array, "b _length h w 3"]:
        clips = extend(
            run.model,
            base,
            to_float(first),
            length,
            config,
            given=given,
            keys=jax.vmap(jax.random.fold_in, (None, 0))(key, row),
            conditions=Conditions(told.label),
            guidance_scale=options.guidance_scale,
        )
        return to_uint8(clips)

    size, shown, decibels = min(options.batch_size or run.config.evaluate.batch_size, options.num), [], []
    with Progress("predict", total=options.num, unit="clips") as progress:
        for begin in range(0, options.num, size):  # written as they come: an interruption loses one batch
            part = slice(begin, min(begin + size, options.num))
            originals = np.stack([held_out[row]["image"] for row in rows[part]])
            clips = in_batches(
                continued, originals[:, :given], told[part], numbers[part], batch_size=size, key=key, start=begin
            )
            for name, clip, original in zip(names[part], clips, originals, strict=True):
                write_png(out / "clips" / name, clip)
                write_png(out / "originals" / name, original)
            decibels.append(_decibels(clips, originals, given))
            shown += zip(originals, clips, strict=True)
            shown = shown[:STRIPS]
            progress.advance(len(clips))

    own, repeated = np.concatenate(decibels).swapaxes(0, 1)
    pairs = [framed(np.stack(each), given) for each in zip(*shown, strict=True)]
    write_png(out / sheets[0], contact_sheet(*map(film_strips, pairs)))
    write_png(out / sheets[1], moving_sheet(*pairs))
    facts = {
        "run": str(options.run),
        "steps": run.step,
        "weights": run.weights,
        "data": {"source": data.source, "frames": length, "given": given, "window": data.frames},
        "seed": options.seed,
        "sampler": dataclasses.asdict(config) | {"guidance_scale": options.guidance_scale},
        "psnr_by_frame": [mean(decibels) for decibels in own.T],
        "psnr_of_last_frame_by_frame": [mean(decibels) for decibels in repeated.T],
        "files": names,
    }
    (out / f"{stem}.json").write_text(as_json(facts), "utf-8")
    print(f"{options.num} clips continued from {given} to {length} frames -> {out}")
    print(f"PSNR of frames {given} to {length - 1}: {_listed(own)} dB")
    print(f"of frame {given - 1} in their place: {_listed(repeated)} dB")
    return out


def long_enough(held_out: Split, count: int) -> list[int]:
    """So many clips, spread over all of them; in the place of one too short the next that is not. Fewer, if there are
    no more."""
    rows: list[int] = []

    @functools.cache
    def is_there(row: int) -> bool:
        try:
            held_out[row]
        except ShortError:
            return False
        return True

    for wanted in spread_over(len(held_out), count):
        for row in ((wanted + i) % len(held_out) for i in range(len(held_out))):
            if row not in rows and is_there(row):
                rows.append(row)
                break
    return sorted(rows)


def _decibels(clips: Clips, originals: Clips, given: int) -> Float[np.ndarray, "n 2 _later"]:
    """PSNR of every frame after the given ones, and of the last given one in its place."""
    wanted = originals[:, given:]
    others = clips[:, given:], np.broadcast_to(originals[:, given - 1 : given], wanted.shape)
    flat = lambda frames: to_float(frames.reshape(-1, *frames.shape[2:]))  # noqa: E731
    return np.stack([psnr(flat(each), flat(wanted)).reshape(wanted.shape[:2]) for each in others], axis=1)


def _listed(decibels: Float[np.ndarray, "n _later"]) -> str:
    return " ".join(f"{mean(frame)['value']:.1f}" for frame in decibels.T)


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: predict(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
