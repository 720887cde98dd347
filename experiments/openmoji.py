"""Unified Latents on OpenMoji: the main job, end to end, on two CPU cores.

    python experiments/openmoji.py                                      the default run, 32×32 pixels
    python experiments/openmoji.py --preset smoke                       everything, small, in a minute or two
    python experiments/openmoji.py --loss-factor 8 --name lf8           change one thing
    python experiments/openmoji.py --variant learned-variance --name d  a variant of the paper, or a baseline
    python experiments/openmoji.py --resume                             continue after an interruption
    python experiments/openmoji.py --data.source folder --data.path DIR --name mine      your own images

Leaves runs/NAME/report.html with pictures, curves, bits and distances. Presets: smoke, tiny (the default), tiny64
(64×64 pixels, 1.2 times the FLOPs in stage 1 and as many in stage 2), small (64×64 pixels, for an accelerator).
"""

import dataclasses

from ulx.command_line import experiment
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig
from ulx.data import DataConfig
from ulx.presets import MODELS

TINY = Config(
    preset="tiny",
    name="openmoji",
    model=MODELS["tiny"],
    # Detail up to a log-SNR of λ* = b + ln(c_lf − 1) = 2.5 is worth its bits, as with c_lf 2 at the b of the
    # resolution rule. This pair weighs shapes and colours, which show at high noise, twice as much against it.
    loss_factor=4.0,
    sigmoid_bias=1.4,
    base_bias=1.0,
    # As short as they are, the runs want a high learning rate and an average over their last steps alone.
    train=TrainConfig(steps=1000, batch_size=32, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99),
    train_base=TrainConfig(steps=4000, batch_size=32, learning_rate=2e-3, warmup_steps=50, ema_decay=0.9975),
    sample=SampleConfig(num_steps=16, solver="dpmpp_2m", decoder_num_steps=12, decoder_solver="ancestral"),
)

PRESETS = {
    "tiny": TINY,
    "smoke": Config(
        preset="smoke",
        name="smoke",
        prior_warmup=(10, 40),
        base_bias=1.0,
        data=DataConfig(limit=256),
        model=MODELS["smoke"],
        train=TrainConfig(steps=100, batch_size=16, warmup_steps=20, ema_decay=0.95, save_every=50),
        train_base=TrainConfig(steps=100, batch_size=16, warmup_steps=20, ema_decay=0.95, save_every=50),
        sample=SampleConfig(num_steps=6, decoder_num_steps=8),
        evaluate=EvaluateConfig(num_samples=32, batch_size=32, levels=8, draws=1),
    ),
    "tiny64": dataclasses.replace(
        TINY,
        preset="tiny64",
        name="openmoji64-tiny",
        data=DataConfig(resolution=64),
        model=MODELS["tiny64"],
        sigmoid_bias=0.0,  # lower by 2 ln 2, the resolution rule: for the same detail
    ),
    "small": Config(
        preset="small",
        name="openmoji64",
        data=DataConfig(resolution=64),
        model=MODELS["small"],
        base_bias=1.0,
        train=TrainConfig(steps=20_000, batch_size=64, learning_rate=5e-4, ema_decay=0.9995, save_every=1000),
        train_base=TrainConfig(steps=40_000, batch_size=64, learning_rate=5e-4, ema_decay=0.9995, save_every=1000),
        sample=SampleConfig(num_steps=32, decoder_num_steps=32),
        evaluate=EvaluateConfig(num_samples=2048),
    ),
}


if __name__ == "__main__":
    experiment(PRESETS, __doc__ or "")
