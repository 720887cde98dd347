"""The encoder: patches, then a ResNet down to the latent grid. Deterministic: it returns z_clean."""

import dataclasses

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from ulx.nn.layers import GroupNorm, Linear, patchify
from ulx.nn.resnet import ResBlock
from ulx.nn.uvit import Down

__all__ = ["Encoder", "EncoderConfig"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    patch: int = 2
    """Pixels per patch and axis, taken into channels before the first stage."""
    channels: tuple[int, ...] = (64, 128)
    """Widths of the stages; between two stages the grid is halved."""
    blocks: int = 2
    """Residual blocks of each stage that ends in a halving."""
    last_blocks: int = 3
    """Residual blocks of the last stage."""
    latent_channels: int = 8

    def __post_init__(self):
        if not self.channels or min(self.patch, self.latent_channels, *self.channels) < 1:
            raise ValueError(f"an encoder needs at least one stage and positive sizes, got {self}")

    @property
    def reduction(self) -> int:
        """Pixels per latent position and axis."""
        return self.patch * 2 ** (len(self.channels) - 1)


class Encoder(eqx.Module):
    """x -> z_clean: `b *space c` -> `b *latent k`, each axis smaller by `config.reduction`."""

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
        if any(size % config.reduction for size in space):
            raise ValueError(
                f"the encoder reduces each axis by {config.reduction}, which does not divide {tuple(space)}"
            )
        depths = [config.blocks] * (len(config.channels) - 1) + [config.last_blocks]
        keys = iter(jax.random.split(key, 2 + sum(depths) + len(depths)))
        self.shape, self.config = tuple(shape), config
        self.project_in = Linear(config.patch**rank * channels, config.channels[0], key=next(keys))
        self.stages = [
            [ResBlock(rank, width, width, key=next(keys)) for _ in range(depth)]
            for width, depth in zip(config.channels, depths, strict=True)
        ]
        self.downs = [
            Down(rank, width, inner, key=next(keys))
            for width, inner in zip(config.channels, config.channels[1:], strict=False)
        ]
        self.norm = GroupNorm(config.channels[-1])
        self.project_out = Linear(config.channels[-1], config.latent_channels, key=next(keys))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (*(size // self.config.reduction for size in self.shape[:-1]), self.config.latent_channels)

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
