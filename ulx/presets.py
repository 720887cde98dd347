"""Model sizes: `MODELS` for 32 and 64 pixels on a CPU, and `PAPER`, the paper's own (§5.1).

The small ones lean on the transformer: their decoder sees 4×4 patches, or has one stage of convolutions around it, with
z_0 added token by token. It learns to use the latent within some hundred steps, before the prior can squeeze it out; a
small convolutional U-Net does not (see the README on posterior collapse).

What `PAPER` adds to what the paper states (heads of 64, MLP ratio 4, the medium base, the video's steps, the widths
of the text-to-image bases) is ours: the list is in ulx/README.md, sizes and FLOPs in benchmarks/results/.
"""

import dataclasses

from ulx.models import ModelConfig
from ulx.nn.encoder import EncoderConfig
from ulx.nn.grid import PerAxis, PerStep
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViTConfig

__all__ = ["MODELS", "PAPER", "PaperPreset"]


def _plain(width: int, blocks: int, patch: PerAxis = 1, **block) -> UViTConfig:
    return UViTConfig(patch=patch, channels=(width,), blocks=(blocks,), block=BlockConfig(**block))


def _convolved(
    width: int, blocks: int, outside: int, patch: PerAxis, down: PerStep = ((1, 2, 2),), **block
) -> UViTConfig:
    """One convolution stage, of so many channels, around a transformer on half of its positions each way: by default of
    clips, on all of their steps of time."""
    return UViTConfig(
        patch=patch,
        conv_channels=(outside,),
        conv_blocks=1,
        channels=(width,),
        blocks=(blocks,),
        down=down,
        block=BlockConfig(**block),
    )


def _base(
    width: int, blocks: tuple[int, int] = (6, 16), down: PerStep = 2, dropout: float = 0.1, **block
) -> UViTConfig:
    """The paper's two-level ViT: the inner level is twice as wide on a coarser grid."""
    config = BlockConfig(dropout=dropout, **block)
    return UViTConfig(patch=1, channels=(width, 2 * width), blocks=blocks, down=down, block=config)


MODELS: dict[str, ModelConfig] = {
    # 32 px: 8×8×8 latents, 64 tokens everywhere. Those that are trained for long keep activations.
    "smoke": ModelConfig(
        encoder=EncoderConfig(channels=(32, 64), blocks=1, last_blocks=1, chroma_gain=4.0),
        prior=_plain(64, 2),
        decoder=_plain(128, 2, patch=4),
        base=_plain(64, 2),
        logsnr_1=-7.0,
    ),
    "tiny": ModelConfig(
        encoder=EncoderConfig(channels=(64, 128), blocks=1, last_blocks=1, chroma_gain=4.0),
        prior=_plain(192, 2, remat="none"),
        decoder=_plain(192, 6, patch=4, remat="none"),
        base=_plain(192, 4, remat="none"),
        logsnr_1=-7.0,
    ),
    # Clips of 16 frames of 32×32: 8×8×8×8 latents, as many tokens in the decoder. The paper's 4×8×8 would leave 4×4
    # positions for sprites of 14 pixels, which then come back as patches of colour. The base model keeps all steps of
    # time on both levels. Positions are rotary: with learned ones alone every motion has to be learned at every place.
    # In the larger one convolutions stand outside: patches of 4×4 pixels that do not know their neighbours' show seams,
    # and a base model learns motion in fewer steps by them (benchmarks/README.md).
    "video-smoke": ModelConfig(
        encoder=EncoderConfig(patch=(2, 4, 4), channels=(32,), last_blocks=1, chroma_gain=4.0),
        prior=_plain(64, 1, rotary=True),
        decoder=_plain(64, 2, patch=(2, 4, 4), rotary=True),
        base=_base(64, (2, 1), down=((1, 2, 2),), dropout=0.0, rotary=True),
        logsnr_1=-7.0,
        given_frames=5,
    ),
    "video-tiny": ModelConfig(
        encoder=EncoderConfig(patch=(2, 4, 4), channels=(96,), last_blocks=1, chroma_gain=4.0),
        prior=_plain(128, 2, rotary=True, remat="none"),
        decoder=_convolved(192, 5, 48, patch=(2, 2, 2), rotary=True, remat="none"),
        base=_convolved(256, 4, 96, patch=1, rotary=True, remat="none"),
        logsnr_1=-7.0,
        given_frames=5,
    ),
    # Clips of 16 frames of 64×64: 4×8×8×16 latents, 4×8×8 down as in the paper, so that sprites of 28 pixels have the
    # positions that those of 14 have above. A convolution stage between pixels and tokens: patches of 8×8 would show.
    "video-small": ModelConfig(
        encoder=EncoderConfig(patch=(2, 4, 4), channels=(96, 192), last_blocks=1, latent_channels=16, chroma_gain=4.0),
        prior=_plain(256, 4, rotary=True),
        decoder=_convolved(256, 8, 96, patch=(2, 4, 4), rotary=True),
        base=_plain(256, 10, rotary=True),
        logsnr_1=-7.0,
        given_frames=5,
    ),
    # 64 px at the price of 32: 8×8×16 latents and 64 tokens there too. A convolution stage between pixels and the
    # decoder's tokens: patches would show, and a decoder of 4×4 patches, 256 tokens, uses the latent too late.
    "tiny64": ModelConfig(
        encoder=EncoderConfig(channels=(32, 64, 128), blocks=1, last_blocks=1, latent_channels=16, chroma_gain=4.0),
        prior=_plain(192, 2, remat="none"),
        decoder=_convolved(192, 6, 64, patch=4, down=2, remat="none"),
        base=_plain(192, 4, remat="none"),
        logsnr_1=-7.0,
    ),
    # 64 px: 16×16×8 latents, 256 tokens; the base has the paper's two levels.
    "small": ModelConfig(
        encoder=EncoderConfig(channels=(64, 128), blocks=2, last_blocks=3, chroma_gain=4.0),
        prior=_plain(256, 6),
        decoder=_plain(256, 8, patch=4),
        base=UViTConfig(patch=1, channels=(192, 384), blocks=(4, 8), block=BlockConfig(dropout=0.1)),
        logsnr_1=-7.0,
    ),
}


