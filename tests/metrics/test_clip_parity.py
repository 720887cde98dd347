"""CLIP's networks, preparation, tokens and scores against transformers' in torch, with drawn weights in files that it
wrote (`-m parity`; CONTRIBUTING says what to install)."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from clip_files import END, EOS, START, WORDS, config, drawn, tokenizer, write
from test_clip import pictures as noise
from test_clip_score import CAPTIONS, pictures

from ulx.metrics.clip import MEAN, STD, causal, from_arrays, settings
from ulx.metrics.clip_score import load, prepare, score

pytestmark = pytest.mark.parity
BOTH = pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 2), ("gelu", EOS)])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def processor(transformers):
    """The one that resizes by PIL; newer versions call the one that uses torchvision by the plain name."""
    pillow = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", exc_type=ImportError)
    return pillow.CLIPImageProcessorPil


def relative(found, expected) -> float:
    """The largest error, of the largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 400, EOS])
def test_every_layer_and_both_vectors(torch, transformers, tmp_path, activation, eos):
    asked = config(activation, eos)
    model = transformers.CLIPModel.from_pretrained(write(tmp_path, asked)).double().eval()
    # Any ids, with the end token 400 here and there: where it is missing transformers takes the first token.
    ids = np.random.default_rng(5).integers(0, WORDS, (6, 13))
    ids[[0, 1, 1, 2, 3], [7, 3, 9, 12, 0]] = 400
    ids[:4, 11] = EOS
    images = noise(4)
    mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
    pixels = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
    with torch.no_grad():
        image = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        text = model.text_model(input_ids=torch.from_numpy(ids), output_hidden_states=True)
        vectors = model.visual_projection(image.pooler_output), model.text_projection(text.pooler_output)
    # Not by `load`, which would refuse the end token 400: the tokeniser has another.
    network = from_arrays(drawn(asked), settings(asked))
    towers = (network.image, jnp.asarray(images), None), (network.text, jnp.asarray(ids), causal(13))
    tower: Any
    for (tower, inputs, mask), theirs, vector in zip(towers, (image, text), vectors, strict=True):
        x = eqx.filter_jit(tower.embedded)(inputs)
        assert len(theirs.hidden_states) == len(tower.layers) + 1
        for i, expected in enumerate(theirs.hidden_states):
            x = eqx.filter_jit(tower.layers[i - 1])(x, mask) if i else x
            error = relative(x, expected)
            print(f"{type(tower).__name__} after layer {i}: {error:.1e}")
            assert error < 1e-5  # float32 against float64; asked is 1e-4
        error = relative(eqx.filter_jit(tower)(inputs), vector)
        print(f"{type(tower).__name__}: {error:.1e}")
        assert error < 1e-5


def theirs(transformers, torch, processor, folder, images, captions, size):
    """Cosines by transformers from beginning to end: its files, preparation, tokeniser, network in float64."""
    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    pieces = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )
    length = model.config.text_config.max_position_embeddings
    tokens = pieces(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    prepare = processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels = torch.from_numpy(np.stack(prepare(list(images))["pixel_values"])).double()
    with torch.no_grad():
        found = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def agree(network, images, captions, expected):
    """Vectors at unit length, and scores."""
    a, b = (np.asarray(each, np.float64) for each in expected)
    ids, prepared = jnp.asarray(network.tokens(captions)), jnp.asarray(prepare(images, network.size))
    for tower, inputs, vectors in ((network.network.image, prepared, a), (network.network.text, ids, b)):
        found = np.asarray(eqx.filter_jit(tower)(inputs), np.float64)
        error = relative(found / np.linalg.norm(found, axis=1, keepdims=True), vectors)
        print(f"{type(tower).__name__}: {error:.1e}")
        assert error < 2e-5  # asked is 1e-4; up to twelve layers in float32 against float64
    scores = 100 * (a * b).sum(axis=1)
    found = score(network, images, captions, batch_size=5)
    print(f"scores {np.round(scores, 2)}: {np.abs(found - scores).max():.1e}, relative {relative(found, scores):.1e}")
    assert relative(found, scores) < 1e-4  # asked
    return scores


@BOTH
def test_scores_of_a_small_network(torch, transformers, processor, tmp_path, activation, eos):
    images = pictures(len(CAPTIONS), 61, 40)
    folder = write(tmp_path, config(activation, eos))
    captions = [caption.encode(errors="replace").decode() for caption in CAPTIONS]
    expected = theirs(transformers, torch, processor, folder, images, captions, 25)
    scores = agree(load(folder), images, CAPTIONS, expected)
    assert scores.std() > 5


@BOTH
def test_scores_of_a_b32(torch, transformers, processor, tmp_path, activation, eos):
    """Of the full size, in the files that transformers writes."""
    asked = transformers.CLIPConfig(
        text_config={"hidden_act": activation, "eos_token_id": eos}, vision_config={"hidden_act": activation}
    )
    model = transformers.CLIPModel(asked)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.normal_(0, 1.0 if "_embedding" in name and "patch" not in name else spread, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    del model
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    images, captions = pictures(4, 300, 257), ("a red cat", "", "cat dog " * 60, "the other dogs, 2 of them")
    network = load(tmp_path)
    assert network.network.text.positions.shape == (77, 512)
    assert "ViT-B/32 " in network.definition
    agree(network, images, captions, theirs(transformers, torch, processor, tmp_path, images, captions, 224))


@pytest.mark.parametrize(
    ("height", "width"), [(600, 512), (333, 334), (512, 205), (97, 61), (224, 225), (227, 224), (17, 17), (512, 512)]
)
def test_preparation_is_clip_image_processor_s(processor, height, width):
    """Cuts of a photograph, enlarged and made smaller, upright and lying."""
    cbook, pillow = pytest.importorskip("matplotlib.cbook"), pytest.importorskip("PIL.Image")
    photograph = np.asarray(pillow.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB"))
    image = photograph[:height, :width]
    assert image.shape == (height, width, 3)
    found = prepare(image[None], 224)[0]
    usual, bare = processor(), processor(do_rescale=False, do_normalize=False)
    expected = np.asarray(bare(image)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(found, expected)
    expected = np.asarray(usual(image)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose((found / 255 - MEAN) / STD, expected, atol=1e-6)


def test_ids_are_those_of_its_own_tokeniser(transformers, tmp_path):
    """transformers makes CLIP's normaliser and splitter by itself, of vocabulary and merges."""
    network = load(write(tmp_path, config()))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert "CLIP" in type(theirs).__name__
    captions = [
        caption.encode(errors="replace").decode() for caption in (*CAPTIONS, "It's  done; I'll go,\tOK? Ünï №9")
    ]
    expected = theirs(captions, padding=True, max_length=13, truncation=True)["input_ids"]
    np.testing.assert_array_equal(network.tokens(captions), expected)
