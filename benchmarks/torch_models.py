"""The networks of Unified Latents written in PyTorch, to compare speed with equal work; torch_training trains them.

Modules and parameters are named as in `ulx.nn`, so that `copy_weights` finds them; the weights' layouts are PyTorch's
own. Written as one would write for PyTorch: its fused attention, layer, RMS and group norms, convolutions in
channels-last memory. Example by example the same numbers come out (tests/test_torch_models.py).
"""

import math
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from ulx.config import Config
from ulx.frames import given_shape
from ulx.nn import rotary
from ulx.nn.encoder import EncoderConfig
from ulx.nn.grid import factors, per_axis, shrunk
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViTConfig

__all__ = ["Autoencoder", "UViT", "base_of", "copy_autoencoder", "copy_weights", "for_device"]


class Stack(nn.Module):
    """Transformer blocks modulated by a conditioning vector."""

    def __init__(self, depth: int, channels: int, config: BlockConfig, cond_size: int, grid: tuple[int, ...]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, config, cond_size) for _ in range(depth))
        turns = torch.zeros(0)
        if config.rotary:
            turns = torch.from_numpy(rotary.angles(grid, config.head_size))
        self.register_buffer("cosine", turns.cos()[:, None], persistent=False)
        self.register_buffer("sine", turns.sin()[:, None], persistent=False)
        self.rotary = config.rotary

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        tokens, cond = x.flatten(1, -2), F.silu(cond)
        turns = (self.cosine, self.sine) if self.rotary else None
        for block in self.blocks:
            tokens = block(tokens, cond, turns)
        return tokens.view(x.shape)


class Block(nn.Module):
    def __init__(self, channels: int, config: BlockConfig, cond_size: int):
        super().__init__()
        self.modulation = nn.Linear(cond_size, 6 * channels)
        self.attention = Attention(channels, config.head_size)
        self.up = nn.Linear(channels, config.mlp_ratio * channels)
        self.down = nn.Linear(config.mlp_ratio * channels, channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cond: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(cond)[:, None].chunk(6, -1)
        x = x + gate_1 * self.attention(layer_norm(x) * (1 + scale_1) + shift_1, turns)
        hidden = F.gelu(self.up(layer_norm(x) * (1 + scale_2) + shift_2), approximate="tanh")
        return x + gate_2 * self.down(self.dropout(hidden))


class Attention(nn.Module):
    def __init__(self, channels: int, head_size: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.query_scale = nn.Parameter(torch.ones(head_size))
        self.key_scale = nn.Parameter(torch.ones(head_size))
        self.heads = channels // head_size

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query = F.rms_norm(query, query.shape[-1:], self.query_scale, 1e-6)
        key = F.rms_norm(key, key.shape[-1:], self.key_scale, 1e-6)
        if turns is not None:
            query, key = rotate(query, *turns), rotate(key, *turns)
        heads = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.out(heads.transpose(1, 2).flatten(-2))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Conv(nn.Module):
    """3×3 or 3×3×3, on `b *space c`: a view of PyTorch's channels-last memory."""

    def __init__(self, rank: int, in_size: int, out_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, *(3,) * rank))
        self.bias = nn.Parameter(torch.zeros(out_size))
        self.convolve = F.conv2d if rank == 2 else F.conv3d

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x.movedim(-1, 1), self.weight, self.bias, padding=1).movedim(1, -1)


class GroupNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.shape[-1] // 16
        return F.group_norm(x.movedim(-1, 1), groups, self.scale, self.shift, 1e-6).movedim(1, -1)