@dataclasses.dataclass(frozen=True)
class PaperPreset:
    """The networks of one of the paper's experiments and what they are built for."""

    model: ModelConfig
    shape: tuple[int, ...]
    """Of one example, `h w c` or `t h w c`."""
    num_classes: int = 0
    """Classes that the base model is conditioned on."""
    paper_base_gflops: float | None = None
    """Forward GFLOPs of the base model that the paper names."""


_DROPOUT = BlockConfig(dropout=0.1)

# 512×512 pixels, 32×32×32 latents; the base sees 32×32 and 16×16 tokens.
_IMAGES = ModelConfig(
    encoder=EncoderConfig(channels=(128, 256, 512, 512), blocks=2, last_blocks=3, latent_channels=32),
    prior=_plain(1024, 8),
    decoder=UViTConfig(
        patch=2, conv_channels=(128, 256, 512), conv_blocks=2, channels=(1024,), blocks=(8,), block=_DROPOUT
    ),
    base=_base(512),
)

# 16 frames of 128×128 pixels, as many as 512×512, and 4×16×16×32 latents. The images' stages with kernels over time;
# frames are halved in the two inner steps. The base sees 4×16×16 and 4×8×8 tokens, all frames at once.
_VIDEO_STEPS = ((1, 2, 2), (2, 2, 2), (2, 1, 1))
_VIDEO = ModelConfig(
    encoder=dataclasses.replace(_IMAGES.encoder, patch=(1, 2, 2), down=_VIDEO_STEPS),
    prior=_IMAGES.prior,
    decoder=dataclasses.replace(_IMAGES.decoder, patch=(1, 2, 2), down=_VIDEO_STEPS),
    base=_base(512, down=((1, 2, 2),)),
    given_frames=5,
)

PAPER: dict[str, PaperPreset] = {
    "imagenet512-small": PaperPreset(_IMAGES, (512, 512, 3), 1000),
    "imagenet512-medium": PaperPreset(dataclasses.replace(_IMAGES, base=_base(768)), (512, 512, 3), 1000),
    "kinetics600-small": PaperPreset(_VIDEO, (16, 128, 128, 3)),
    "kinetics600-medium": PaperPreset(
        dataclasses.replace(_VIDEO, base=_base(768, down=((1, 2, 2),))), (16, 128, 128, 3)
    ),
    "text-to-image-100": PaperPreset(
        dataclasses.replace(_IMAGES, base=_base(384, (6, 18))), (512, 512, 3), paper_base_gflops=100
    ),
    "text-to-image-300": PaperPreset(
        dataclasses.replace(_IMAGES, base=_base(704)), (512, 512, 3), paper_base_gflops=300
    ),
    "text-to-image-970": PaperPreset(
        dataclasses.replace(_IMAGES, base=_base(1280, (6, 17))), (512, 512, 3), paper_base_gflops=970
    ),
}
