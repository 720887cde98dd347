"""Sample images from a trained run.

    python -m ulx.sample runs/openmoji                                         64 images, the classes in turn
    python -m ulx.sample runs/openmoji --label "Animals & Nature" --guidance-scale 2
    python -m ulx.sample runs/openmoji --num 50000 --out samples               for a distance
    python -m ulx.sample runs/openmoji --prior                                 the raw prior, for comparison
    python -m ulx.sample runs/kinetics600 --num 4 --frames 60                  clips, as animated PNGs
    python -m ulx.sample runs/text-to-image --prompt "a red heart" "a dog" --guidance-scale 4    captions in turn

Image i of a seed is the same whatever --num and --batch-size. Written to --out: one PNG for each image, named by
model, seed and index, a contact sheet of the first 100, and a JSON file with all settings and the label of each file.
"""

import dataclasses
import difflib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int, Int32, Key, UInt8

from ulx import runs
from ulx.command_line import parse_arguments, run_command
from ulx.config import SampleConfig
from ulx.data.pixels import to_uint8
from ulx.diffusion import split_keys
from ulx.generate import decode, extend, in_batches, sample_latents
from ulx.image_files import STRIPS, claim, contact_sheet, film_strips, write_png
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.progress import Progress
from ulx.runner import Told
from ulx.samplers import Solver
from ulx.seeding import root_key
from ulx.text.examples import Prompts, check_prompts

__all__ = ["DecoderOptions", "Options", "SamplerOptions", "sample"]

