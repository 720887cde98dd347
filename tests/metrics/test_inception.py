"""FID's InceptionV3 with drawn weights, against a float64 numpy network that keeps batch norm apart and pads by its own
arithmetic; resizes against PIL and against the definition; files. With torch's network: test_inception_parity.py."""

import hashlib
import pickle
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from torch_files import legacy_file, tensors, zip_file

from ulx.metrics import inception
from ulx.metrics.inception import LAYERS, SHA256, definition, from_state_dict, preprocess


def drawn(shapes, seed=0):
    """A state dict under which activations neither die nor explode: outputs of a convolution have the variance that
    its batch norm divides by, from a hundredth (where ε counts) to ten."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("conv.weight"):
            variance = 10 ** rng.uniform(-2, 1, shape[0])
            norm = name.removesuffix("conv.weight") + "bn"
            state[name] = rng.normal(size=shape) * np.sqrt(2 * variance / np.prod(shape[1:]))[:, None, None, None]
            state[f"{norm}.running_var"] = variance
            state[f"{norm}.running_mean"] = rng.normal(size=shape[0]) * np.sqrt(variance) / 5
            state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, shape[0])
            state[f"{norm}.bias"] = rng.normal(size=shape[0]) / 5
            state[f"{norm}.num_batches_tracked"] = np.array(1000)
        elif name.startswith("fc."):
            state[name] = rng.normal(size=shape) / np.sqrt(inception.FEATURES)
    return {name: value if value.ndim == 0 else value.astype(np.float32) for name, value in state.items()}


def own_shapes():
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

    def conv(name, c_in, c_out, kernel=(1, 1), *_):
        shapes[f"{name}.conv.weight"] = (c_out, c_in, *kernel)
        return abs  # some layer

    inception._layers(conv)
    return shapes


def relative(found, expected):
    """The largest error over the largest value: what float32 rounding bounds (small entries are differences)."""
    assert found.shape == expected.shape
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def state():
    return drawn(own_shapes())


@pytest.fixture(scope="module")
def network(state):
    return from_state_dict(state)


class Reference:
    """float64, `b h w c`, from the raw state dict."""

    def __init__(self, state):
        self.state = state

    def conv(self, x, name, stride=1, same=True):
        get = lambda part: self.state[f"{name}.{part}"].astype(np.float64)  # noqa: E731
        weight = get("conv.weight")
        height, width = weight.shape[2:]
        if same:
            x = np.pad(x, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(1, 2))[:, ::stride, ::stride]
        y = np.tensordot(windows, weight, axes=((3, 4, 5), (1, 2, 3)))
        y = (y - get("bn.running_mean")) / np.sqrt(get("bn.running_var") + 0.001) * get("bn.weight") + get("bn.bias")
        return np.maximum(y, 0)

    @staticmethod
    def pool(x, reduce, stride=1, same=True):
        """Over the pixels that there are: padding is NaN, and left out."""
        if same:
            x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
        return reduce(windows, axis=(4, 5))

    def layer(self, name, x):
        conv = lambda x, part, **options: self.conv(x, f"{name}.{part}", **options)  # noqa: E731
        join = lambda *parts: np.concatenate(parts, axis=-1)  # noqa: E731
        if name.startswith("Conv2d"):
            valid = name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3")
            return self.conv(x, name, stride=2 if name == "Conv2d_1a_3x3" else 1, same=not valid)
        if name.startswith("MaxPool"):
            return self.pool(x, np.nanmax, stride=2, same=False)
        if name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            five = conv(conv(x, "branch5x5_1"), "branch5x5_2")
            double = conv(conv(conv(x, "branch3x3dbl_1"), "branch3x3dbl_2"), "branch3x3dbl_3")
            return join(conv(x, "branch1x1"), five, double, conv(self.pool(x, np.nanmean), "branch_pool"))
        if name == "Mixed_6a":
            double = conv(conv(x, "branch3x3dbl_1"), "branch3x3dbl_2")
            double = conv(double, "branch3x3dbl_3", stride=2, same=False)
            return join(
                conv(x, "branch3x3", stride=2, same=False), double, self.pool(x, np.nanmax, stride=2, same=False)
            )
        if name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            seven, double = x, x
            for i in range(1, 4):
                seven = conv(seven, f"branch7x7_{i}")
            for i in range(1, 6):
                double = conv(double, f"branch7x7dbl_{i}")
            return join(conv(x, "branch1x1"), seven, double, conv(self.pool(x, np.nanmean), "branch_pool"))
        if name == "Mixed_7a":
            three = conv(conv(x, "branch3x3_1"), "branch3x3_2", stride=2, same=False)
            seven = conv(conv(conv(x, "branch7x7x3_1"), "branch7x7x3_2"), "branch7x7x3_3")
            seven = conv(seven, "branch7x7x3_4", stride=2, same=False)
            return join(three, seven, self.pool(x, np.nanmax, stride=2, same=False))
        three = conv(x, "branch3x3_1")
        double = conv(conv(x, "branch3x3dbl_1"), "branch3x3dbl_2")
        pooled = self.pool(x, np.nanmean if name == "Mixed_7b" else np.nanmax)
        return join(
            conv(x, "branch1x1"),
            *(conv(three, f"branch3x3_2{part}") for part in "ab"),
            *(conv(double, f"branch3x3dbl_3{part}") for part in "ab"),
            conv(pooled, "branch_pool"),
        )


def test_every_layer_and_the_features(network, state):
    """107×143 pixels end as 2×3: small, and its borders, where the pools differ, are most of it."""
    reference = Reference(state)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 107, 143, 3)).astype(np.float32).astype(np.float64)
    first = x
    assert len(network.layers) == len(LAYERS)
    for name, layer in zip(LAYERS, network.layers, strict=True):
        y = reference.layer(name, x)
        # One to five float32 convolutions of up to 3,456 terms, fed with the reference's input: measured at most
        # 8e-7. A wrong tap, padding, pooling or ε is far above 1e-3.
        error = relative(layer(jnp.asarray(x, jnp.float32)), y)
        print(f"{name}: {error:.1e}")
        assert error < 1e-5, f"{name}: {error}"
        assert 0.1 < y.std() < 10, f"{name} dies or explodes"
        x = y
    assert x.shape == (1, 2, 3, 2048)
    features = x.mean(axis=(1, 2))
    # 94 convolutions, one after another where they are not beside each other: measured 3e-7.
    assert relative(network.pooled(jnp.asarray(first, jnp.float32)), features) < 1e-5
    logits = features @ state["fc.weight"].T.astype(np.float64) + state["fc.bias"]
    assert relative(network.classifier(jnp.asarray(features, jnp.float32)), logits) < 1e-5


def test_images_are_resized_first_and_logits_are_the_classifier_of_the_features(network):
    images = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (3, 32, 32, 3)), jnp.float32)
    short = eqx.tree_at(lambda net: net.layers, network, (lambda x: jnp.tile(x[..., :2], 1024),))
    for resize in ("tf1-bilinear", "clean-bicubic"):
        short = from_resize(short, resize)
        features = short(images)
        expected = np.tile(np.asarray(preprocess(images, resize)).mean(axis=(1, 2))[:, :2], 1024)
        np.testing.assert_allclose(features, expected, atol=1e-5)  # float32 means of 89,401
        assert short.logits(images).shape == (3, inception.CLASSES)
        assert relative(short.logits(images), np.asarray(network.classifier(features), np.float64)) < 1e-5


def from_resize(network, resize):
    return inception.InceptionV3(network.layers, network.classifier, resize, network.sha256)


def test_parameters_are_all_there(network):
    # Keras gives InceptionV3 without its top 21,802,784, of which 2 · 17,216 are running statistics.
    trunk, classifier = 21_802_784 - 2 * 17_216, 2048 * 1008 + 1008
    assert sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array))) == trunk + classifier


# --- preprocessing ---


def x255_after(resize, x255):
    """What the network is given, undone to [0, 255]."""
    return np.asarray(preprocess(jnp.asarray(x255 / 127.5 - 1, jnp.float32), resize) * 128 + 128)


SIZES = [(32, 32), (64, 96), (299, 299), (300, 299), (512, 700)]


@pytest.mark.parametrize("shape", SIZES)
def test_clean_resize_is_pil_s(shape):
    x255 = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.float32)

    def channel(x):
        return np.asarray(Image.fromarray(x).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)

    expected = np.stack([np.stack([channel(image[..., c]) for c in range(3)], axis=-1) for image in x255])
    # Both sum in float32 (PIL in float64, rounded after each axis): some 1e-7 of 255.
    np.testing.assert_allclose(x255_after("clean-bicubic", x255), expected, atol=1e-3)
    if max(shape) <= 300:  # where it shrinks, noise averages to grey
        assert (expected.min(), expected.max()) == (0, 255)  # a cubic overshoots, and is cut


@pytest.mark.parametrize("shape", SIZES)
def test_classic_resize_is_tensorflow_1_s(shape):
    """Pixel i of 299 lies at i · size/299 between its neighbours, one by one; the last has no other neighbour."""
    x255 = np.random.default_rng(0).integers(0, 256, (1, *shape, 3)).astype(np.float64)

    def along(x, axis):
        size, x = x.shape[axis], np.moveaxis(x, axis, 0)
        rows = []
        for i in range(299):
            below, share = divmod(i * size / 299, 1)
            rows.append(x[int(below)] * (1 - share) + x[min(int(below) + 1, size - 1)] * share)
        return np.moveaxis(np.stack(rows), 0, axis)

    expected = along(along(x255, 1), 2)
    # Positions are float32 (6e-8 of up to 700 pixels, by 255 levels a pixel).
    np.testing.assert_allclose(x255_after("tf1-bilinear", x255), expected, atol=2e-2)
    if shape == (299, 299):
        np.testing.assert_allclose(expected, x255)


# --- files ---


def nested(state):
    """jax-fid's pickle: nested dicts, channels last."""
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    tree = {}
    for name, value in state.items():
        *path, kind, part = name.split(".")
        if part == "num_batches_tracked":
            continue
        place = tree
        for step in (*path, kind):
            place = place.setdefault(step, {})
        if kind == "conv":
            place["kernel"] = value.transpose(2, 3, 1, 0)
        elif kind == "fc":
            place["kernel" if part == "weight" else "bias"] = value.T
        else:
            place[names[part]] = value
    return tree


