"""The InceptionV3 that FID is defined by (2,048 features, 1,008 logits), batched, channels last, inference only.

It is Google's network of 2015-12-05, not torchvision's: other weights, averages that leave the padding out, and a
maximum in the place of the last block's average. Batch norm has ε = 1e-3 and is folded into the convolutions at load,
in float64.

Weights: no package carries them, so the user names a file, `load(path)`. Two files are in use: pytorch-fid's state
dict (of any version of torch) and jax-fid's pickle. `SHA256` knows both; any other file that holds the network's arrays
is taken too, and `definition` tells which one a number came from.

Preprocessing: images in [-1, 1] of any size are resized to 299×299 in one of two ways, then mapped to (x255 − 128)/128.

* `tf1-bilinear`, for FID: TensorFlow 1's bilinear resize, whose pixel i of n lies at i · size/n (its corner, not its
  centre), without antialiasing. (pytorch-fid resizes at centres and maps to x255/127.5 − 1: a little another number.)
* `clean-bicubic`, for Clean-FID (Parmar et al. 2022): PIL's bicubic resize, which antialiases when it shrinks, of each
  channel in float32, then clipped to [0, 255].
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ulx.metrics.layers import PRECISION, Pointwise, in_chunks
from ulx.metrics.weights import is_torch, read_pickled_arrays, read_torch

__all__ = [
    "CLASSES",
    "FEATURES",
    "KERNEL_METRICS",
    "LAYERS",
    "METRICS",
    "RESIZE",
    "RESOLUTION",
    "SHA256",
    "InceptionV3",
    "Resize",
    "check_resize",
    "definition",
    "from_state_dict",
    "load",
    "preprocess",
]

FEATURES = 2048
CLASSES = 1008
RESOLUTION = 299
SHA256 = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "pt_inception-2015-12-05-6726825d.pth",
    "4e030efa5bccac3222d975f658d1884f9e00fab24f2812082884539220b90d77": "inception_v3_weights_fid.pickle",
}
"""The files in use, as many projects pin them."""
Resize = Literal["tf1-bilinear", "clean-bicubic"]
RESIZE: Resize = "tf1-bilinear"
"""FID's own, where no other is asked for."""
METRICS: dict[Resize, str] = {"tf1-bilinear": "fid", "clean-bicubic": "clean_fid"}
"""What the Fréchet distance is called after either resize."""
KERNEL_METRICS: dict[Resize, str] = {"tf1-bilinear": "kid", "clean-bicubic": "clean_kid"}
"""What the kernel distance is called."""
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
"""Names of `InceptionV3.layers`, in order: those of the weights."""

_EPS = 1e-3
# 12 images/s one at a time against 8 for sixteen at once (2 cores under load, jit, jax 0.10.2).
_CPU_CHUNK = 1

Padding = Literal["SAME", "VALID"]
Layer = Callable[[Float[Array, "b h w c_in"]], Float[Array, "b h2 w2 c_out"]]


class Conv(eqx.Module):
    """A convolution with batch norm folded in, then ReLU."""

    weight: Float[Array, "kh kw c_in c_out"]
    bias: Float[Array, " c_out"]
    stride: int = eqx.field(static=True)
    padding: Padding = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        y = lax.conv_general_dilated(
            x,
            self.weight,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=PRECISION,
        )
        return jax.nn.relu(y + self.bias)


class Chain(eqx.Module):
    """Layers one after another."""

    layers: tuple[Layer, ...]

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        for layer in self.layers:
            x = layer(x)
        return x


class Fork(eqx.Module):
    """Branches over the same input, their channels joined."""

    branches: tuple[Layer, ...]

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        return jnp.concatenate([branch(x) for branch in self.branches], axis=-1)


