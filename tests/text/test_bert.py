"""BERT against a float64 NumPy one that sees no padding, published similarities, and other people's code (`parity`)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from scipy.special import erf, softmax

from ulx.packaged import packaged
from ulx.text import bert
from ulx.text.bert import Bert, Norm, normalised, pooled
from ulx.text.wordpiece import INSTALL, PACKAGE, WordPiece

SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "",
    "red heart",
    "woman scientist: medium-dark skin tone",
    "Ein rotes Herz; un cœur rouge, 赤いハート, красное сердце 😀",
    "a dog " * 300,
)


def model_path():
    return packaged(PACKAGE, "model/model.safetensors", install=INSTALL).parent


@pytest.fixture(scope="module")
def network(minilm_package) -> Bert:
    return bert.load()


@pytest.fixture(scope="module")
def real(minilm_package) -> dict[str, np.ndarray]:
    return load_arrays((model_path() / "model.safetensors").read_bytes())


class Reference:
    """float64, one caption at a time, `n c`, without padding and so without masks."""

    def __init__(self, arrays: dict[str, np.ndarray], heads: int):
        self.arrays, self.heads = {name: array.astype(np.float64) for name, array in arrays.items()}, heads

    def linear(self, x, name):
        return x @ self.arrays[f"{name}.weight"].T + self.arrays[f"{name}.bias"]

    def norm(self, x, name):
        scale, shift = self.arrays[f"{name}.LayerNorm.weight"], self.arrays[f"{name}.LayerNorm.bias"]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * scale + shift

    def attention(self, x, name):
        query, key, value = (
            np.split(self.linear(x, f"{name}.self.{part}"), self.heads, axis=-1) for part in ("query", "key", "value")
        )
        size = query[0].shape[-1]
        heads = [softmax(q @ k.T / size**0.5, axis=-1) @ v for q, k, v in zip(query, key, value, strict=True)]
        return self.norm(x + self.linear(np.concatenate(heads, axis=-1), f"{name}.output.dense"), f"{name}.output")

    def layer(self, x, name):
        x = self.attention(x, f"{name}.attention")
        wide = self.linear(x, f"{name}.intermediate.dense")
        gelu = wide * 0.5 * (1 + erf(wide / 2**0.5))
        return self.norm(x + self.linear(gelu, f"{name}.output.dense"), f"{name}.output")

    def __call__(self, ids):
        words, positions, segments = (
            self.arrays[f"embeddings.{what}_embeddings.weight"] for what in ("word", "position", "token_type")
        )
        x = self.norm(np.stack([words[i] + positions[at] + segments[0] for at, i in enumerate(ids)]), "embeddings")
        for i in range(sum(name.endswith("intermediate.dense.weight") for name in self.arrays)):
            x = self.layer(x, f"encoder.layer.{i}")
        return x


def narrow_weights(width: int = 12, wide: int = 20, layers: int = 3) -> dict[str, np.ndarray]:
    """Drawn weights of a small network with 17 words and 9 positions."""
    rng, arrays = np.random.default_rng(0), {}

    def linear(name, c_in, c_out):
        arrays[f"{name}.weight"] = rng.normal(0, 1.5 / np.sqrt(c_in), (c_out, c_in))
        arrays[f"{name}.bias"] = rng.normal(0, 0.3, c_out)

    def norm(name):
        arrays[f"{name}.LayerNorm.weight"] = rng.uniform(0.5, 1.5, width)
        arrays[f"{name}.LayerNorm.bias"] = rng.normal(0, 0.3, width)

    for what, count in (("word", 17), ("position", 9), ("token_type", 2)):
        arrays[f"embeddings.{what}_embeddings.weight"] = rng.normal(0, 1, (count, width))
    norm("embeddings")
    for i in range(layers):
        name = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{name}.attention.{part}", width, width)
        linear(f"{name}.intermediate.dense", width, wide)
        linear(f"{name}.output.dense", wide, width)
        norm(f"{name}.attention.output")
        norm(f"{name}.output")
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_the_network_with_drawn_weights():
    arrays = narrow_weights()
    reference, network = Reference(arrays, heads=3), bert.from_state_dict(arrays, heads=3)
    lengths = (9, 1, 4, 7)
    mask = np.arange(9) < np.array(lengths)[:, None]
    # Padding that holds a token like any other: that it is padding the mask alone can tell.
    ids = np.random.default_rng(1).integers(0, 17, (4, 9))
    found = eqx.filter_jit(network)(jnp.asarray(ids), jnp.asarray(mask))
    for row, length in enumerate(lengths):
        # Three layers of float32 sums, on values of up to 4: measured at most 1.5e-6.
        np.testing.assert_allclose(found[row, :length], reference(ids[row, :length]), atol=1e-5)


def test_epsilon_stands_under_the_root():
    """Where the variance is as small as ε: √(1e-12 + 1e-12), not 1e-6 + 1e-12, nor a ratio without it."""
    x = np.array([1.0, -1.0, 1.0, -1.0]) * 1e-6
    found = Norm(jnp.ones(4), jnp.zeros(4))(jnp.asarray(x, jnp.float32)[None, None])
    np.testing.assert_allclose(found[0, 0], np.array([1, -1, 1, -1]) / np.sqrt(2), rtol=1e-5)


def test_large_means_do_not_drown_the_variance():
    x = 1000 + np.array([1.0, -1.0, 3.0, -3.0])
    found = Norm(jnp.ones(4), jnp.zeros(4))(jnp.asarray(x, jnp.float32)[None, None])
    np.testing.assert_allclose(found[0, 0], np.array([1, -1, 3, -3]) / np.sqrt(5), rtol=1e-5)


def test_a_row_without_tokens_is_finite():
    network = bert.from_state_dict(narrow_weights(), heads=3)
    found = network(jnp.zeros((2, 5), int), jnp.asarray([[True] * 5, [False] * 5]))
    assert np.isfinite(found).all()


def test_more_tokens_than_positions_are_refused():
    network = bert.from_state_dict(narrow_weights(), heads=3)
    with pytest.raises(ValueError, match="10 tokens are too many: this network has 9 positions"):
        network(jnp.zeros((1, 10), int), jnp.ones((1, 10), bool))


def test_pooling():
    tokens = [[[1.0, 2.0], [3.0, 6.0], [50.0, -70.0]], [[4.0, 3.0], [9.0, 9.0], [9.0, 9.0]], [[7.0, 7.0]] * 3]
    mask = jnp.asarray([[True, True, False], [True, False, False], [False] * 3])
    found = pooled(jnp.asarray(tokens), mask)
    np.testing.assert_allclose(found, [[2, 4], [4, 3], [0, 0]])
    expected = [[1 / 5**0.5, 2 / 5**0.5], [0.8, 0.6], [0, 0]]
    np.testing.assert_allclose(normalised(found), expected, rtol=1e-6)


@eqx.filter_jit
def outputs(network: Bert, ids, mask):
    return network(ids, mask)


@pytest.mark.parametrize("length", [16, 128])
def test_the_packaged_network_on_sentences(network, real, length):
    reference = Reference(real, heads=12)
    ids, mask = WordPiece(length)(SENTENCES)
    found = np.asarray(outputs(network, jnp.asarray(ids), jnp.asarray(mask)))
    for row, sentence in enumerate(SENTENCES):
        expected = reference(ids[row][mask[row]])
        # Six layers of float32 sums of up to 1,536 products, on values of up to 7: measured at most 3.1e-6.
        error = np.abs(found[row][mask[row]] - expected).max()
        print(f"{sentence[:40]!r}: {error:.1e} of {np.abs(expected).max():.1f}")
        assert error < 1e-5, sentence


def test_published_similarities(network):
    ids, mask = map(jnp.asarray, WordPiece(16)(SENTENCES[:3]))
    vectors = normalised(pooled(outputs(network, ids, mask), mask))
    # By sentence-transformers' own network, as its README prints them (UKPLab/sentence-transformers), to four digits.
    expected = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=6e-5)


def test_padding_changes_nothing(network):
    results = []
    for length in (16, 40):
        ids, mask = map(jnp.asarray, WordPiece(length)(SENTENCES[:6]))
        # What stands where the padding is cannot matter either.
        ids = jnp.where(mask, ids, 2417)
        results.append(outputs(network, ids, mask)[:, :16][np.asarray(mask[:, :16])])
    # Sums over more zeros in another order: float32 rounding, measured 2.8e-6.
    np.testing.assert_allclose(*results, atol=5e-6)


def test_parameters_are_all_there(network):
    # 22,713,216 published, of which 147,840 in the pooler and one segment are left out, and the other is added.
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == 22_713_216 - 384 * 385 - 2 * 384


def test_a_damaged_weight_file_is_refused(minilm_package, monkeypatch, tmp_path):
    data = bytearray((model_path() / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(data)
    monkeypatch.setattr(bert, "packaged", lambda *_, **__: damaged)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file this code was written for"):
        bert.load()


@pytest.mark.parity
def test_every_layer_against_transformers(network):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(model_path(), attn_implementation="eager").eval()
    ids, mask = WordPiece(128)(SENTENCES)
    with torch.no_grad():
        theirs = model(
            torch.asarray(ids, dtype=torch.int64), torch.asarray(mask, dtype=torch.int64), output_hidden_states=True
        ).hidden_states
    x = network.norm(network.tokens[ids] + network.positions[:128])
    found = [x] + [x := layer(x, jnp.asarray(mask)) for layer in network.layers]
    for name, ours, expected in zip(range(7), found, theirs, strict=True):
        # float32 against float32, on values of up to 11: measured at most 5.8e-6.
        error = np.abs(np.asarray(ours) - expected.numpy())[mask].max()
        print(f"after layer {name}: {error:.1e} of {np.abs(expected.numpy()[mask]).max():.1f}")
        assert error < 1e-5, name


@pytest.mark.parity
def test_vectors_against_sentence_transformers(network):
    pytest.importorskip("torch")
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(str(model_path()), device="cpu")
    ids, mask = map(jnp.asarray, WordPiece(theirs.max_seq_length)(SENTENCES))
    found = normalised(pooled(outputs(network, ids, mask), mask))
    # With its own tokeniser, pooling and normalisation; entries of vectors of length 1: 2.1e-7.
    error = np.abs(np.asarray(found) - theirs.encode(list(SENTENCES))).max()
    print(f"vectors: {error:.1e}")
    assert error < 1e-6
