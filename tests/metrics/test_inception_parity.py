"""FID's InceptionV3, its resizes and the Fréchet distance against the packages that people use, torch-fidelity, jax-fid
and clean-fid, with drawn weights in files that torch wrote (`-m parity`; CONTRIBUTING says what to install)."""

import pickle
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from test_inception import drawn, nested, own_shapes, relative, x255_after

from ulx.metrics import inception
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.inception import LAYERS, preprocess

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def fidelity(torch):
    """torch-fidelity. It imports torchvision, which nothing here needs; beside torch's build for the CPU there is none
    that works, and a shell takes its place."""
    try:
        import torchvision  # noqa: F401 # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        names = ("", ".datasets", ".transforms", ".transforms.functional")
        shells = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
        for data in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(shells["torchvision.datasets"], data, object)
        sys.modules.update(shells)
    return pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def images():
    """Two images of 40×56: noise, and a smooth one with every channel different."""
    y, x = np.mgrid[0:40, 0:56] / 40
    smooth = 127 + 120 * np.stack([np.sin(5 * x + 3 * y), np.cos(7 * x * y), np.sin(9 * y)], axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3))
    return np.stack([noise, smooth]).astype(np.uint8)


@pytest.fixture(scope="module")
def files(torch, tmp_path_factory):
    """The same weights as torch writes them now, as it did before 1.6, and as jax-fid's pickle."""
    state, folder = drawn(own_shapes()), tmp_path_factory.mktemp("weights")
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    torch.save(tensors, folder / "new.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "weights.pickle").write_bytes(pickle.dumps(nested(state), 4))
    return folder


@pytest.mark.parametrize("file", ["new.pth", "old.pth", "weights.pickle"])
def test_every_layer_features_and_logits(torch, fidelity, files, images, file):
    network = inception.load(files / file)
    options = {"feature_extractor_weights_path": str(files / "new.pth")}
    reference = fidelity.FeatureExtractorInceptionV3("parity", ["2048", "logits"], **options).double()
    x = preprocess(jnp.asarray(images / 127.5 - 1, jnp.float32), "tf1-bilinear")
    y = torch.from_numpy(np.array(x, np.float64).transpose(0, 3, 1, 2))
    # Both go on with their own: torch in float64, so that the error is ours, of up to 94 float32 convolutions one after
    # another. Asked is 1e-4; a wrong padding, pooling, order of branches or ε is above 1e-3.
    for name, layer in zip(LAYERS, network.layers, strict=True):
        x, y = eqx.filter_jit(layer)(x), getattr(reference, name)(y)
        error = relative(x, y.numpy().transpose(0, 2, 3, 1))
        print(f"{name}: {error:.1e}, spread {y.std().item():.2f}")
        assert error < 1e-5, f"{name}: {error}"
    # Its own resize and scaling too, in float32, from bytes.
    features, logits = reference.float()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    x = jnp.asarray(images / 127.5 - 1, jnp.float32)
    for found, expected in ((network(x), features), (network.logits(x), logits)):
        error = relative(found, expected.numpy())
        print(f"{expected.shape[1]} outputs: {error:.1e}")
        assert error < 1e-4  # asked; two float32 networks


@pytest.mark.parametrize("size", [32, 64, 256, 299, 512])
def test_classic_resize_is_torch_fidelity_s(torch, fidelity, size):
    from torch_fidelity.interpolate_compat_tensorflow import (  # pyright: ignore[reportMissingImports]
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )

    x255 = np.random.default_rng(size).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    expected = resize(torch.from_numpy(x255.transpose(0, 3, 1, 2)), size=(299, 299), align_corners=False)
    error = np.abs(x255_after("tf1-bilinear", x255) - expected.numpy().transpose(0, 2, 3, 1)).max()
    print(f"{size}: {error:.1e} of 255")
    assert error < 1e-3  # positions are the same float32 numbers; [-1, 1] and back rounds at 1e-5


@pytest.mark.parametrize("size", [32, 299, 512])
def test_clean_resize_is_clean_fid_s(torch, size):
    clean = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    images = np.random.default_rng(size).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    expected = np.stack([clean(image) for image in images])
    error = np.abs(x255_after("clean-bicubic", images) - expected).max()
    print(f"{size}: {error:.1e} of 255")
    assert error < 1e-3  # both round at 1e-5 after each axis


def test_features_are_jax_fid_s(monkeypatch, files, images):
    """Its own reader of its pickle, and its Flax network; it leaves resize and scaling to the caller."""
    theirs = pytest.importorskip("jax_fid.inception")
    monkeypatch.setattr(theirs.utils, "download", lambda path: files / "weights.pickle")
    x = preprocess(jnp.asarray(images / 127.5 - 1, jnp.float32), "clean-bicubic")
    model = theirs.InceptionV3(pretrained=True)
    with jax.default_matmul_precision("highest"):
        variables = model.init(jax.random.key(0), x, train=False)
        expected = np.asarray(model.apply(variables, x, train=False))[:, 0, 0]
    error = relative(eqx.filter_jit(inception.load(files / "weights.pickle").pooled)(x), expected)
    print(f"jax-fid: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("dims", [16, 256])
def test_frechet_distance_by_two_others(fidelity, dims):
    """Matrix square root by Schur's method, and torch-fidelity's eigenvalues of the product."""
    from torch_fidelity import metric_fid  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(dims)
    a, b = (rng.normal(size=(4 * dims, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(size=dims) for _ in range(2))
    found = frechet_distance(Moments.of(a), Moments.of(b))
    statistics = [{"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)} for x in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]
    root = scipy.linalg.sqrtm(statistics[0]["sigma"] @ statistics[1]["sigma"])
    delta = statistics[0]["mu"] - statistics[1]["mu"]
    traces = sum(np.trace(each["sigma"]) for each in statistics)
    by_schur = delta @ delta + traces - 2 * np.trace(root).real
    print(f"{dims}: {found / theirs - 1:.1e} and {found / by_schur - 1:.1e}")
    assert found == pytest.approx(theirs, rel=1e-10)  # measured at most 1e-13: the covariances have full rank
    assert found == pytest.approx(by_schur, rel=1e-10)