def _maximum(x: Float[Array, "b h w c"], stride: int, padding: Padding) -> Float[Array, "b h2 w2 c"]:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _halving_maximum(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return _maximum(x, 2, "VALID")


def _same_maximum(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return _maximum(x, 1, "SAME")


def _same_average(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean over the 3×3 neighbours that lie within the image, as TensorFlow's."""

    def total(y: Float[Array, "_ h w _c"]) -> Float[Array, "_ h w _c"]:
        return lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


class InceptionV3(eqx.Module):
    """Images in [-1, 1] to 2,048 pooled features; `logits` for its 1,008 classes. Made by `load`."""

    layers: tuple[Layer, ...]
    classifier: Pointwise | None
    resize: Resize = eqx.field(static=True)
    sha256: str = eqx.field(static=True)
    """Of the weights' file."""

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Pooled features (pool3) of images of any size, `b h w 3` in [-1, 1]; quantise first what a PNG would hold."""
        return in_chunks(lambda part: self.pooled(preprocess(part, self.resize)), _CPU_CHUNK, images)

    def logits(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 1008"]:
        """Class scores before the softmax. Raises ValueError if the file held no classifier (fc)."""
        if self.classifier is None:
            raise ValueError("the file of InceptionV3's weights holds no classifier (fc): it gives features alone")
        return self.classifier(self(images))

    def pooled(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Features of what `preprocess` made; each side at least 75 pixels."""
        for layer in self.layers:
            x = layer(x)
        return jnp.mean(x, axis=(1, 2))

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance of these features."""
        return METRICS[self.resize]

    @property
    def kernel_metric(self) -> str:
        """The name of their kernel distance."""
        return KERNEL_METRICS[self.resize]

    @property
    def definition(self) -> str:
        """Which network, weights and preprocessing: part of the key under which moments are cached."""
        return definition(self.sha256, self.resize)


def definition(sha256: str, resize: Resize) -> str:
    """See `InceptionV3.definition`; `sha256` is the weights' file's, and one that is not in `SHA256` is called so."""
    file = sha256[:16] if sha256 in SHA256 else f"{sha256[:16]} (not a known file)"
    return f"inception-v3-2015-12-05 {file} {resize}-{RESOLUTION} (x255-128)/128 pooled-{FEATURES} v1"


# --- Preprocessing ---------------------------------------------------------------------------------------


def check_resize(resize: Resize | None, weights: str | Path | None) -> None:
    """Raises ValueError for a resize that would be shown to no network."""
    if resize is not None and weights is None:
        raise ValueError(
            f"--inception-resize {resize} is how FID's InceptionV3 is shown images: name its file too, by "
            "--inception-weights"
        )


def preprocess(images: Float[Array, "b h w 3"], resize: Resize) -> Float[Array, "b 299 299 3"]:
    """[-1, 1] at any size to the network's input: 299×299 and (x255 − 128)/128 with x255 = 127.5 (x + 1)."""
    x = 127.5 * (images.astype(jnp.float32) + 1.0)
    weights = {"tf1-bilinear": _tf1_bilinear, "clean-bicubic": _pil_bicubic}[resize]
    rows, columns = (weights(size).astype(np.float32) for size in images.shape[1:3])
    x = jnp.einsum("jw,bhwc->bhjc", columns, x, precision=PRECISION)
    x = jnp.einsum("ih,bhjc->bijc", rows, x, precision=PRECISION)
    if resize == "clean-bicubic":  # a cubic overshoots
        x = jnp.clip(x, 0.0, 255.0)
    return (x - 128.0) / 128.0


def _tf1_bilinear(size: int) -> Float[np.ndarray, "299 size"]:
    """What each of 299 pixels takes of `size` pixels. Positions in float32, as TensorFlow has them."""
    position = np.arange(RESOLUTION, dtype=np.float32) * (np.float32(size) / np.float32(RESOLUTION))
    below = position.astype(int)
    share, pixel = position - below, np.arange(RESOLUTION)
    weights = np.zeros((RESOLUTION, size))
    weights[pixel, below] = 1.0 - share
    weights[pixel, np.minimum(below + 1, size - 1)] += share
    return weights


def _pil_bicubic(size: int) -> Float[np.ndarray, "299 size"]:
    """What each of 299 pixels takes of `size` pixels: Keys' cubic with a = −1/2, wider by the factor of shrinking."""
    scale = size / RESOLUTION
    centre = (np.arange(RESOLUTION) + 0.5) * scale - 0.5
    x = np.abs(np.arange(size) - centre[:, None]) / max(scale, 1.0)
    near, far = (1.5 * x - 2.5) * x**2 + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)  # the cubic may reach over the edge


# --- Weights ---------------------------------------------------------------------------------------------


def load(path: str | Path, resize: Resize = RESIZE) -> InceptionV3:
    """The network with the weights of the file, in either format; told apart by their first bytes.

    Raises FileNotFoundError, or ValueError for a file that is neither, or holds other arrays than this network's; warns
    of one that holds them and is not known.
    """
    path = Path(path)
    if not path.is_file():
        known = " or ".join(SHA256.values())
        raise FileNotFoundError(f"{path} is no file: name the weights of FID's InceptionV3, {known}")
    data = path.read_bytes()
    state = read_torch(data, path.name) if is_torch(data) else _from_tree(read_pickled_arrays(data, path.name))
    sha256 = hashlib.sha256(data).hexdigest()
    network = from_state_dict(state, path.name, resize=resize, sha256=sha256)
    if sha256 not in SHA256:
        warnings.warn(
            f"{path} is none of the files that FID is measured by ({', '.join(SHA256.values())}; its sha256 is "
            f"{sha256[:8]}…): with other weights the number is not FID, and the card says by which file it is",
            stacklevel=2,
        )
    return network


_IN_TREE = {
    "conv.kernel": "conv.weight",
    "bn.scale": "bn.weight",
    "bn.mean": "bn.running_mean",
    "bn.var": "bn.running_var",
    "fc.kernel": "fc.weight",
}


def _from_tree(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """jax-fid's arrays under PyTorch's names and with its axes: `out in kh kw` and `out in`."""
    state: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        path = name.split("/")
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        last = ".".join(path[-2:])
        state[".".join((*path[:-2], _IN_TREE.get(last, last)))] = value
    return state


def from_state_dict(
    state: dict[str, np.ndarray], source: str = "weights", *, resize: Resize = RESIZE, sha256: str = ""
) -> InceptionV3:
    """The network from arrays by their PyTorch names; convolutions are `out in kh kw`, batch norms unfolded.

    `source` names the file in errors. Raises ValueError for an array that is missing, of another shape, or unknown.
    """
    # Training's counters, and the auxiliary classifier that inference leaves out.
    left = {
        name: value
        for name, value in state.items()
        if not name.endswith(".num_batches_tracked") and not name.startswith("AuxLogits.")
    }

    def bad(why: str) -> ValueError:
        return ValueError(f"{source}: {why}: these are not the weights of FID's InceptionV3 (2015-12-05)")

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in left:
            raise bad(f"there is no {name}")
        value = np.asarray(left.pop(name))
        if value.shape != shape:
            raise bad(f"{name} has shape {value.shape}, expected {shape}")
        return value.astype(np.float64)

    def conv(
        name: str, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, padding: Padding = "SAME"
    ) -> Conv:
        # γ (w∗x − μ)/√(σ² + ε) + β = (γ/√(σ² + ε)) w∗x + (β − μ γ/√(σ² + ε))
        weight = take(f"{name}.conv.weight", c_out, c_in, *kernel)
        gain, bias, mean, variance = (
            take(f"{name}.bn.{part}", c_out) for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / np.sqrt(variance + _EPS)
        weight = (weight * gain[:, None, None, None]).transpose(2, 3, 1, 0)
        bias = jnp.asarray(bias - mean * gain, jnp.float32)
        return Conv(jnp.asarray(weight, jnp.float32), bias, stride, padding)

    layers = _layers(conv)
    classifier = None
    if "fc.weight" in left:
        weight, bias = take("fc.weight", CLASSES, FEATURES).T, take("fc.bias", CLASSES)
        classifier = Pointwise(jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32))
    if left:
        raise bad(f"there is no place for {', '.join(sorted(left)[:3])}")
    return InceptionV3(layers, classifier, resize, sha256)


MakeConv = Callable[..., Layer]


def _layers(conv: MakeConv) -> tuple[Layer, ...]:
    """The network up to the pooling; `conv(name, c_in, c_out, kernel, stride, padding)` makes each convolution."""
    return (
        conv("Conv2d_1a_3x3", 3, 32, (3, 3), 2, "VALID"),
        conv("Conv2d_2a_3x3", 32, 32, (3, 3), 1, "VALID"),
        conv("Conv2d_2b_3x3", 32, 64, (3, 3)),
        _halving_maximum,
        conv("Conv2d_3b_1x1", 64, 80),
        conv("Conv2d_4a_3x3", 80, 192, (3, 3), 1, "VALID"),
        _halving_maximum,
        _block_a(conv, "Mixed_5b", 192, 32),
        _block_a(conv, "Mixed_5c", 256, 64),
        _block_a(conv, "Mixed_5d", 288, 64),
        _block_b(conv, "Mixed_6a", 288),
        _block_c(conv, "Mixed_6b", 768, 128),
        _block_c(conv, "Mixed_6c", 768, 160),
        _block_c(conv, "Mixed_6d", 768, 160),
        _block_c(conv, "Mixed_6e", 768, 192),
        _block_d(conv, "Mixed_7a", 768),
        _block_e(conv, "Mixed_7b", 1280, _same_average),
        _block_e(conv, "Mixed_7c", 2048, _same_maximum),
    )


def _block_a(conv: MakeConv, name: str, c_in: int, c_pool: int) -> Fork:
    """35×35."""
    five = conv(f"{name}.branch5x5_1", c_in, 48), conv(f"{name}.branch5x5_2", 48, 64, (5, 5))
    double = (
        conv(f"{name}.branch3x3dbl_1", c_in, 64),
        conv(f"{name}.branch3x3dbl_2", 64, 96, (3, 3)),
        conv(f"{name}.branch3x3dbl_3", 96, 96, (3, 3)),
    )
    pool = _same_average, conv(f"{name}.branch_pool", c_in, c_pool)
    return Fork((conv(f"{name}.branch1x1", c_in, 64), Chain(five), Chain(double), Chain(pool)))


def _block_b(conv: MakeConv, name: str, c_in: int) -> Fork:
    """35×35 to 17×17."""
    double = (
        conv(f"{name}.branch3x3dbl_1", c_in, 64),
        conv(f"{name}.branch3x3dbl_2", 64, 96, (3, 3)),
        conv(f"{name}.branch3x3dbl_3", 96, 96, (3, 3), 2, "VALID"),
    )
    return Fork((conv(f"{name}.branch3x3", c_in, 384, (3, 3), 2, "VALID"), Chain(double), _halving_maximum))


def _block_c(conv: MakeConv, name: str, c_in: int, c_mid: int) -> Fork:
    """17×17."""
    seven = (
        conv(f"{name}.branch7x7_1", c_in, c_mid),
        conv(f"{name}.branch7x7_2", c_mid, c_mid, (1, 7)),
        conv(f"{name}.branch7x7_3", c_mid, 192, (7, 1)),
    )
    double = (
        conv(f"{name}.branch7x7dbl_1", c_in, c_mid),
        conv(f"{name}.branch7x7dbl_2", c_mid, c_mid, (7, 1)),
        conv(f"{name}.branch7x7dbl_3", c_mid, c_mid, (1, 7)),
        conv(f"{name}.branch7x7dbl_4", c_mid, c_mid, (7, 1)),
        conv(f"{name}.branch7x7dbl_5", c_mid, 192, (1, 7)),
    )
    pool = _same_average, conv(f"{name}.branch_pool", c_in, 192)
    return Fork((conv(f"{name}.branch1x1", c_in, 192), Chain(seven), Chain(double), Chain(pool)))


def _block_d(conv: MakeConv, name: str, c_in: int) -> Fork:
    """17×17 to 8×8."""
    three = conv(f"{name}.branch3x3_1", c_in, 192), conv(f"{name}.branch3x3_2", 192, 320, (3, 3), 2, "VALID")
    seven = (
        conv(f"{name}.branch7x7x3_1", c_in, 192),
        conv(f"{name}.branch7x7x3_2", 192, 192, (1, 7)),
        conv(f"{name}.branch7x7x3_3", 192, 192, (7, 1)),
        conv(f"{name}.branch7x7x3_4", 192, 192, (3, 3), 2, "VALID"),
    )
    return Fork((Chain(three), Chain(seven), _halving_maximum))


def _block_e(conv: MakeConv, name: str, c_in: int, pool: Layer) -> Fork:
    """8×8."""

    def across_and_down(part: str) -> Fork:
        return Fork(
            (conv(f"{name}.{part}a", 384, 384, (1, 3)), conv(f"{name}.{part}b", 384, 384, (3, 1))),
        )

    three = conv(f"{name}.branch3x3_1", c_in, 384), across_and_down("branch3x3_2")
    double = (
        conv(f"{name}.branch3x3dbl_1", c_in, 448),
        conv(f"{name}.branch3x3dbl_2", 448, 384, (3, 3)),
        across_and_down("branch3x3dbl_3"),
    )
    pooled = pool, conv(f"{name}.branch_pool", c_in, 192)
    return Fork((conv(f"{name}.branch1x1", c_in, 320), Chain(three), Chain(double), Chain(pooled)))
