"""MiniLM as a text encoder: what its users may rely on."""

import jax.numpy as jnp
import numpy as np
import pytest

from ulx.text.bert import normalised, pooled
from ulx.text.encoders import MiniLM, TextEncoder

CAPTIONS = ["red heart", "", "a dog " * 300, "赤い心", "👩‍🔬 woman scientist", "\ud83d"]


@pytest.fixture(scope="module")
def minilm(minilm_package) -> MiniLM:
    return MiniLM(length=24)


def test_tokens_and_mask(minilm):
    assert isinstance(minilm, TextEncoder)
    tokens, mask = minilm(CAPTIONS)
    assert tokens.shape == (6, 24, 384)
    assert mask.sum(axis=1)[:3].tolist() == [4, 2, 24]
    # Tokens come first, and padding is zero.
    np.testing.assert_array_equal(mask, np.arange(24) < mask.sum(axis=1)[:, None])
    assert np.isfinite(tokens).all()
    assert not tokens[~mask].any()
    assert (np.abs(tokens[mask]).max(axis=-1) > 0.1).all()


def test_a_caption_does_not_depend_on_its_company(minilm):
    tokens, mask = minilm(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone, alone_mask = minilm([caption])
        np.testing.assert_array_equal(alone_mask[0], mask[row])
        # With less padding: float32 rounding.
        np.testing.assert_allclose(alone[0], tokens[row], atol=5e-6)


def test_length_pads_or_cuts(minilm):
    tokens, mask = minilm(CAPTIONS[:2])
    longer, longer_mask = MiniLM(length=70)(CAPTIONS[:2])
    assert longer.shape == (2, 70, 384)
    np.testing.assert_array_equal(longer_mask[:, :24], mask)
    np.testing.assert_allclose(longer[:, :24], tokens, atol=5e-6)
    assert not longer[:, 24:].any()
    with pytest.raises(ValueError, match="MiniLM has 512 positions, which are too few for 513 tokens"):
        MiniLM(length=513)


def test_no_captions(minilm):
    tokens, mask = minilm([])
    assert tokens.shape == (0, 24, 384)
    assert mask.shape == (0, 24)


def test_like_captions_are_near(minilm):
    captions = ["red heart", "crimson heart", "a scarlet love symbol", "flag: Norway", "woman running"]
    tokens, mask = minilm(captions)
    vectors = np.asarray(normalised(pooled(jnp.asarray(tokens), jnp.asarray(mask))))
    near, _, far, farther = vectors[0] @ vectors[1:].T
    assert near > 0.5 > max(far, farther)
