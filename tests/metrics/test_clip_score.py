"""The CLIP score: from a folder, images of any size and captions to numbers that independent code finds too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from clip_files import EOS, WORDS, config, drawn, tokenizer, write
from safetensors.numpy import save_file
from test_clip import Reference

from ulx.metrics import clip_score
from ulx.metrics.clip_score import Clip, load, prepare, score

START = WORDS - 2
CAPTIONS = (
    *("a red cat", "A  RED\ncat", "", "dog", "dog cat red " * 30, "Ein rotes Herz, 赤い 😀", "7 cats' dogs", "\ud83d!"),
    *("x", "the other", "cat dog cat", "red"),
)


def pictures(count: int = 12, height: int = 40, width: int = 40) -> np.ndarray:
    """Smooth ones with a little noise, every channel different."""
    rng, (y, x) = np.random.default_rng(3), np.mgrid[0:height, 0:width] / height
    waves = [np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y) for _ in range(3 * count)]
    smooth = 127 + 110 * np.stack(waves, axis=-1).reshape(height, width, count, 3).transpose(2, 0, 1, 3)
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("clip"), config())


@pytest.fixture(scope="module")
def network(folder) -> Clip:
    return load(folder)


def test_scores_of_pairs(network):
    """Prepared by pillow, the rest in float64 without filling up."""
    images, reference = pictures(), Reference(drawn(config()), config())
    pieces = tokenizer()
    pieces.enable_truncation(13)
    expected = []
    for image, caption in zip(images, CAPTIONS, strict=True):
        a = reference.image(prepare(image[None], 25)[0])
        b = reference.text(pieces.encode(caption.encode(errors="replace").decode()).ids)
        expected.append(100 * (a @ b) / np.sqrt((a @ a) * (b @ b)))
    found = score(network, images, CAPTIONS)
    print(f"{np.abs(found - expected).max():.1e} of {np.round(expected, 1)}")
    assert min(expected) < -5  # not clipped
    assert max(expected) > 5
    np.testing.assert_allclose(found, expected, atol=1e-4)  # float32's rounding, of 100


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_do_not_change_a_score(network, batch_size):
    images = pictures()
    alone = [score(network, images[i : i + 1], CAPTIONS[i : i + 1])[0] for i in range(3)]
    found = score(network, images, CAPTIONS, batch_size=batch_size)
    assert found.shape == (12,)
    np.testing.assert_allclose(found[:3], alone, atol=1e-4)
    np.testing.assert_allclose(found, score(network, images, CAPTIONS, batch_size=5), atol=1e-4)


def test_scores_go_with_their_pairs(network):
    images, order = pictures(), np.random.default_rng(4).permutation(12)
    found = score(network, images, CAPTIONS, batch_size=5)
    moved = score(network, images[order], [CAPTIONS[i] for i in order], batch_size=5)
    np.testing.assert_allclose(moved, found[order], atol=1e-4)
    others = score(network, images, np.roll(CAPTIONS, 3).tolist(), batch_size=5)
    assert np.abs(others - found).min() > 0.1


DEVICES = """
import json
import sys
from pathlib import Path

import jax
from test_clip_score import CAPTIONS, pictures

from ulx.metrics.clip_score import load, score

