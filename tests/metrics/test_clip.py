"""CLIP's networks against float64 NumPy ones that see one image or one caption at a time, with nothing behind it."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_files import EOS, WORDS, config, drawn
from scipy.special import erf, expit, softmax

from ulx.metrics import clip
from ulx.metrics.clip import CLIP, Norm, causal, from_arrays, settings


class Reference:
    """float64, `n c`."""

    def __init__(self, arrays, config):
        self.arrays, self.config = {name: array.astype(np.float64) for name, array in arrays.items()}, config

    def linear(self, x, name):
        return x @ self.arrays[f"{name}.weight"].T + self.arrays[f"{name}.bias"]

    def norm(self, x, name, eps):
        scale, shift = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + shift

    def activation(self, x, name):
        return {"quick_gelu": x * expit(1.702 * x), "gelu": x * 0.5 * (1 + erf(x / 2**0.5))}[name]

    def layers(self, x, kind):
        """What goes into the first layer, and what comes out of each. Row i of a caption sees rows up to i: it is made
        of these alone."""
        part, outputs = self.config[f"{kind}_config"], [x]
        heads, eps = part["num_attention_heads"], part["layer_norm_eps"]
        for i in range(part["num_hidden_layers"]):
            name = f"{kind}_model.encoder.layers.{i}"
            y = self.norm(x, f"{name}.layer_norm1", eps)
            query, key, value = (
                np.split(self.linear(y, f"{name}.self_attn.{each}_proj"), heads, axis=-1) for each in "qkv"
            )
            rows = []
            for row in range(len(x)):
                seen = slice(row + 1) if kind == "text" else slice(None)
                size = query[0].shape[-1]
                shares = [softmax(q[row] @ k[seen].T / size**0.5) for q, k in zip(query, key, strict=True)]
                rows.append(np.concatenate([share @ v[seen] for share, v in zip(shares, value, strict=True)]))
            x = x + self.linear(np.stack(rows), f"{name}.self_attn.out_proj")
            wide = self.linear(self.norm(x, f"{name}.layer_norm2", eps), f"{name}.mlp.fc1")
            x = x + self.linear(self.activation(wide, part["hidden_act"]), f"{name}.mlp.fc2")
            outputs.append(x)
        return outputs

    def text(self, ids):
        """Up to the end token, the last one of `ids`."""
        words, positions = (
            self.arrays[f"text_model.embeddings.{what}_embedding.weight"] for what in ("token", "position")
        )
        x = self.layers(np.stack([words[i] + positions[at] for at, i in enumerate(ids)]), "text")[-1][-1]
        x = self.norm(x, "text_model.final_layer_norm", self.config["text_config"]["layer_norm_eps"])
        return self.arrays["text_projection.weight"] @ x

    def image(self, image):
        part = self.config["vision_config"]
        patch, eps = part["patch_size"], part["layer_norm_eps"]
        weight = self.arrays["vision_model.embeddings.patch_embedding.weight"]
        x = (image / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) / [0.26862954, 0.26130258, 0.27577711]
        grid = range(0, len(x) - patch + 1, patch)
        cut = [x[i : i + patch, j : j + patch] for i in grid for j in grid]
        rows = [self.arrays["vision_model.embeddings.class_embedding"]]
        rows += [np.einsum("pqk,ckpq->c", each, weight) for each in cut]
        x = np.stack(rows) + self.arrays["vision_model.embeddings.position_embedding.weight"]
        x = self.layers(self.norm(x, "vision_model.pre_layrnorm", eps), "vision")[-1][0]
        return self.arrays["visual_projection.weight"] @ self.norm(x, "vision_model.post_layernorm", eps)


def small(*arguments) -> CLIP:
    asked = config(*arguments)
    return from_arrays(drawn(asked), settings(asked))


def pictures(count: int, size: int = 25) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


CAPTIONS = ([518, 4, 5, 6, EOS], [518, EOS], [518, 300, 2, 2, 400, 511, 7, EOS])


def filled(ids, length=13, by=EOS):
    return jnp.array([row + [by] * (length - len(row)) for row in ids])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [EOS, 2])
def test_both_towers_with_drawn_weights(activation, eos):
    asked = config(activation, eos)
    arrays = drawn(asked)
    reference, network = Reference(arrays, asked), from_arrays(arrays, settings(asked))
    images = pictures(3)
    expected = np.stack([reference.image(image) for image in images]), np.stack([reference.text(i) for i in CAPTIONS])
    found = eqx.filter_jit(network.image)(jnp.asarray(images)), eqx.filter_jit(network.text)(filled(CAPTIONS))
    for ours, theirs in zip(found, expected, strict=True):
        # Three layers of float32 sums, on values of up to 5.
        error = np.abs(ours - theirs).max()
        print(f"{error:.1e} of {np.abs(theirs).max():.1f}")
        assert error < 1e-5
    a, b = expected
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(network(jnp.asarray(images), filled(CAPTIONS)), cosines, atol=1e-6)


def hidden(network: CLIP, ids) -> np.ndarray:
    x = network.text.embedded(ids)
    for layer in network.text.layers:
        x = layer(x, causal(ids.shape[1]))
    return np.asarray(x)


def test_a_later_token_changes_nothing_before_it():
    network, ids = small(), jnp.asarray(np.random.default_rng(2).integers(0, WORDS, (2, 9)))
    before, after = hidden(network, ids), hidden(network, ids.at[:, 5].add(-1))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("eos", [EOS, 2])
def test_what_fills_up_a_caption_changes_nothing(eos):
    network = small("quick_gelu", eos)
    text = eqx.filter_jit(network.text)
    expected = np.stack([text(jnp.array([row]))[0] for row in CAPTIONS])
    for length, by in ((8, EOS), (13, EOS), (13, 0), (13, 77)):
        np.testing.assert_allclose(text(filled(CAPTIONS, length, by)), expected, atol=1e-5)


def test_which_token_is_the_end():
    ids = jnp.array([[9, 2, 5, 7, 7], [9, 7, 2, 3, 0], [8, 3, 9, 7, 2]])
    by_id, legacy = (small("quick_gelu", eos).text for eos in (7, 2))
    np.testing.assert_array_equal(by_id.ends(ids), [3, 1, 3])
    np.testing.assert_array_equal(legacy.ends(ids), [0, 0, 2])
    np.testing.assert_array_equal(legacy.ends(jnp.array([[5, 8, 6, 8]])), [1])


def test_epsilon_stands_under_the_root():
    x = jnp.array([1.0, -1.0, 1.0, -1.0]) * 1e-2
    found = Norm(jnp.ones(4), jnp.zeros(4), 1e-4)(x[None, None])
    np.testing.assert_allclose(found[0, 0], np.array([1, -1, 1, -1]) / np.sqrt(2), rtol=1e-5)


def test_other_sizes_are_refused():
    network = small()
    with pytest.raises(ValueError, match="14 tokens are too many: this network has 13 positions"):
        network.text(jnp.zeros((1, 14), int))
    with pytest.raises(ValueError, match="this CLIP sees 25×25 pixels, got 24: prepare first"):
        network.image(jnp.asarray(pictures(1, 24)))


def test_half_precision_files_are_computed_in_float32():
    asked = config()
    halved = {name: array.astype(np.float16) for name, array in drawn(asked).items()}
    whole = {name: array.astype(np.float32) for name, array in halved.items()}
    found, expected = (from_arrays(arrays, settings(asked)) for arrays in (halved, whole))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(eqx.filter(found, eqx.is_array)))
    np.testing.assert_array_equal(found.image.layers[2].narrow.weight, expected.image.layers[2].narrow.weight)


def test_parameters_are_all_there():
    arrays = drawn(config())
    leaves = jax.tree.leaves(eqx.filter(small(), eqx.is_array))
    assert sum(leaf.size for leaf in leaves) == sum(array.size for array in arrays.values()) - 1  # the scale of logits


def test_a_silent_configuration_is_a_b32():
    """transformers' defaults, which some of its versions leave out when they write one."""
    text, vision, dims = settings({"model_type": "clip", "text_config": {}, "vision_config": None})
    assert (text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"], dims) == (512, 8, 12, 512)
    assert (text["vocab_size"], text["max_position_embeddings"], text["eos_token_id"]) == (49408, 77, 49407)
    assert (vision["hidden_size"], vision["num_attention_heads"], vision["intermediate_size"]) == (768, 12, 3072)
    assert (vision["image_size"], vision["patch_size"], vision["hidden_act"]) == (224, 32, "quick_gelu")


def test_of_a_part_that_is_there_twice_the_second_is_taken_whole():
    twice = {"text_config": {"hidden_size": 640, "eos_token_id": 2}, "text_config_dict": {"hidden_size": 768}}
    text = settings({"model_type": "clip", **twice}).text
    assert (text["hidden_size"], text["eos_token_id"]) == (768, 49407)
    assert settings({**twice, "text_config_dict": None}).text["hidden_size"] == 640


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model_type", "siglip", "model_type is 'siglip': name the folder of a CLIP"),
        ("projection_dim", None, "projection_dim is None, expected such as 512"),
        ("text_config", 3, "text_config is 3, expected settings by their names"),
        ("text_config.hidden_size", "24", "text_config.hidden_size is '24', expected such as 512"),
        ("text_config.hidden_size", 25, "text_config: 3 heads do not divide 25 channels"),
        ("text_config.eos_token_id", [2], r"text_config.eos_token_id is \[2\], expected such as 49407"),
        ("text_config.hidden_act", "gelu_new", "text_config.hidden_act is 'gelu_new': quick_gelu and gelu are known"),
        ("vision_config.num_channels", 1, "vision_config.num_channels is 1: images have 3"),
        ("vision_config.patch_size", 0, "vision_config.patch_size is 0, expected such as 32"),
        ("vision_config.patch_size", 26, "vision_config: a patch of 26 pixels in images of 25"),
        ("vision_config.layer_norm_eps", "1e-5", "vision_config.layer_norm_eps is '1e-5', expected such as 1e-05"),
    ],
)
def test_other_configurations_are_refused(where, value, message):
    asked = copy.deepcopy(config())
    *outer, name = where.split(".")
    (asked[outer[0]] if outer else asked)[name] = value
    with pytest.raises(ValueError, match=f"^here/config.json: {message}"):
        settings(asked, "here/config.json")


def test_other_weights_are_refused():
    asked = config()
    name = "text_model.encoder.layers.1.mlp.fc2.weight"

    def refused(message, **changed):
        arrays = {key: value for key, value in (drawn(asked) | changed).items() if value is not None}
        with pytest.raises(ValueError, match=f"^there/file: {message}"):
            from_arrays(arrays, settings(asked), "there/file")

    ours = "these are not the weights of the CLIP of config.json"
    refused(f"there is no {name}: {ours}", **{name: None})
    refused(rf"{name} has shape \(24, 41\), expected \(24, 40\): {ours}", **{name: np.zeros((24, 41))})
    refused(f"{name} is not finite: the file is damaged", **{name: np.full((24, 40), np.nan)})
    refused(f"there is no place for text_model.encoder.layers.2.mlp.fc2.bias: {ours}", **{
        "text_model.encoder.layers.2.mlp.fc2.bias": np.zeros(24)
    })  # fmt: skip
    buffers = {f"{kind}_model.embeddings.position_ids": np.arange(13)[None] for kind in ("text", "vision")}
    assert isinstance(from_arrays(drawn(asked) | buffers, settings(asked)), clip.CLIP)
