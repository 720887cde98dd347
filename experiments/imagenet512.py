"""Unified Latents on ImageNet at 512×512 pixels, with the paper's networks (§5.1).

    python experiments/imagenet512.py                               no files: the embedded drawings at 32×32, on a CPU
    python -m ulx.data.prepare imagenet --root ILSVRC2012 --resolution 512 --out imagenet-512
    python experiments/imagenet512.py --data.path imagenet-512      the paper's small model on ImageNet
    python experiments/imagenet512.py --data.path imagenet-512 --preset medium --autoencoder runs/imagenet512 --name m
    python experiments/imagenet512.py --preset small --dry-run      what it would cost, without training
    the same with --resume                                          continue after an interruption

Needs pip install "ulx[all]". Leaves runs/NAME/report.html. For FID name the file of InceptionV3, which no package has:
--evaluate.inception-weights FILE.

Presets: tiny and smoke are those of openmoji.py, small and medium the paper's networks. How long the paper trains, with
what batches and learning rates, it does not say: these are ours, and not tried at this size yet. By --dry-run small
takes 3.8e20 FLOPs for stage 1 and 4.0e20 for stage 2 (medium: 8.6e20); an accelerator of 989 TFLOP/s in bfloat16 that
does 40 % of it (assumed, not measured) takes 270 and 280 hours (medium: 600).

The paper's numbers (Tab. 2, c_lf 1.5): 0.059 bits/pixel, PSNR 27.6 dB, rFID@50k 0.47, gFID@50k 1.54 for the small base
model and 1.31 for the medium one.
"""

import dataclasses

from openmoji import PRESETS as OPENMOJI

from ulx.command_line import experiment
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig
from ulx.data import DataConfig
from ulx.presets import PAPER

# At the paper's sizes, for clips too.
TRAIN = TrainConfig(
    steps=400_000,
    batch_size=256,
    learning_rate=1e-4,
    warmup_steps=10_000,
    ema_decay=0.9999,
    dtype="bfloat16",
    log_every=100,
    save_every=5_000,
)

SMALL = Config(
    preset="small",
    name="imagenet512",
    data=DataConfig(resolution=512, flip=True, workers=8),
    model=PAPER["imagenet512-small"].model,
    loss_factor=1.5,
    prior_warmup=(1_000, 10_000),
    train=TRAIN,
    train_base=dataclasses.replace(TRAIN, steps=800_000, batch_size=1024),
    sample=SampleConfig(num_steps=64, decoder_num_steps=64),
    evaluate=EvaluateConfig(num_samples=50_000, batch_size=64, levels=8, draws=1),
)

PRESETS = {
    "tiny": dataclasses.replace(OPENMOJI["tiny"], name="imagenet512"),
    "smoke": dataclasses.replace(OPENMOJI["smoke"], name="smoke512"),
    "small": SMALL,
    "medium": dataclasses.replace(SMALL, preset="medium", model=PAPER["imagenet512-medium"].model),
}


if __name__ == "__main__":
    experiment(PRESETS, __doc__ or "", of="ImageNet", on_files="small")
