"""Model sizes: `tiny` and `small` for 32 and 64 pixels on a CPU, and the paper's own for ImageNet-512 (§5.1).

The small ones lean on the transformer: their decoder has no convolution stages and sees 4×4 patches, with z_0 added
token by token. It learns to use the latent within some hundred steps, before the prior can squeeze it out; a small
convolutional U-Net does not (see the README on posterior collapse).
"""

from ulx.models import ModelConfig
from ulx.nn.encoder import EncoderConfig
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViTConfig

__all__ = ["MODELS"]


def _plain(width: int, blocks: int, patch: int = 1, **block) -> UViTConfig:
    return UViTConfig(patch=patch, channels=(width,), blocks=(blocks,), block=BlockConfig(**block))


_IMAGENET_BLOCK = BlockConfig(dropout=0.1)

MODELS: dict[str, ModelConfig] = {
    # 32 px: 8×8×8 latents, 64 tokens everywhere.
    "smoke": ModelConfig(
        encoder=EncoderConfig(channels=(32, 64), blocks=1, last_blocks=1),
        prior=_plain(64, 2),
        decoder=_plain(128, 2, patch=4),
        base=_plain(64, 2),
    ),
    "tiny": ModelConfig(
        encoder=EncoderConfig(channels=(64, 128), blocks=1, last_blocks=1),
        prior=_plain(192, 2),
        decoder=_plain(192, 6, patch=4),
        base=_plain(192, 4),
    ),
    # 64 px: 16×16×8 latents, 256 tokens; the base has the paper's two levels.
    "small": ModelConfig(
        encoder=EncoderConfig(channels=(64, 128), blocks=2, last_blocks=3),
        prior=_plain(256, 6),
        decoder=_plain(256, 8, patch=4),
        base=UViTConfig(patch=1, channels=(192, 384), blocks=(4, 8), block=BlockConfig(dropout=0.1)),
    ),
    # The paper's: 512 px, 32×32×32 latents. Heads of 64, MLP ratio 4 and the 3 + 3 split of the outer level's
    # 6 blocks are ours; the paper does not state them.
    "imagenet512": ModelConfig(
        encoder=EncoderConfig(channels=(128, 256, 512, 512), blocks=2, last_blocks=3, latent_channels=32),
        prior=UViTConfig(patch=1, channels=(1024,), blocks=(8,)),
        decoder=UViTConfig(
            patch=2, conv_channels=(128, 256, 512), conv_blocks=2, channels=(1024,), blocks=(8,), block=_IMAGENET_BLOCK
        ),
        base=UViTConfig(patch=1, channels=(512, 1024), blocks=(6, 16), block=_IMAGENET_BLOCK),
    ),
}
