"""Transformer blocks modulated by a conditioning vector (adaLN-zero), and a stack of them under `lax.scan`."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ulx.diffusion import split_keys
from ulx.nn import rotary
from ulx.nn.attention import attend
from ulx.nn.conditions import Text
from ulx.nn.layers import Dropout, Linear, layer_norm, rms_norm
from ulx.nn.split import whole

__all__ = ["Block", "BlockConfig", "Remat", "Stack"]

Remat = Literal["none", "block"]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    head_size: int = 64
    """Channels per attention head."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP per channel."""
    dropout: float = 0.0
    rotary: bool = False
    """Turn queries and keys by their tokens' places on the grid, beside the learned positions: attention then sees how
    tokens lie to each other, which is what motion is (`ulx.nn.rotary`)."""
    remat: Remat = "block"
    """Recompute each block's activations in the backward pass, so that memory holds one block's at a time ("block"); or
    keep them, and compile each block by itself ("none"): on a CPU a step takes 0.81 to 0.97 times as long
    (benchmarks/README.md), with up to three times the memory and half again the compile time."""


class Attention(eqx.Module):
    """Multi-head self-attention with QK-norm (an RMS norm with a learned scale on each query and key), in a network
    that is given captions also to the caption's tokens, as further keys and values.

    One softmax for both, as in Imagen's U-Nets: a caption costs the keys and values of its tokens, and no queries and
    outputs of its own.
    """

    qkv: Linear
    text: Linear | None
    """Keys and values of a caption's tokens."""
    out: Linear
    query_scale: Float[Array, " head"]
    key_scale: Float[Array, " head"]
    heads: int = eqx.field(static=True)

    def __init__(self, channels: int, head_size: int, *, text_size: int = 0, key: Key[Array, ""]):
        if channels % head_size:
            raise ValueError(f"channels={channels} is not a multiple of head_size={head_size}")
        qkv, out, of_text = jax.random.split(key, 3)
        self.qkv = Linear(channels, 3 * channels, bias=False, key=qkv)
        self.text = None
        if text_size:
            self.text = Linear(text_size, 2 * channels, bias=False, key=of_text)
        self.out = Linear(channels, channels, key=out)
        self.query_scale = jnp.ones(head_size)
        self.key_scale = jnp.ones(head_size)
        self.heads = channels // head_size

    def __call__(
        self,
        x: Float[Array, "b n c"],
        angles: Float[np.ndarray, "n pairs"] | None = None,
        text: Text | None = None,
    ) -> Float[Array, "b n c"]:
        """With `angles` queries and keys of the grid are turned by them."""
        query, key, value = (self._by_heads(part) for part in jnp.split(self.qkv(x), 3, axis=-1))
        query, key = rms_norm(query, self.query_scale), rms_norm(key, self.key_scale)
        if angles is not None:
            query, key = rotary.rotate(query, angles), rotary.rotate(key, angles)
        mask = None
        if self.text is not None and text is not None:
            key_of_text, value_of_text = map(self._by_heads, jnp.split(self.text(text.tokens), 2, axis=-1))
            key = jnp.concatenate([key, rms_norm(key_of_text, self.key_scale)], axis=1)
            value = jnp.concatenate([value, value_of_text], axis=1)
            mask = jnp.concatenate([jnp.ones(x.shape[:2], bool), text.mask], axis=1)
        return self.out(attend(query, key, value, mask).reshape(x.shape))

    def _by_heads(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class Block(eqx.Module):
    """x + g₁ · attention(mod₁(norm x)), then x + g₂ · mlp(mod₂(norm x)); mod and g are linear in the conditioning.

    The gates start at zero, so that a new block is the identity (DiT's adaLN-zero).
    """

    modulation: Linear
    attention: Attention
    up: Linear
    down: Linear
    dropout: Dropout

    def __init__(self, channels: int, config: BlockConfig, *, cond_size: int, text_size: int = 0, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        self.modulation = Linear(cond_size, 6 * channels, gain=0.0, key=keys[0])
        self.attention = Attention(channels, config.head_size, text_size=text_size, key=keys[1])
        self.up = Linear(channels, config.mlp_ratio * channels, key=keys[2])
        self.down = Linear(config.mlp_ratio * channels, channels, key=keys[3])
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        cond: Float[Array, "b k"],
        key: Key[Array, " b"] | None = None,
        angles: Float[np.ndarray, "n pairs"] | None = None,
        text: Text | None = None,
    ) -> Float[Array, "b n c"]:
        modulation = self.modulation(cond)[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        x = x + gate_1 * self.attention(layer_norm(x) * (1 + scale_1) + shift_1, angles, text)
        hidden = jax.nn.gelu(self.up(layer_norm(x) * (1 + scale_2) + shift_2))
        return x + gate_2 * self.down(self.dropout(hidden, key))


class Stack(eqx.Module):
    """`depth` blocks with one set of stacked weights (leading axis `depth`), run by `lax.scan`.

    `remat="block"` compiles one block however deep the stack, and recomputes its activations in the backward pass, so
    that memory holds one residual stream per block, and weights that are split over devices (`ulx.nn.split`) are whole
    for one block at a time. `remat="none"` is for stacks of a few blocks: the loop is unrolled, since a loop would copy
    every activation that is kept into an array of all blocks' and out of it again.
    """

    blocks: Block
    depth: int = eqx.field(static=True)
    head_size: int = eqx.field(static=True)
    rotary: bool = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        channels: int,
        config: BlockConfig,
        *,
        cond_size: int,
        text_size: int = 0,
        key: Key[Array, ""],
    ):
        """`text_size` are the channels of a caption's tokens, or 0 for blocks that see none."""
        if depth < 1:
            raise ValueError(f"a stack has at least one block, got depth={depth}")
        sizes = {"cond_size": cond_size, "text_size": text_size}
        blocks = [Block(channels, config, **sizes, key=key) for key in jax.random.split(key, depth)]
        self.blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        self.depth, self.head_size, self.rotary = depth, config.head_size, config.rotary
        self.remat = config.remat

    def __call__(
        self,
        x: Float[Array, "b *grid c"],
        cond: Float[Array, "b k"],
        key: Key[Array, " b"] | None = None,
        text: Text | None = None,
    ) -> Float[Array, "b *grid c"]:
        grid = x.shape[1:-1]
        angles = rotary.angles(grid, self.head_size) if self.rotary else None
        cond = jax.nn.silu(cond)
        weights, static = eqx.partition(self.blocks, eqx.is_array)
        keys = None if key is None else jnp.stack(split_keys(key, self.depth))

        def step(tokens, layer):
            weights, key = layer
            return whole(eqx.combine(weights, static))(tokens, cond, key, angles, text), None

        if self.remat == "block":
            step = jax.checkpoint(step)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return jax.lax.scan(step, tokens, (weights, keys), unroll=self.remat == "none")[0].reshape(x.shape)
