"""UViT: convolution stages outside, transformer levels inside; with no convolution stages it is a plain ViT.

One network serves as the prior (one transformer level), the base (two levels) and the decoder (convolution stages
around one level, conditioned on z_0): they differ by their `UViTConfig`.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx.diffusion import per_example_keys, split_keys
from ulx.nn.conditions import NO_LABEL, Conditions, ConditionSpec, Text, TextInput
from ulx.nn.grid import (
    Down,
    PerAxis,
    PerStep,
    Up,
    check_factors,
    factors,
    fit_grid,
    patchify,
    reduction,
    shrunk,
    unpatchify,
)
from ulx.nn.layers import Linear, LogSNREmbedding, draw, layer_norm
from ulx.nn.resnet import ResBlock
from ulx.nn.transformer import BlockConfig, Stack
from ulx.typing import Keys, PerExample

__all__ = ["UViT", "UViTConfig"]


@dataclasses.dataclass(frozen=True)
class UViTConfig:
    patch: PerAxis = 2
    """Pixels (or latent positions) per patch and axis, taken into channels before anything else."""
    conv_channels: tuple[int, ...] = ()
    """Widths of the convolution stages, outermost first; after each the grid shrinks. Empty: a plain ViT."""
    conv_blocks: int = 2
    """Residual blocks of a convolution stage, on the way down and again on the way up."""
    channels: tuple[int, ...] = (192,)
    """Widths of the transformer levels, outermost first; after each but the last the grid shrinks."""
    blocks: tuple[int, ...] = (6,)
    """Transformer blocks per level. An outer level runs half of them on the way down and half on the way up."""
    down: PerStep = 2
    """By how much the grid shrinks between stages and levels: a number, or one entry per step, each one number or one
    per axis."""
    block: BlockConfig = BlockConfig()

    def __post_init__(self):
        if len(self.channels) != len(self.blocks) or not self.channels:
            raise ValueError(f"channels={self.channels} and blocks={self.blocks} need one entry per level")
        if any(blocks < 2 for blocks in self.blocks[:-1]):
            raise ValueError(f"an outer level runs blocks down and up, so at least 2; got blocks={self.blocks}")
        check_factors(self.patch, self.down, self.steps)

    @property
    def steps(self) -> int:
        """How often the grid shrinks after the patches."""
        return len(self.conv_channels) + len(self.channels) - 1

    def reduction(self, rank: int) -> tuple[int, ...]:
        """Input positions, per axis, under one position of the innermost grid."""
        return reduction(self.patch, self.down, self.steps, rank)


class ConvStage(eqx.Module):
    """One level of the U made of convolutions: its blocks down, the step in, and the mirror image."""

    before: list[ResBlock]
    down: Down
    up: Up
    after: list[ResBlock]

    def __init__(
        self,
        factor: tuple[int, ...],
        width: int,
        inner: int,
        *,
        blocks: int,
        cond_size: int,
        dropout: float,
        key: Key[Array, ""],
    ):
        keys = iter(jax.random.split(key, 2 * blocks + 2))
        make = lambda: ResBlock(len(factor), width, width, cond_size=cond_size, dropout=dropout, key=next(keys))  # noqa: E731
        self.before = [make() for _ in range(blocks)]
        self.down = Down(factor, width, inner, key=next(keys))
        self.up = Up(factor, inner, width, key=next(keys))
        self.after = [make() for _ in range(blocks)]

    def go_in(self, x: Float[Array, "b *space c"], cond: Float[Array, "b k"], key, text) -> Float[Array, "b *space c"]:
        return self._run(self.before, x, cond, key)

    def go_out(self, x: Float[Array, "b *space c"], cond: Float[Array, "b k"], key, text) -> Float[Array, "b *space c"]:
        return self._run(self.after, x, cond, key)

    @staticmethod
    def _run(blocks: list[ResBlock], x, cond, key):
        for block, block_key in zip(blocks, _keys(key, len(blocks)), strict=True):
            x = block(x, cond, block_key)
        return x


class TransformerStage(eqx.Module):
    """One outer level of the U made of transformer blocks."""

    position: Float[Array, "*grid c"]
    before: Stack
    down: Down
    up: Up
    after: Stack

    def __init__(
        self,
        grid: tuple[int, ...],
        factor: tuple[int, ...],
        width: int,
        inner: int,
        depth: int,
        config: BlockConfig,
        *,
        cond_size: int,
        text_size: int,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 5)
        sizes = {"cond_size": cond_size, "text_size": text_size}
        self.position = draw(keys[0], (*grid, width), 0.02)
        self.before = Stack(depth - depth // 2, width, config, **sizes, key=keys[1])
        self.down = Down(factor, width, inner, key=keys[2])
        self.up = Up(factor, inner, width, key=keys[3])
        self.after = Stack(depth // 2, width, config, **sizes, key=keys[4])

    def go_in(
        self, x: Float[Array, "b *grid c"], cond: Float[Array, "b k"], key, text: Text | None
    ) -> Float[Array, "b *grid c"]:
        return self.before(x + self.position, cond, key, text)

    def go_out(
        self, x: Float[Array, "b *grid c"], cond: Float[Array, "b k"], key, text: Text | None
    ) -> Float[Array, "b *grid c"]:
        return self.after(x, cond, key, text)


class UViT(eqx.Module):
    """`network(z_t, logsnr, conditions, context=…, key=…)` -> a prediction (x, ε or v) in the shape of z_t.

    The skip connections are sums. `context` (the decoder's z_0) is brought to the outermost transformer grid, patches
    to channels where it is finer and repeated where it is coarser, and added token by token through a linear layer.

    Of the `conditions`, given frames are brought to the grid of the outermost patches and added before anything else,
    as if they were more channels of z_t: to every step of time its own, and those of all steps at its place, so that
    how something moved there need not be gathered by attention first. Without them, none is given. λ, the class and
    the mean of a caption's tokens modulate every block; every transformer block also attends to these tokens.
    """

    project_in: Linear
    logsnr: LogSNREmbedding
    labels: Float[Array, "labels k"] | None
    """Of the classes, and last that of no class."""
    text: TextInput | None
    context: Linear | None
    context_logsnr: LogSNREmbedding | None
    frames: Linear | None
    history: Linear | None
    """Of the given frames of all steps of time."""
    stages: list[ConvStage | TransformerStage]
    position: Float[Array, "*grid c"]
    middle: Stack
    modulation: Linear
    project_out: Linear
    shape: tuple[int, ...] = eqx.field(static=True)
    config: UViTConfig = eqx.field(static=True)
    conditions: ConditionSpec = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        config: UViTConfig,
        *,
        context_shape: tuple[int, ...] | None = None,
        context_logsnr: bool = False,
        conditions: ConditionSpec = ConditionSpec(),
        key: Key[Array, ""],
    ):
        """`shape` is that of one z_t, `(*space, c)`; `context_shape` that of one context, or None for none.

        With `context_logsnr` the network is told how noisy its context is.
        """
        *space, channels = shape
        rank = len(space)
        total = config.reduction(rank)
        if any(size % factor for size, factor in zip(space, total, strict=True)):
            raise ValueError(
                f"the network reduces its grid by {total}, which does not divide {tuple(space)}: "
                f"change the resolution, patch={config.patch}, down={config.down} or the number of stages"
            )
        # Parts that a network may lack have the last ones, so that the others' do not depend on them.
        count = 20 + len(config.conv_channels) + len(config.channels)
        *others, text_key, frames_key, history_key, context_key = jax.random.split(key, count)
        keys = iter(others)
        widths = (*config.conv_channels, *config.channels)
        cond_size = config.channels[-1]
        patch, *downs = factors(config.patch, config.down, config.steps, rank)
        grid = shrunk(tuple(space), patch)
        text_size = cond_size if conditions.text_channels else 0
        self.shape, self.config, self.conditions = tuple(shape), config, conditions
        self.project_in = Linear(math.prod(patch) * channels, widths[0], key=next(keys))
        self.logsnr = LogSNREmbedding(cond_size, key=next(keys))
        classes = conditions.num_classes
        self.labels = draw(next(keys), (classes + 1, cond_size), 0.02) if classes else None
        self.text = None
        if text_size:
            channels_of_text = conditions.text_channels
            self.text = TextInput(channels_of_text, text_size, cond_size, key=text_key)
        self.frames = self.history = None
        if conditions.frames_shape is not None:
            size = _fitted(conditions.frames_shape, grid)
            self.frames = Linear(size, widths[0], key=frames_key)
            self.history = Linear(grid[0] * size, widths[0], bias=False, key=history_key)
        self.stages = []
        conv_downs, vit_downs = downs[: len(config.conv_channels)], downs[len(config.conv_channels) :]
        for factor, width, inner in zip(conv_downs, config.conv_channels, widths[1:], strict=False):
            self.stages.append(
                ConvStage(
                    factor,
                    width,
                    inner,
                    blocks=config.conv_blocks,
                    cond_size=cond_size,
                    dropout=config.block.dropout,
                    key=next(keys),
                )
            )
            grid = shrunk(grid, factor)
        self.context_logsnr = None
        if context_logsnr:
            self.context_logsnr = LogSNREmbedding(cond_size, key=context_key)
        self.context = None
        if context_shape is not None:
            self.context = Linear(_fitted(context_shape, grid), config.channels[0], key=next(keys))
        levels = zip(vit_downs, config.channels, config.channels[1:], config.blocks, strict=False)
        for factor, width, inner, depth in levels:
            self.stages.append(
                TransformerStage(
                    grid,
                    factor,
                    width,
                    inner,
                    depth,
                    config.block,
                    cond_size=cond_size,
                    text_size=text_size,
                    key=next(keys),
                )
            )
            grid = shrunk(grid, factor)
        self.position = draw(next(keys), (*grid, config.channels[-1]), 0.02)
        sizes = {"cond_size": cond_size, "text_size": text_size}
        self.middle = Stack(config.blocks[-1], config.channels[-1], config.block, **sizes, key=next(keys))
        self.modulation = Linear(cond_size, 2 * widths[0], gain=0.0, key=next(keys))
        self.project_out = Linear(widths[0], math.prod(patch) * channels, gain=0.0, key=next(keys))

    def __call__(
        self,
        z_t: Float[Array, "b *space c"],
        logsnr: PerExample,
        conditions: Conditions = Conditions(),
        *,
        context: Float[Array, "b *latent k"] | None = None,
        context_logsnr: PerExample | None = None,
        key: Keys | None = None,
    ) -> Float[Array, "b *space c"]:
        conditions.check(self.conditions)
        if z_t.shape[1:] != self.shape:
            raise ValueError(f"this network was built for inputs of shape {self.shape}, got {z_t.shape[1:]}")
        if (context is None) != (self.context is None):
            raise ValueError("this network " + ("needs a context" if context is None else "takes no context"))
        if (context_logsnr is None) != (self.context_logsnr is None):
            told = "needs its context's log-SNR" if context_logsnr is None else "is not told its context's log-SNR"
            raise ValueError(f"this network {told}")
        dtype = self.project_in.weight.dtype
        cond = self.logsnr(logsnr)
        if self.context_logsnr is not None and context_logsnr is not None:
            cond = cond + self.context_logsnr(context_logsnr)
        if self.labels is not None:
            label = jnp.full(z_t.shape[0], NO_LABEL) if conditions.label is None else conditions.label
            cond = cond + self.labels[jnp.where(label == NO_LABEL, self.conditions.num_classes, label)]
        text = None
        if self.text is not None:
            text, pooled = self.text(conditions.text, z_t.shape[0])
            cond = cond + pooled
        if key is not None:
            key = per_example_keys(key, z_t.shape[0])
        keys = iter(_keys(key, 2 * len(self.stages) + 1))

        x = self.project_in(patchify(z_t.astype(dtype), self.config.patch))
        if self.frames is not None and self.history is not None and self.conditions.frames_shape is not None:
            given = conditions.frames
            if given is None:
                given = jnp.zeros((x.shape[0], *self.conditions.frames_shape))
            given = fit_grid(given.astype(dtype), x.shape[1:-1])
            x = x + self.frames(given) + self.history(patchify(given, (given.shape[1], 1, 1)))
        skips = []
        for index, stage in enumerate(self.stages):
            if index == len(self.config.conv_channels):
                x = self._add_context(x, context)
            x = stage.go_in(x, cond, next(keys), text)
            skips.append(x)
            x = stage.down(x)
        if len(self.config.channels) == 1:
            x = self._add_context(x, context)
        x = self.middle(x + self.position, cond, next(keys), text)
        for stage in reversed(self.stages):
            x = stage.go_out(skips.pop() + stage.up(x), cond, next(keys), text)
        scale, shift = jnp.split(
            self.modulation(jax.nn.silu(cond)).reshape(x.shape[0], *(1,) * (x.ndim - 2), -1), 2, axis=-1
        )
        return unpatchify(self.project_out(layer_norm(x) * (1 + scale) + shift), self.config.patch)

    def _add_context(self, x: Float[Array, "b *grid c"], context: Array | None) -> Float[Array, "b *grid c"]:
        if self.context is None or context is None:
            return x
        return x + self.context(fit_grid(context.astype(x.dtype), x.shape[1:-1]))


def _fitted(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """Channels of an array of `shape` when it is brought to `grid`."""
    array = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda value: fit_grid(value, grid), array).shape[-1]


def _keys(key: Key[Array, " b"] | None, num: int) -> tuple[Key[Array, " b"] | None, ...]:
    return (None,) * num if key is None else split_keys(key, num)