found = score(load(Path(sys.argv[1])), pictures(), CAPTIONS, batch_size=5)
print(json.dumps([jax.local_device_count(), found.tolist()]))
"""


def test_devices_do_not_change_a_score(network, folder):
    tests = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    paths = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", DEVICES, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    devices, found = json.loads(done.stdout.splitlines()[-1])
    assert devices == 4
    np.testing.assert_allclose(found, score(network, pictures(), CAPTIONS), atol=1e-4)


# --- Captions --------------------------------------------------------------------------------------------


def test_captions_become_ids(network):
    ids = network.tokens(["A red  CAT", "", "cat " * 40, "zz <|endoftext|>"])
    vocabulary = tokenizer().get_vocab()
    a, red, cat, z, last_z = (vocabulary[word] for word in ("a</w>", "red</w>", "cat</w>", "z", "z</w>"))
    assert ids.dtype == np.int32
    assert ids[0, :5].tolist() == [START, a, red, cat, EOS]
    assert ids[1, :2].tolist() == [START, EOS]
    assert ids[2].tolist() == [START, *[cat] * 11, EOS]  # cut to the 13 positions, its end kept
    assert ids[3, :4].tolist() == [START, z, last_z, EOS]
    assert (ids[1, 2:] == EOS).all()


def test_only_as_many_tokens_as_the_longest_caption_has(network):
    assert network.tokens(["cat", "red cat"]).shape == (2, 4)
    assert network.tokens([]).shape == (0, 0)


def test_the_file_s_own_cutting_and_filling_does_not_count(folder, network, tmp_path):
    other = write(tmp_path, config())
    pieces = tokenizer()
    pieces.enable_truncation(4)
    pieces.enable_padding(length=9, pad_id=0, pad_token="!")
    pieces.save(str(other / "tokenizer.json"))
    np.testing.assert_array_equal(load(other).tokens(CAPTIONS), network.tokens(CAPTIONS))


# --- Images ----------------------------------------------------------------------------------------------


def keys_cubic(size: int, new: int) -> np.ndarray:
    """`new size`: Keys' cubic with a = −1/2 around the pixels' centres, wider by the factor of shrinking."""
    scale = size / new
    x = np.abs((np.arange(new)[:, None] + 0.5) * scale - np.arange(size) - 0.5) / max(scale, 1)
    weights = np.where(x < 1, 1 - 2.5 * x**2 + 1.5 * x**3, np.where(x < 2, 2 - 4 * x + 2.5 * x**2 - 0.5 * x**3, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (25, 25), (64, 64), (131, 131), (40, 67), (201, 150)])
def test_preparation_is_an_antialiased_cubic_in_bytes(height, width):
    images = pictures(2, height, width)
    new_height, new_width = (25 * side // min(height, width) for side in (height, width))

    def in_bytes(x):
        return np.clip(np.floor(x + 0.5), 0, 255)

    wide = in_bytes(np.einsum("vw,bhwc->bhvc", keys_cubic(width, new_width), images))
    whole = in_bytes(np.einsum("uh,bhvc->buvc", keys_cubic(height, new_height), wide))
    top, left = (new_height - 25) // 2, (new_width - 25) // 2
    found = prepare(images, 25)
    assert found.dtype == np.uint8
    # Pillow's weights are fixed-point numbers, so that a half may go the other way.
    error = np.abs(found - whole[:, top : top + 25, left : left + 25])
    assert error.max() <= 1
    assert (error > 0).mean() < 0.01


def test_the_network_s_own_size_is_left_alone():
    images = pictures(2, 25, 25)
    np.testing.assert_array_equal(prepare(images, 25), images)
    for axis in (1, 2):  # of one pixel too many the last one goes, of three one before and two behind
        for more, before in ((1, 0), (3, 1)):
            large = np.concatenate([images, images[:, :more] if axis == 1 else images[:, :, :more]], axis=axis)
            expected = large[:, before : before + 25] if axis == 1 else large[:, :, before : before + 25]
            np.testing.assert_array_equal(prepare(large, 25), expected)


# --- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "captions", "batch_size", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), ["a", "b"], 64, r"images must be uint8 `n h w 3`, got float32 of shape"),
        (
            np.zeros((2, 8, 8, 4), np.uint8),
            ["a", "b"],
            64,
            r"must be uint8 `n h w 3`, got uint8 of shape \(2, 8, 8, 4\)",
        ),
        (np.zeros((2, 8, 8, 3), np.uint8), ["a"], 64, "got 1 captions for 2 images"),
        (np.zeros((2, 8, 8, 3), np.uint8), "ab", 64, "got one text for 2 images"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], 64, "of pairs, one or more: got 0 captions for 0 images"),
        (np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"], 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_other_pairs_are_refused(network, images, captions, batch_size, message):
    with pytest.raises(ValueError, match=message):
        score(network, images, captions, batch_size)


def test_jax_arrays_are_taken(network):
    images = pictures(2)
    np.testing.assert_array_equal(score(network, jnp.asarray(images), ["a", "b"]), score(network, images, ["a", "b"]))


@pytest.mark.parametrize("name", clip_score.FILES)
def test_a_missing_file_is_named(tmp_path, name):
    (write(tmp_path, config()) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} holds no {name}: name the folder of a CLIP"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json and no model.safetensors and no tokenizer.json"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is no JSON, or a damaged one"),
        ("config.json", b"[]", "holds list, expected settings by their names"),
        ("config.json", b'{"model_type": "bert"}', ": model_type is 'bert': name the folder of a CLIP"),
        ("model.safetensors", b"\x08\0\0\0", "is no safetensors file, or is damaged"),
        ("tokenizer.json", b"{}", "is no tokeniser, or a damaged one"),
        ("preprocessor_config.json", b"{", "is no JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (write(tmp_path, config()) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}:? ?{message}"):
        load(tmp_path)


def test_bfloat16_is_refused(tmp_path):
    header = json.dumps({"logit_scale": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}).encode()
    file = write(tmp_path, config()) / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match=f"^{file} holds numbers of type BF16: save it as float32"):
        load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    write(tmp_path, config())
    save_file(
        drawn(config()) | {"text_projection.weight": np.zeros((21, 24), np.float32)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=rf"{tmp_path}/model.safetensors: text_projection.weight has shape \(21, 24\)"):
        load(tmp_path)


def test_another_model_s_tokeniser_is_refused(tmp_path):
    write(tmp_path / "ids", config(eos=EOS - 1))
    with pytest.raises(ValueError, match=r"tokenizer.json makes \[518, 519\] of an empty caption, .* id 518 by"):
        load(tmp_path / "ids")
    pieces = tokenizer()
    pieces.add_tokens(["<extra>"])
    pieces.save(str(write(tmp_path / "more", config()) / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json knows ids up to 520, config.json's vocab_size is 520"):
        load(tmp_path / "more")
    pieces = tokenizer()
    pieces.post_processor = None
    for eos in (EOS, 2):
        name = f"open{eos}"
        pieces.save(str(write(tmp_path / name, config(eos=eos)) / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"tokenizer.json makes \[\] of an empty caption"):
            load(tmp_path / name)


def test_another_preparation_is_refused(folder, tmp_path):
    file = write(tmp_path, config()) / "preprocessor_config.json"
    usual = {"size": {"shortest_edge": 25}, "crop_size": 25, "resample": 3, "do_resize": True, "do_convert_rgb": True}
    usual |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    file.write_text(json.dumps(usual))
    load(tmp_path)
    for name, value in {"size": 224, "resample": 2, "image_std": [0.5] * 3, "do_center_crop": False}.items():
        file.write_text(json.dumps(usual | {name: value}))
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {name} is .* would not be comparable"):
            load(tmp_path)


# --- What a card says ------------------------------------------------------------------------------------


def test_what_the_score_is(network, folder, tmp_path):
    found = clip_score.definitions(network)
    assert list(found) == [network.metric] == ["clip_score"]
    assert "2.5·max(cos, 0)" in found["clip_score"]["definition"]
    assert "bicubic" in found["clip_score"]["definition"]
    assert found["clip_score"]["network"] == {"definition": network.definition, "sha256": network.sha256}
    assert network.sha256[:16] in network.definition
    assert "ViT-32x3/8 " in network.definition
    assert " quick_gelu config " in network.definition
    assert network.definition.endswith(" pil-bicubic-uint8-25 centre-crop v1")
    others = [config("gelu"), config(eos=2), config(), config()]
    others[2]["vision_config"]["num_attention_heads"] = 2  # no array tells
    others[3]["torch_dtype"] = "float32"  # no number changes
    *changed, same = (load(write(tmp_path / str(i), each)).definition for i, each in enumerate(others))
    assert len({network.definition, *changed}) == 4
    assert same == network.definition