SHEET = 100
"""Images on the contact sheet."""


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    decoder_num_steps: int | None = None
    """Solver steps of the decoder; by default the run's."""
    decoder_solver: Solver | None = None
    """The decoder's solver; by default the run's."""
    decoder_churn: float | None = None
    """The decoder's churn, for euler and heun; by default the run's."""
    decoder_tolerance: float | None = None
    """The decoder's tolerance, for tsit5; by default the run's."""
    decoder_inverse_rho: float | None = None
    """1/ρ of the spacing of the decoder's steps, 0 for even ones in λ; by default the run's."""

    def over(self, config: SampleConfig) -> SampleConfig:
        """`config` with the options that were given."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(config, **given)


@dataclasses.dataclass(frozen=True)
class SamplerOptions(DecoderOptions):
    num_steps: int | None = None
    """Solver steps of the latent sampler; by default the run's."""
    solver: Solver | None = None
    """The latent sampler's solver; by default the run's."""
    churn: float | None = None
    """Noise put back before each step of euler and heun, in steps: 0 is the ODE; by default the run's."""
    tolerance: float | None = None
    """Error that tsit5 allows itself in each step; by default the run's."""
    inverse_rho: float | None = None
    """1/ρ of the spacing of the latent sampler's steps, 0 for even ones in λ; by default the run's."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two log-SNRs; by default as in the run."""


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    out: Path | None = None
    """Where to write; by default RUN/samples."""
    num: int = 64
    """How many images."""
    label: tuple[str, ...] = ()
    """Classes to sample, by name or index, in turn; by default all of them."""
    prompt: tuple[str, ...] = ()
    """Of a run with captions, what to sample, in turn: --prompt "a red heart"; by default without a caption."""
    text_encoder: Path | None = None
    """A safetensors file with the prompts' embeddings by the run's encoder, for a run trained on such a file."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 is off, above 1 trades variety for typical members of the class."""
    frames: int | None = None
    """Length of the clips, of a run that can be given frames: beyond its own by giving it the last ones anew."""
    prior: bool = False
    """Sample the raw stage-1 prior in place of the base model. It knows no classes and no guidance."""
    ema: float | None = None
    """Width σ_rel of the base model's average, or with --prior of stage 1's, for a run with snapshots
    (`posthoc_ema`); by default the moving average of training."""
    seed: int = 0
    """The noise follows from it."""
    batch_size: int | None = None
    """Images per call; changes no result. By default the run's `evaluate.batch_size`."""
    overwrite: bool = False
    """Write over files that exist."""
    sample: SamplerOptions = SamplerOptions()

    def __post_init__(self):
        for name in ("num", "batch_size", "frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        check_prompts(self.prompt)
        if self.prior and (self.label or self.prompt or self.guidance_scale != 1):
            raise ValueError(
                "the raw prior knows no classes and captions: use --prior without --label, --prompt and "
                "--guidance-scale"
            )


def sample(options: Options) -> Path:
    """Write the images; returns the folder. Raises FileNotFoundError for a run that has no base model yet."""
    run = runs.load(options.run, ema=options.ema, stage="stage1" if options.prior else "stage2")
    denoiser = run.model.prior if options.prior else run.base
    if denoiser is None:
        raise FileNotFoundError(
            f"{options.run} has no base model: finish stage 2 first (--resume), or sample the raw prior with --prior"
        )
    run.check_guidance(options.guidance_scale)
    given = run.config.model.given_frames
    if options.frames is not None and (options.prior or not given):
        raise ValueError(f"--frames needs a base model that can be given frames, and {options.run} has none to sample")
    told = Told() if options.prior else told_in_turn(options, run, denoiser.conditions)
    config = options.sample.over(run.config.sample)
    kind = "prior" if options.prior else "base"
    stem = f"{kind}-seed{options.seed}"
    files = [f"{stem}-{index:06d}.png" for index in range(options.num)]
    out = options.out or run.folder / "samples"
    claim(out, [*files, f"{stem}-sheet.png", f"{stem}.json"], options.overwrite)

    def images(
        index: Int[Array, " b"], told: Any, *, keys: Key[Array, " b"]
    ) -> tuple[UInt8[Array, "b *space c"], Int32[np.ndarray, "b 2"]]:
        latent_keys, decoder_keys, later_keys = split_keys(keys, 3)
        conditions = Conditions(told.label, told.captions)
        latents = sample_latents(
            denoiser,
            run.model.latent_schedule,
            config,
            keys=latent_keys,
            conditions=conditions,
            guidance_scale=options.guidance_scale,
        )
        decoded = decode(run.model, latents.z, config, keys=decoder_keys, conditions=conditions)
        clips = decoded.z
        if options.frames is not None:
            clips = extend(
                run.model,
                denoiser,
                clips,
                options.frames,
                config,
                given=given,
                keys=later_keys,
                conditions=conditions,
                guidance_scale=options.guidance_scale,
            )
        return to_uint8(clips), np.tile(np.array([latents.nfe, decoded.nfe], np.int32), (len(index), 1))

    size = min(options.batch_size or run.config.evaluate.batch_size, options.num)
    shown: list[np.ndarray] = []
    nfes: list[np.ndarray] = []
    with Progress("sample", total=options.num, unit=run.config.data.unit) as progress:
        for begin in range(0, options.num, size):  # written as they come: an interruption loses one batch
            part = slice(begin, min(begin + size, options.num))
            rows = np.arange(options.num)[part], told[part]
            batch, nfe = in_batches(images, *rows, batch_size=size, key=root_key(options.seed, "sample"), start=begin)
            nfes.append(nfe)
            for name, image in zip(files[part], batch, strict=True):
                write_png(out / name, image)
            shown += list(batch[: SHEET - len(shown)])
            progress.advance(len(batch))

    names = [""] * options.num
    if told.captions is not None:
        names = list(told.captions.captions)
    elif told.label is not None:
        names = [run.class_names[label] for label in told.label]
    captions = names[: len(shown)] if any(names) else []
    tiles = np.stack(shown)
    if tiles.ndim == 5:  # each clip a strip of its frames, as many as can be looked at
        tiles = film_strips(tiles[:STRIPS])
    write_png(out / f"{stem}-sheet.png", contact_sheet(tiles, captions=captions[: len(tiles)]))
    nfe, decoder_nfe = np.concatenate(nfes).mean(axis=0).round().astype(int).tolist()
    facts = {
        "run": str(options.run),
        "steps": run.step,
        "weights": run.weights,
        "model": kind,
        "seed": options.seed,
        "sampler": dataclasses.asdict(config) | {"guidance_scale": options.guidance_scale},
        "nfe": {"latent": nfe, "decoder": decoder_nfe},
        "frames": options.frames,
        "files": [{"file": file, "label": name} for file, name in zip(files, names, strict=True)],
    }
    (out / f"{stem}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{options.num} {run.config.data.unit} of the {kind} model, NFE {nfe} + {decoder_nfe} (decoder) -> {out}")
    return out


def told_in_turn(options: Options, run: runs.Run, spec: ConditionSpec) -> Told:
    """The wanted classes or captions in turn. Raises ValueError for one that the run does not know, and guidance
    towards nothing."""
    if options.label and not spec.num_classes:
        raise ValueError(f"{options.run} was trained without classes: sample it without --label")
    labels = labels_in_turn(options.label, run.class_names, options.num) if spec.num_classes else None
    if options.prompt:
        encoder = run.open_text(options.text_encoder)
        encoder(options.prompt)  # one that it does not know is refused before anything is written
        turn = itertools.islice(itertools.cycle(options.prompt), options.num)
        return Told(labels, Prompts(encoder, list(turn)))
    if spec.text_channels and not spec.num_classes and options.guidance_scale != 1:
        raise ValueError(f"{options.run} is guided towards captions: give a --prompt, or --guidance-scale 1")
    return Told(labels)


def labels_in_turn(wanted: Sequence[str], class_names: Sequence[str], count: int) -> Int32[np.ndarray, " n"]:
    """`count` class indices that go round the wanted classes (names, or else indices), or round all of them.

    Raises ValueError for a class that is not there, with the nearest name.
    """
    chosen = [_index(label, class_names) for label in wanted] or list(range(len(class_names)))
    return np.resize(np.array(chosen, np.int32), count)


def _index(label: str, class_names: Sequence[str]) -> int:
    if label in class_names:
        return class_names.index(label)
    if label.isdecimal() and int(label) < len(class_names):
        return int(label)
    close = difflib.get_close_matches(label, class_names, n=1)
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(class_names[:30]))
    raise ValueError(
        f"no class {label!r} in this run" + (f"; did you mean {close[0]}?" if close else "") + f" Classes: {listed}"
        f"{', …' if len(class_names) > 30 else ''}"
    )


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: sample(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
