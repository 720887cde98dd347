"""Unified Latents of video: clips of 16 frames, continued from their first 5, as the paper does on Kinetics-600.

    python experiments/kinetics600.py                       embedded clips: emoji that bounce about, 32×32 pixels
    python experiments/kinetics600.py --preset smoke        everything, small, in minutes
    python experiments/kinetics600.py --data.source moving-digits --name digits     MNIST's digits, as in the literature
    python experiments/kinetics600.py --loss-factor 8 --name lf8                    change one thing
    python experiments/kinetics600.py --resume                                      continue after an interruption

Needs pip install "ulx[all,fvd]". Leaves runs/NAME/report.html with clips that move, curves, bits and FVD. The paper's
own setting (Kinetics-600 at 128×128) is not here yet; its networks are `ulx.presets.PAPER`.
"""

from ulx.command_line import experiment
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig
from ulx.data import DataConfig
from ulx.presets import MODELS

PRESETS = {
    "tiny": Config(
        preset="tiny",
        name="kinetics600",
        data=DataConfig(source="moving-emoji", clips=True),
        model=MODELS["video-tiny"],
        loss_factor=4.0,
        sigmoid_bias=1.4,
        base_bias=1.0,
        cache_latents=False,  # there is no end of clips
        train=TrainConfig(steps=1000, batch_size=16, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99),
        train_base=TrainConfig(steps=3000, batch_size=32, learning_rate=2e-3, warmup_steps=50, ema_decay=0.997),
        sample=SampleConfig(
            num_steps=16, solver="dpmpp_2m", decoder_num_steps=12, decoder_solver="ancestral", guidance_scale=1.0
        ),
        evaluate=EvaluateConfig(held_out=48, batch_size=16, flow_images=4),
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
}


if __name__ == "__main__":
    experiment(PRESETS, __doc__ or "")
