"""Residual convolution blocks, for the encoder and for the decoder's outer stages."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ulx.nn.layers import Conv, Dropout, GroupNorm, Linear

__all__ = ["ResBlock"]


class ResBlock(eqx.Module):
    """norm → SiLU → conv → (scale, shift by the conditioning) norm → SiLU → dropout → conv, plus the input.

    The last convolution starts at zero, so that a new block is the identity (or, where the number of channels
    changes, its 1×1 projection). Without `cond_size` it takes no conditioning: the encoder's form.
    """

    norm_1: GroupNorm
    conv_1: Conv
    norm_2: GroupNorm
    conv_2: Conv
    project: Linear | None
    modulation: Linear | None
    dropout: Dropout

    def __init__(
        self,
        rank: int,
        in_size: int,
        out_size: int,
        *,
        cond_size: int | None = None,
        dropout: float = 0.0,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 4)
        self.norm_1 = GroupNorm(in_size)
        self.conv_1 = Conv(rank, in_size, out_size, key=keys[0])
        self.norm_2 = GroupNorm(out_size)
        self.conv_2 = Conv(rank, out_size, out_size, gain=0.0, key=keys[1])
        self.project = None if in_size == out_size else Linear(in_size, out_size, bias=False, key=keys[2])
        self.modulation = None if cond_size is None else Linear(cond_size, 2 * out_size, gain=0.0, key=keys[3])
        self.dropout = Dropout(dropout)

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        cond: Float[Array, "b k"] | None = None,
        key: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b *space d"]:
        hidden = self.norm_2(self.conv_1(jax.nn.silu(self.norm_1(x))))
        if self.modulation is not None:
            if cond is None:
                raise ValueError("this ResBlock was built with a conditioning vector; pass cond")
            modulation = self.modulation(jax.nn.silu(cond))
            scale, shift = jnp.split(modulation.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1), 2, axis=-1)
            hidden = hidden * (1 + scale) + shift
        hidden = self.conv_2(self.dropout(jax.nn.silu(hidden), key))
        return hidden + (x if self.project is None else self.project(x))