def same(a, b):
    assert jax.tree.structure(eqx.filter(a, eqx.is_array)) == jax.tree.structure(eqx.filter(b, eqx.is_array))
    for x, y in zip(*(jax.tree.leaves(eqx.filter(net, eqx.is_array)) for net in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_all_formats_give_the_same_network_and_their_hash(network, state, tmp_path, monkeypatch):
    tree = nested(state)
    tree["AuxLogits"] = {"conv0": {"conv": {"kernel": np.zeros((1, 1, 768, 128), np.float32)}}}
    for name, data in (
        ("new.pth", zip_file(tensors(state))),
        ("old.pth", legacy_file(tensors(state))),
        ("weights.pickle", pickle.dumps(tree, 4)),
    ):
        (tmp_path / name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        with pytest.warns(UserWarning, match=rf"{name} is none of the files that FID is measured by .*{sha256[:8]}"):
            loaded = inception.load(tmp_path / name, "clean-bicubic")
        assert loaded.sha256 == sha256
        assert loaded.definition == definition(sha256, "clean-bicubic")
        same(eqx.filter(loaded.layers, eqx.is_array), eqx.filter(network.layers, eqx.is_array))
        same(loaded.classifier, network.classifier)
    monkeypatch.setitem(SHA256, sha256, "known")
    with warnings.catch_warnings(action="error"):
        inception.load(tmp_path / name)


def test_definitions_tell_weights_and_resizes_apart():
    known, unknown = next(iter(SHA256)), "ab" * 32
    definitions = {definition(sha256, resize) for sha256 in (*SHA256, unknown) for resize in inception.METRICS}
    assert len(definitions) == 6
    assert "not a known file" not in definition(known, "tf1-bilinear")
    assert "not a known file" in definition(unknown, "tf1-bilinear")
    assert "tf1-bilinear" in definition(known, "tf1-bilinear")
    assert list(inception.METRICS.values()) == ["fid", "clean_fid"]


def test_other_weights_are_named(state, tmp_path):
    missing = {name: value for name, value in state.items() if name != "Mixed_6d.branch7x7_2.bn.running_var"}
    with pytest.raises(ValueError, match=r"w\.pth: there is no Mixed_6d\.branch7x7_2\.bn\.running_var: these are not"):
        from_state_dict(missing, "w.pth")
    torchvision = state | {"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)}
    with pytest.raises(ValueError, match=r"fc\.weight has shape \(1000, 2048\), expected \(1008, 2048\)"):
        from_state_dict(torchvision)
    turned = state | {"Mixed_6b.branch7x7_2.conv.weight": np.zeros((128, 128, 7, 1))}
    with pytest.raises(ValueError, match=r"Mixed_6b\.branch7x7_2\.conv\.weight has shape \(128, 128, 7, 1\)"):
        from_state_dict(turned)
    with pytest.raises(ValueError, match=r"no place for Mixed_8a\.conv\.weight"):
        from_state_dict(state | {"Mixed_8a.conv.weight": np.zeros(3)})
    with pytest.raises(FileNotFoundError, match=r"w\.pth is no file: name the weights.*6726825d\.pth or .*\.pickle"):
        inception.load(tmp_path / "w.pth")
    other = {"w": np.ones(3)}
    for data in (zip_file(tensors(other)), legacy_file(tensors(other)), pickle.dumps(other, 4), pickle.dumps({})):
        (tmp_path / "w.pth").write_bytes(data)
        with pytest.raises(ValueError, match=r"w\.pth: there is no Conv2d_1a_3x3\.conv\.weight"):
            inception.load(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"w\.pth: not a pickle of arrays"):
        inception.load(tmp_path / "w.pth")


def test_a_file_without_a_classifier_gives_features_alone(state):
    features_only = {name: value for name, value in state.items() if not name.startswith("fc.")}
    network = from_state_dict(features_only)
    with pytest.raises(ValueError, match="holds no classifier"):
        network.logits(jnp.zeros((1, 32, 32, 3)))
