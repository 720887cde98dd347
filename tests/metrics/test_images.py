"""PSNR by its definition, SSIM against scipy's filters, the nearest neighbour against a search of every pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from ulx.metrics.images import nearest, psnr, ssim


def test_psnr_of_a_known_error():
    a = np.zeros((3, 8, 8, 3), np.float32)
    b = a.copy()
    b[0] += 2.0  # the whole range everywhere: 0 dB
    b[1] += 0.2  # a tenth of the range: 20 dB
    b[2, 0, 0, 0] = 2.0  # one of 192 values: 10 log10 192
    np.testing.assert_allclose(psnr(a, b), [0, 20, 10 * np.log10(192)], atol=1e-4)  # float32 logarithm
    np.testing.assert_array_equal(psnr(a, b), psnr(b, a))


def test_psnr_takes_clips_and_jit_and_both_kinds_of_array():
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 5, 4, 4, 3)).astype(np.float32)
    expected = -10 * np.log10(np.mean(((a.astype(np.float64) - b) / 2) ** 2, axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)  # float32 mean
    np.testing.assert_allclose(jax.jit(psnr)(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)


def test_psnr_of_equal_images_is_infinite():
    a = np.ones((2, 4, 4, 3), np.float32)
    b = a.copy()
    b[1] = 0
    found = np.asarray(psnr(a, b))
    assert found[0] == np.inf
    assert found[1] == pytest.approx(10 * np.log10(4), rel=1e-5)


def test_psnr_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4, 4, 3\) and \(1, 4, 4, 3\)"):
        psnr(np.zeros((2, 4, 4, 3), np.float32), np.zeros((1, 4, 4, 3), np.float32))


def ssim_of_bytes(a, b):
    """The paper's formula on values of 0 to 255, L = 255, in float64; positions whose window leaves the image cut."""
    (c1, c2), x, y = ((k * 255) ** 2 for k in (0.01, 0.03)), a.astype(np.float64), b.astype(np.float64)

    def local(values):
        for axis in (1, 2):
            values = gaussian_filter1d(values, 1.5, axis=axis, radius=5, mode="constant")
        return values[:, 5:-5, 5:-5]

    mean_x, mean_y = local(x), local(y)
    var_x, var_y, cov = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(axis=(1, 2, 3))


def test_ssim_against_scipy():
    """Noise, a gradient that is noised a little, dark, bright and almost flat images; not square."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (23, 17, 3))
    ramp = np.broadcast_to(np.linspace(10, 240, 17)[None, :, None], (23, 17, 3))
    flat = np.full((23, 17, 3), 250) + rng.integers(0, 2, (23, 17, 3))
    a = np.stack([noise, ramp, 255 - ramp, noise // 32, flat]).round().astype(np.uint8)
    moved = np.stack([noise[::-1], ramp, ramp, noise // 16, flat - 40])
    b = (moved + rng.integers(-3, 4, moved.shape)).clip(0, 255).astype(np.uint8)
    expected = ssim_of_bytes(a, b)
    found = jax.jit(ssim)(*(jnp.asarray(image, jnp.float32) / 127.5 - 1 for image in (a, b)))
    # float32 moments of values up to 1 against C₂ = 9e-4: some 1e-8 / 1e-3; measured 5e-7.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert expected.min() < 0 < 0.9 < expected.max()
    swapped = jax.jit(ssim)(*(jnp.asarray(image, jnp.float32) / 127.5 - 1 for image in (b, a)))
    np.testing.assert_allclose(found, swapped, atol=1e-6)  # a fused product rounds one side: 6e-8 on one core


def test_ssim_of_equal_and_of_constant_images():
    a = np.random.default_rng(0).uniform(-1, 1, (4, 11, 11, 3)).astype(np.float32)
    apply = jax.jit(ssim)
    np.testing.assert_allclose(apply(a, a), 1, atol=1e-6)
    x, y = np.array([0.0, 0.2, 0.9, 1.0]), np.array([0.0, 0.9, 0.8, 0.0])
    expected = (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4)  # in [0, 1], where nothing varies
    constant = (np.broadcast_to((2 * v - 1)[:, None, None, None], (4, 11, 11, 3)).astype(np.float32) for v in (x, y))
    np.testing.assert_allclose(apply(*constant), expected, atol=1e-6)  # float32 of values up to 1


def test_ssim_refuses():
    a = np.zeros((2, 11, 11, 3), np.float32)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 11, 11, 3\) and \(1, 11, 11, 3\)"):
        ssim(a, a[:1])
    with pytest.raises(ValueError, match="at least 11×11 pixels, got 11×10"):
        ssim(a[:, :, :10], a[:, :, :10])


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_nearest_finds_what_an_exhaustive_search_finds(chunk):
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(23, 3, 4)), rng.normal(size=(50, 3, 4))
    pairs = np.sqrt(((queries[:, None] - references[None]) ** 2).sum(axis=(2, 3)))
    index, distance = nearest(queries, references, chunk)
    np.testing.assert_array_equal(index, pairs.argmin(axis=1))
    np.testing.assert_allclose(distance, pairs.min(axis=1), rtol=1e-13)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_copies_are_at_distance_zero(kind):
    # Differences of uint8 must not wrap, and a copy among close images far from the origin must win.
    references = np.full((40, 6, 6, 3), 200).astype(kind)
    references += (np.arange(40) % 40).astype(kind)[:, None, None, None]
    index, distance = nearest(references[[31, 4]], references, chunk=16)
    np.testing.assert_array_equal(index, [31, 4])
    np.testing.assert_array_equal(distance, 0)
    index, distance = nearest(references[:1] - np.array(3, kind), references, chunk=16)
    assert index == 0
    assert distance == pytest.approx(3 * np.sqrt(108), rel=1e-12)


def test_nearest_of_nothing():
    index, distance = nearest(jnp.zeros((0, 5)), jnp.zeros((3, 5)))
    assert index.shape == distance.shape == (0,)
    with pytest.raises(ValueError, match="at least one reference"):
        nearest(np.zeros((2, 5)), np.zeros((0, 5)))
    with pytest.raises(ValueError, match=r"queries have shape \(5,\), references \(4,\)"):
        nearest(np.zeros((2, 5)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        nearest(np.zeros((2, 5)), np.zeros((3, 5)), chunk=0)
