"""The encoder: patches, then a ResNet down to the latent grid; and the encoder that changes nothing."""

import dataclasses
import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx.nn.grid import Down, PerAxis, PerStep, check_factors, factors, patchify, reduction, shrunk
from ulx.nn.layers import GroupNorm, Linear
from ulx.nn.resnet import ResBlock
from ulx.posterior import Posterior

__all__ = ["Encoder", "EncoderConfig", "Pixels"]

FIRST_LOG_STD = -3.0
"""log σ_E of an untrained encoder of variance: as a guess, a little less than the noise of z_0 at λ_z(0) = 5."""


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
    chroma_gain: float = 1.0
    """By how much colour is amplified against grey before the first layer. Colour differences are small beside
    differences in brightness, so that a short training would learn to code the latter alone."""
    variance: Literal["none", "learned"] = "none"
    """"learned": the encoder predicts a standard deviation beside the mean, and its latent is a sample (Tab. 6, D)."""

    def __post_init__(self):
        if not self.chroma_gain > 0:
            raise ValueError(f"chroma_gain must be positive, got {self.chroma_gain}")
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
    """x -> z_clean: `b *space c` -> `b *latent k`, the axes smaller by `config.reduction(rank)`.

    With `variance="learned"` a call returns the mean, and `posterior` both.
    """

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
        outputs = config.latent_channels * (2 if config.variance == "learned" else 1)
        self.project_out = Linear(config.channels[-1], outputs, key=next(keys))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        space = self.shape[:-1]
        return (*shrunk(space, self.config.reduction(len(space))), self.config.latent_channels)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *latent k"]:
        return self._outputs(x)[..., : self.config.latent_channels]

    def posterior(self, x: Float[Array, "b *space c"]) -> Posterior:
        """z_clean, or its mean and standard deviation, in float32."""
        outputs = self._outputs(x).astype(jnp.float32)
        if self.config.variance == "none":
            return Posterior(outputs)
        mean, log_std = jnp.split(outputs, 2, axis=-1)
        return Posterior(mean, jnp.exp(jnp.clip(log_std + FIRST_LOG_STD, -10.0, 3.0)))

    def _outputs(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *latent _"]:
        if x.shape[1:] != self.shape:
            raise ValueError(f"this encoder was built for images of shape {self.shape}, got {x.shape[1:]}")
        if self.config.chroma_gain != 1:
            grey = x.mean(axis=-1, keepdims=True)
            x = grey + self.config.chroma_gain * (x - grey)
        x = self.project_in(patchify(x.astype(self.project_in.weight.dtype), self.config.patch))
        for index, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x)
            if index < len(self.downs):
                x = self.downs[index](x)
        return self.project_out(jax.nn.silu(self.norm(x)))


class Pixels(eqx.Module):
    """The encoder of pixel diffusion: z_clean = x."""

    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.shape

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        if x.shape[1:] != self.shape:
            raise ValueError(f"this model was built for images of shape {self.shape}, got {x.shape[1:]}")
        return x

    def posterior(self, x: Float[Array, "b *space c"]) -> Posterior:
        return Posterior(self(x).astype(jnp.float32))
