"""What a text encoder is, and the packaged one.

Everything outside knows `TextEncoder` alone: captions in, token embeddings and their mask out. `MiniLM` is one, and
`ulx.text.precomputed.Precomputed` makes one of any other encoder's embeddings in a file.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from ulx.text import bert
from ulx.text.bert import Bert
from ulx.text.wordpiece import WordPiece

__all__ = ["Embedded", "MiniLM", "TextEncoder"]

Embedded = tuple[Float32[np.ndarray, "b n c"], Bool[np.ndarray, "b n"]]
"""Token embeddings, zero where there is no token, and a mask that is True where there is one."""


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to token embeddings. It is not trained, and draws nothing: a caption always gives the same."""

    @property
    def length(self) -> int:
        """n, the number of tokens that longer captions are cut to and shorter ones filled up to."""
        ...

    @property
    def channels(self) -> int:
        """c, the numbers of a token."""
        ...

    @property
    def definition(self) -> str:
        """Names network, weights and tokeniser: another one whenever the same caption would give other numbers."""
        ...

    def __call__(self, captions: Sequence[str]) -> Embedded: ...


class MiniLM:
    """The packaged sentence encoder, 384 channels. `length` is at most 512; it was trained on captions of up to 128.

    Raises as `bert.load` and `WordPiece` do.
    """

    channels = bert.CHANNELS
    definition = bert.DEFINITION

    def __init__(self, length: int = 64):
        if length > bert.POSITIONS:
            raise ValueError(f"MiniLM has {bert.POSITIONS} positions, which are too few for {length} tokens")
        self.length = length
        self._pieces = WordPiece(length)
        self._network = bert.load()

    def __call__(self, captions: Sequence[str]) -> Embedded:
        ids, mask = self._pieces(captions)
        tokens = np.zeros((*ids.shape, self.channels), np.float32)
        if not captions:
            return tokens, mask
        # Padding changes nothing, and costs as much as tokens do: the network sees no more of it than up to the next
        # power of two, so that few shapes are compiled.
        longest = int(mask.sum(axis=1).max())
        width = min(self.length, 1 << (longest - 1).bit_length())
        tokens[:, :width] = _tokens(self._network, jnp.asarray(ids[:, :width]), jnp.asarray(mask[:, :width]))
        tokens[~mask] = 0
        return tokens, mask


@eqx.filter_jit
def _tokens(network: Bert, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
    return network(ids, mask)
