"""Unified Latents of video: clips of 16 frames, continued from their first 5, as the paper does on Kinetics-600.

    python experiments/kinetics600.py                       no files: embedded emoji that bounce about, 32×32, on a CPU
    python experiments/kinetics600.py --preset smoke        everything, small, in minutes
    python experiments/kinetics600.py --preset tiny64       emoji at 64×64, 4×8×8 down as the paper: days on a CPU
    python experiments/kinetics600.py --data.source moving-digits --name digits     MNIST's digits, as in the literature
    python experiments/kinetics600.py --data.source vizdoom --name doom             walks through Doom, "ulx[doom]"
    python experiments/kinetics600.py --preset tiny --data.source folder --data.path DIR --name mine    your own videos
    python experiments/kinetics600.py --loss-factor 8 --name lf8                    change one thing
    the same with --resume                                                          continue after an interruption

    python -m ulx.data.prepare kinetics600 --root videos --annotations train.csv val.csv --out kinetics-128
    python experiments/kinetics600.py --data.path kinetics-128      the paper's small model, 16 frames of 128×128
    python experiments/kinetics600.py --preset medium --dry-run     what it would cost, without training

Needs pip install "ulx[all,fvd]", and "ulx[video]" for video files. Leaves runs/NAME/report.html with clips that move,
curves, bits and FVD.

Presets: tiny and smoke are for a CPU, tiny64 for an accelerator (not trained to its end yet), small and medium are the
paper's networks (§5.1). How long the paper trains, with what batches, learning rates and frame rate, it does not say:
these are ours, and not tried at this size yet. By --dry-run small takes 7.2e20 FLOPs for stage 1 and 2.4e20 for stage 2
(medium: 3.6e20), of which the frozen encoder, in float32, 1.4e20; an accelerator of 989 TFLOP/s in bfloat16 and half of
that in TF32 that does 40 % of it (assumed, not measured) takes 500 and 260 hours (medium: 350).

The paper's FVD: 1.7 for the small base model, 1.3 for the medium one.
"""

import dataclasses
import math

from imagenet512 import TRAIN

from ulx.command_line import experiment
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig
from ulx.data import DataConfig
from ulx.presets import MODELS, PAPER

SMALL = Config(
    preset="small",
    name="kinetics600",
    data=DataConfig(source="moving-emoji", clips=True, resolution=128, flip=True, labels=False, workers=8),
    model=PAPER["kinetics600-small"].model,
    loss_factor=1.5,
    prior_warmup=(1_000, 10_000),
    cache_latents=False,  # training clips begin anywhere in their videos
    train=TRAIN,
    train_base=dataclasses.replace(TRAIN, batch_size=512),
    sample=SampleConfig(num_steps=64, decoder_num_steps=64, guidance_scale=1.0),
    evaluate=EvaluateConfig(held_out=2048, batch_size=32, levels=8, draws=1),
)

PRESETS = {
    "tiny": Config(
        preset="tiny",
        name="kinetics600",
        data=DataConfig(source="moving-emoji", clips=True),
        model=MODELS["video-tiny"],
        # What a single frame shows at a log-SNR of λ*, a clip shows at a lower one, for its frames repeat each other:
        # the cut-off is at λ* = b + ln(c_lf − 1) = 4.1, and 2.5 for images of this size.
        loss_factor=6.0,
        sigmoid_bias=2.5,
        # Of clips more is left to decide at high noise: what moves where.
        base_bias=-3.0,
        cache_latents=False,  # of 65,536 clips training sees some 6,400: encoding all of them first costs more
        train=TrainConfig(
            steps=320, batch_size=8, optimizer="muon", learning_rate=2e-3, warmup_steps=50, ema_decay=0.98
        ),
        train_base=TrainConfig(
            steps=800, batch_size=8, optimizer="muon", learning_rate=4e-3, warmup_steps=50, ema_decay=0.993
        ),
        sample=SampleConfig(
            num_steps=16, solver="dpmpp_2m", decoder_num_steps=12, decoder_solver="ancestral", guidance_scale=1.0
        ),
        evaluate=EvaluateConfig(held_out=32, batch_size=16, flow_images=4),
    ),
    "smoke": Config(
        preset="smoke",
        name="smoke600",
        prior_warmup=(10, 40),
        data=DataConfig(source="moving-emoji", clips=True, limit=512),
        model=MODELS["video-smoke"],
        loss_factor=4.0,
        sigmoid_bias=1.4,
        base_bias=1.0,
        cache_latents=False,
        train=TrainConfig(steps=60, batch_size=8, warmup_steps=20, ema_decay=0.95, save_every=50),
        train_base=TrainConfig(steps=60, batch_size=8, warmup_steps=20, ema_decay=0.95, save_every=50),
        sample=SampleConfig(num_steps=6, decoder_num_steps=8, guidance_scale=1.0),
        evaluate=EvaluateConfig(held_out=8, batch_size=8, levels=8, draws=1, flow_images=0),
    ),
    "tiny64": Config(
        preset="tiny64",
        name="kinetics64",
        data=DataConfig(source="moving-emoji", clips=True, resolution=64),
        model=MODELS["video-small"],
        # Twice the pixels each way: the same cut-off as above, 2 ln 2 lower.
        loss_factor=6.0,
        sigmoid_bias=2.5 - 2 * math.log(2),
        base_bias=0.0,  # as the longer run of the README, whose base model has no levels either
        train=TrainConfig(steps=10_000, batch_size=16, optimizer="muon", learning_rate=2e-3, ema_decay=0.999),
        train_base=TrainConfig(steps=20_000, batch_size=16, optimizer="muon", learning_rate=4e-3, ema_decay=0.9995),
        sample=SampleConfig(
            num_steps=16, solver="dpmpp_2m", decoder_num_steps=16, decoder_solver="ancestral", guidance_scale=1.0
        ),
        evaluate=EvaluateConfig(held_out=512, batch_size=16, flow_images=4),
    ),
    "small": SMALL,
    "medium": dataclasses.replace(SMALL, preset="medium", model=PAPER["kinetics600-medium"].model),
}


if __name__ == "__main__":
    experiment(PRESETS, __doc__ or "", of="Kinetics-600", on_files="small")