class ResBlock(nn.Module):
    def __init__(self, rank: int, channels: int, cond_size: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.norm_1, self.norm_2 = GroupNorm(channels), GroupNorm(channels)
        self.conv_1, self.conv_2 = Conv(rank, channels, channels), Conv(rank, channels, channels)
        self.modulation = None if cond_size is None else nn.Linear(cond_size, 2 * channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        hidden = self.norm_2(self.conv_1(F.silu(self.norm_1(x))))
        if self.modulation is not None and cond is not None:
            scale, shift = over_space(self.modulation(F.silu(cond)), x).chunk(2, -1)
            hidden = hidden * (1 + scale) + shift
        return x + self.conv_2(self.dropout(F.silu(hidden)))


def over_space(per_example: Tensor, like: Tensor) -> Tensor:
    return per_example.view(per_example.shape[0], *(1,) * (like.ndim - 2), -1)


class Down(nn.Module):
    def __init__(self, factor: tuple[int, ...], in_size: int, out_size: int):
        super().__init__()
        self.project = nn.Linear(math.prod(factor) * in_size, out_size)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.project(patchify(x, self.factor))


class Up(nn.Module):
    def __init__(self, factor: tuple[int, ...], in_size: int, out_size: int):
        super().__init__()
        self.project = nn.Linear(in_size, math.prod(factor) * out_size)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return unpatchify(self.project(x), self.factor)


def patchify(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    rank, grid = len(patch), shrunk(tuple(x.shape[1:-1]), patch)
    pairs = [size for pair in zip(grid, patch, strict=True) for size in pair]
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.reshape(x.shape[0], *pairs, x.shape[-1]).permute(order).reshape(x.shape[0], *grid, -1)


def unpatchify(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    rank, grid = len(patch), x.shape[1:-1]
    order = (0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank)
    space = [size * factor for size, factor in zip(grid, patch, strict=True)]
    return x.reshape(x.shape[0], *grid, *patch, -1).permute(order).reshape(x.shape[0], *space, -1)


def fit_grid(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    x = patchify(x, tuple(max(a // b, 1) for a, b in zip(x.shape[1:-1], grid, strict=True)))
    for axis, size in enumerate(grid, start=1):
        if size != x.shape[axis]:
            x = x.repeat_interleave(size // x.shape[axis], axis)
    return x


def fitted(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
    return fit_grid(torch.empty(1, *shape, device="meta"), grid).shape[-1]


class LogSNREmbedding(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("frequencies", 0.5 * (1 / 32) ** torch.linspace(0, 1, 16), persistent=False)
        self.first, self.second = nn.Linear(32, channels), nn.Linear(channels, channels)

    def forward(self, logsnr: Tensor) -> Tensor:
        angles = logsnr[:, None] * self.frequencies
        return self.second(F.silu(self.first(torch.cat([angles.sin(), angles.cos()], -1) * math.sqrt(2))))


class ConvStage(nn.Module):
    def __init__(self, factor: tuple[int, ...], width: int, inner: int, blocks: int, cond_size: int, dropout: float):
        super().__init__()
        make = lambda: nn.ModuleList(ResBlock(len(factor), width, cond_size, dropout) for _ in range(blocks))  # noqa: E731
        self.before, self.after = make(), make()
        self.down, self.up = Down(factor, width, inner), Up(factor, inner, width)

    def go_in(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.before:
            x = block(x, cond)
        return x

    def go_out(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.after:
            x = block(x, cond)
        return x


class TransformerStage(nn.Module):
    def __init__(
        self,
        grid: tuple[int, ...],
        factor: tuple[int, ...],
        width: int,
        inner: int,
        depth: int,
        config: BlockConfig,
        cond_size: int,
    ):
        super().__init__()
        self.position = nn.Parameter(torch.empty(*grid, width))
        self.before = Stack(depth - depth // 2, width, config, cond_size, grid)
        self.down, self.up = Down(factor, width, inner), Up(factor, inner, width)
        self.after = Stack(depth // 2, width, config, cond_size, grid)

    def go_in(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.before(x + self.position, cond)

    def go_out(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.after(x, cond)


class UViT(nn.Module):
    def __init__(
        self,
        shape: tuple[int, ...],
        config: UViTConfig,
        *,
        context_shape: tuple[int, ...] | None = None,
        frames_shape: tuple[int, ...] | None = None,
        num_classes: int = 0,
    ):
        super().__init__()
        *space, channels = shape
        rank = len(space)
        widths, cond_size = (*config.conv_channels, *config.channels), config.channels[-1]
        self.patch, *downs = factors(config.patch, config.down, config.steps, rank)
        grid = shrunk(tuple(space), self.patch)
        self.config, self.num_classes, self.frames_shape = config, num_classes, frames_shape
        self.project_in = nn.Linear(math.prod(self.patch) * channels, widths[0])
        self.logsnr = LogSNREmbedding(cond_size)
        self.labels = nn.Parameter(torch.empty(num_classes + 1, cond_size)) if num_classes else None
        self.frames = self.history = None
        if frames_shape is not None:
            size = fitted(frames_shape, grid)
            self.frames = nn.Linear(size, widths[0])
            self.history = nn.Linear(grid[0] * size, widths[0], bias=False)
        self.stages = nn.ModuleList()
        number = len(config.conv_channels)
        for factor, width, inner in zip(downs[:number], config.conv_channels, widths[1:], strict=False):
            self.stages.append(ConvStage(factor, width, inner, config.conv_blocks, cond_size, config.block.dropout))
            grid = shrunk(grid, factor)
        self.context = None if context_shape is None else nn.Linear(fitted(context_shape, grid), config.channels[0])
        levels = zip(downs[number:], config.channels, config.channels[1:], config.blocks, strict=False)
        for factor, width, inner, depth in levels:
            self.stages.append(TransformerStage(grid, factor, width, inner, depth, config.block, cond_size))
            grid = shrunk(grid, factor)
        self.position = nn.Parameter(torch.empty(*grid, config.channels[-1]))
        self.middle = Stack(config.blocks[-1], config.channels[-1], config.block, cond_size, grid)
        self.modulation = nn.Linear(cond_size, 2 * widths[0])
        self.project_out = nn.Linear(widths[0], math.prod(self.patch) * channels)

    def forward(
        self,
        z_t: Tensor,
        logsnr: Tensor,
        context: Tensor | None = None,
        label: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        cond = self.logsnr(logsnr)
        if self.labels is not None:
            none = torch.full((z_t.shape[0],), self.num_classes, device=z_t.device)
            cond = cond + self.labels[none if label is None else label]
        x = self.project_in(patchify(z_t, self.patch))
        if self.frames is not None and self.history is not None and self.frames_shape is not None:
            given = z_t.new_zeros(x.shape[0], *self.frames_shape) if frames is None else frames
            given = fit_grid(given, tuple(x.shape[1:-1]))
            x = x + self.frames(given) + self.history(patchify(given, (given.shape[1], 1, 1)))
        skips = []
        for index, stage in enumerate(self.stages):
            if index == len(self.config.conv_channels):
                x = self.add_context(x, context)
            x = stage.go_in(x, cond)
            skips.append(x)
            x = stage.down(x)
        if len(self.config.channels) == 1:
            x = self.add_context(x, context)
        x = self.middle(x + self.position, cond)
        for stage in reversed(self.stages):
            x = stage.go_out(skips.pop() + stage.up(x), cond)
        scale, shift = over_space(self.modulation(F.silu(cond)), x).chunk(2, -1)
        return unpatchify(self.project_out(layer_norm(x) * (1 + scale) + shift), self.patch)

    def add_context(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.context is None or context is None:
            return x
        return x + self.context(fit_grid(context, tuple(x.shape[1:-1])))


class Encoder(nn.Module):
    def __init__(self, shape: tuple[int, ...], config: EncoderConfig):
        super().__init__()
        *space, channels = shape
        rank = len(space)
        patch, *downs = factors(config.patch, config.down, config.steps, rank)
        depths = [config.blocks] * (len(config.channels) - 1) + [config.last_blocks]
        self.patch, self.chroma_gain = per_axis(patch, rank), config.chroma_gain
        self.project_in = nn.Linear(math.prod(patch) * channels, config.channels[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(ResBlock(rank, width) for _ in range(depth))
            for width, depth in zip(config.channels, depths, strict=True)
        )
        steps = zip(downs, config.channels, config.channels[1:], strict=False)
        self.downs = nn.ModuleList(Down(factor, width, inner) for factor, width, inner in steps)
        self.norm = GroupNorm(config.channels[-1])
        self.project_out = nn.Linear(config.channels[-1], config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        grey = x.mean(-1, keepdim=True)
        x = self.project_in(patchify(grey + self.chroma_gain * (x - grey), self.patch))
        for index, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x)
            if index < len(self.downs):
                x = self.downs[index](x)
        return self.project_out(F.silu(self.norm(x)))


class Autoencoder(nn.Module):
    """The networks of stage 1."""

    def __init__(self, config: Config):
        super().__init__()
        shape, model = config.data.shape, config.model
        self.encoder = Encoder(shape, model.encoder)
        latent = (*shrunk(shape[:-1], model.encoder.reduction(len(shape) - 1)), model.encoder.latent_channels)
        self.prior = UViT(latent, model.prior)
        frames_shape = given_shape(shape) if model.given_frames else None
        self.decoder = UViT(shape, model.decoder, context_shape=latent, frames_shape=frames_shape)
        self.latent_shape = latent


def base_of(config: Config, latent_shape: tuple[int, ...], num_classes: int) -> UViT:
    """The network of stage 2."""
    frames_shape = given_shape(config.data.shape) if config.model.given_frames else None
    return UViT(latent_shape, config.model.base, frames_shape=frames_shape, num_classes=num_classes)


def copy_weights(module: nn.Module, tree: Any) -> None:
    """An Equinox module's weights into the PyTorch module of the same fields. Raises ValueError if some are left."""
    wanted = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    done = 0
    with torch.no_grad():
        for parameter, values in _pairs(module, tree):
            parameter.copy_(torch.from_numpy(np.array(values)))
            done += parameter.numel()
    if done != wanted:
        raise ValueError(f"{type(module).__name__} takes {done} numbers, and there are {wanted}")


def copy_autoencoder(module: Autoencoder, model: Any) -> None:
    """The weights of a `ulx.models.UnifiedLatents`, whose prior and decoder are networks with something around."""
    inner = (model.prior.network, model.decoder.denoiser.network)
    copy_weights(module, eqx.tree_at(lambda m: (m.prior, m.decoder), model, inner))


def _pairs(module: nn.Module, tree: Any) -> Iterator[tuple[Tensor, np.ndarray]]:
    if isinstance(module, Stack):
        for index, block in enumerate(module.blocks):
            yield from _pairs(block, jax.tree.map(lambda leaf, i=index: leaf[i], eqx.filter(tree.blocks, eqx.is_array)))
        return
    for name, parameter in module.named_parameters(recurse=False):
        values = np.asarray(getattr(tree, name))
        if name == "weight":
            # (*kernel, in, out) there, (out, in, *kernel) here.
            values = np.moveaxis(values, (-1, -2), (0, 1))
        yield parameter, values
    for name, child in module.named_children():
        inner = tree[int(name)] if isinstance(module, nn.ModuleList) else getattr(tree, name)
        if inner is not None:
            yield from _pairs(child, inner)


def for_device(module: nn.Module, device: str) -> nn.Module:
    """Moved there, with convolutions' weights in channels-last memory."""
    module = module.to(device)
    for conv in module.modules():
        if isinstance(conv, Conv):
            layout = torch.channels_last if conv.weight.ndim == 4 else torch.channels_last_3d
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
    return module
