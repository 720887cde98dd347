"""Evaluate a finished run again and write its report anew.

python -m ulx.evaluate runs/openmoji
python -m ulx.evaluate runs/openmoji --ema 0.07                    the base model with another average of its weights
python -m ulx.evaluate runs/openmoji --inception-weights FILE      FID and KID too
python -m ulx.evaluate runs/imagenet512 --num-samples 50000        gFID@50k, with --inception-weights
python -m ulx.evaluate runs/kinetics600 --held-out 2048            FVD of 2,048 continued clips
python -m ulx.evaluate runs/openmoji --sample.solver ancestral     by another sampler
python -m ulx.evaluate runs/openmoji --guidance-scale 1.5          the distance of guided samples

What it makes is kept on disk until the end, in RUN/evaluation/unfinished: interrupted and given again, it goes on.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ulx import job, run_folder, runs
from ulx.command_line import parse_arguments, run_together
from ulx.data import open_dataset
from ulx.data.split import LEAST
from ulx.metrics import inception
from ulx.sample import SamplerOptions
from ulx.text.examples import Remembered, embedded

__all__ = ["Options", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    ema: float | None = None
    """Width σ_rel of the base model's average, for a run with snapshots (`--train-base.posthoc-ema`); by default the
    moving average of training."""
    held_out: int | None = None
    """Measure on so many held-out examples, at most all of them; by default as the run was set."""
    num_samples: int | None = None
    """Measure so many samples of the base model, and as many of the prior; by default as the run was set."""
    inception_weights: Path | None = None
    """The file of FID's InceptionV3: FID and KID as well. By default as the run was set."""
    inception_resize: inception.Resize | None = None
    """How it is shown the images: "tf1-bilinear", or "clean-bicubic", Clean-FID's way, whose distances are called so.
    By default as the run was set."""
    clip_weights: Path | None = None
    """Folder of CLIP (config.json, model.safetensors, tokenizer.json), for a run with captions: the CLIP score too. By
    default as the run was set."""
    prompts: tuple[str, ...] = ()
    """Prompts to show samples of, for a run with captions; by default as the run was set."""
    lpips: bool = False
    """LPIPS of the reconstructions too; needs pip install "ulx[lpips]"."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the samples whose distance is measured; by default as the run was set (1, off, unless
    it was set otherwise)."""
    guidance_sweep: tuple[float, ...] = ()
    """The guidance scales at which samples of a run with captions are measured; by default as the run was set."""
    sample: SamplerOptions = SamplerOptions()


def evaluate(options: Options) -> Path:
    """Evaluate with the run's own settings, and more if asked; returns the path of the report.

    Raises FileNotFoundError for what is no run, ValueError for one that is not finished or cannot be measured so.
    """
    if options.run.is_file():
        raise ValueError(f"{options.run} is a file, and an evaluation goes into a run's folder: give that")
    run = runs.load(options.run, ema=options.ema)
    if run.base is None:
        raise ValueError(f"{options.run} has no base model yet: finish stage 2 first (--resume)")
    if options.num_samples is not None and run.config.model.given_frames:
        raise ValueError(f"{options.run} continues held-out clips, one sample of each: --held-out says of how many")
    evaluate = run.config.evaluate
    for name in ("held_out", "num_samples"):
        count = getattr(options, name)
        if count is None:
            continue
        if count < LEAST:
            raise ValueError(f"--{name.replace('_', '-')} {count}: distances need at least {LEAST} examples")
        evaluate = dataclasses.replace(evaluate, **{name: count})
    if options.inception_weights is not None:
        evaluate = dataclasses.replace(evaluate, inception_weights=str(options.inception_weights))
    if options.inception_resize is not None:
        inception.check_resize(options.inception_resize, evaluate.inception_weights)
        evaluate = dataclasses.replace(evaluate, inception_resize=options.inception_resize)
    if options.clip_weights is not None:
        evaluate = dataclasses.replace(evaluate, clip_weights=str(options.clip_weights))
    evaluate = dataclasses.replace(evaluate, prompts=options.prompts or evaluate.prompts)
    evaluate = dataclasses.replace(evaluate, lpips=evaluate.lpips or options.lpips)
    if options.guidance_scale is not None:
        evaluate = dataclasses.replace(evaluate, guidance_scale=options.guidance_scale)
    evaluate = dataclasses.replace(evaluate, guidance_sweep=options.guidance_sweep or evaluate.guidance_sweep)
    config = dataclasses.replace(run.config, evaluate=evaluate, sample=options.sample.over(run.config.sample))
    dataset = open_dataset(config.data)
    text = None
    if run.text is not None:
        encoder = run.open_text()
        text = Remembered(embedded(dataset, encoder, run.path / "text"), encoder)
    run_folder.remember_data(run.path, dataset, text)
    return job.measure(run.path, run.model, run.base, dataset, config, text, weights=run.weights)


def main(args: Sequence[str] | None = None) -> None:
    run_together(lambda: print(evaluate(parse_arguments(Options, __doc__ or "", args))))


if __name__ == "__main__":
    main()
