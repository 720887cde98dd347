"""The encoder: patches, then a ResNet down to the latent grid. Deterministic: it returns z_clean."""

import dataclasses
import math

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from ulx.nn.grid import Down, PerAxis, PerStep, check_factors, factors, patchify, reduction, shrunk
from ulx.nn.layers import GroupNorm, Linear
from ulx.nn.resnet import ResBlock

__all__ = ["Encoder", "EncoderConfig"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    patch: PerAxis = 2
    """Pixels per patch and axis, taken into channels before the first stage."""
    channels: tuple[int, ...] = (64, 128)
    """Widths of the stages; between two stages the grid shrinks."""
    down: PerStep = 2
    """By how much: a number, or one entry per step, each one number or one per axis."""
    blocks: int = 2
    """Residual blocks of each stage but the last."""
    last_blocks: int = 3
    """Residual blocks of the last stage."""
    latent_channels: int = 8

    def __post_init__(self):
        if not self.channels or min(self.latent_channels, *self.channels) < 1:
            raise ValueError(f"an encoder needs at least one stage and positive sizes, got {self}")
        check_factors(self.patch, self.down, self.steps)

    @property
    def steps(self) -> int:
        """How often the grid shrinks after the patches."""
        return len(self.channels) - 1

    def reduction(self, rank: int) -> tuple[int, ...]:
        """Pixels, per axis, under one latent position."""
        return reduction(self.patch, self.down, self.steps, rank)


class Encoder(eqx.Module):
    """x -> z_clean: `b *space c` -> `b *latent k`, the axes smaller by `config.reduction(rank)`."""

    project_in: Linear
    stages: list[list[ResBlock]]
    downs: list[Down]
    norm: GroupNorm
    project_out: Linear
    shape: tuple[int, ...] = eqx.field(static=True)
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, shape: tuple[int, ...], config: EncoderConfig, *, key: Key[Array, ""]):
        """`shape` is that of one image, `(*space, c)`."""
        *space, channels = shape
        rank = len(space)
        total = config.reduction(rank)
        if any(size % factor for size, factor in zip(space, total, strict=True)):
            raise ValueError(f"the encoder reduces its grid by {total}, which does not divide {tuple(space)}")
        patch, *downs = factors(config.patch, config.down, config.steps, rank)
        depths = [config.blocks] * (len(config.channels) - 1) + [config.last_blocks]
        keys = iter(jax.random.split(key, 2 + sum(depths) + len(depths)))
        self.shape, self.config = tuple(shape), config
        self.project_in = Linear(math.prod(patch) * channels, config.channels[0], key=next(keys))
        self.stages = [
            [ResBlock(rank, width, width, key=next(keys)) for _ in range(depth)]
            for width, depth in zip(config.channels, depths, strict=True)
        ]
        self.downs = [
            Down(factor, width, inner, key=next(keys))
            for factor, width, inner in zip(downs, config.channels, config.channels[1:], strict=False)
        ]
        self.norm = GroupNorm(config.channels[-1])
        self.project_out = Linear(config.channels[-1], config.latent_channels, key=next(keys))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        space = self.shape[:-1]
        return (*shrunk(space, self.config.reduction(len(space))), self.config.latent_channels)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *latent k"]:
        if x.shape[1:] != self.shape:
            raise ValueError(f"this encoder was built for images of shape {self.shape}, got {x.shape[1:]}")
        x = self.project_in(patchify(x.astype(self.project_in.weight.dtype), self.config.patch))
        for index, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x)
            if index < len(self.downs):
                x = self.downs[index](x)
        return self.project_out(jax.nn.silu(self.norm(x)))
