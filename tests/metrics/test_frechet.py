"""The Fréchet distance where it is known, and moments that do not care how the features arrived."""

import errno

import numpy as np
import pytest
import scipy.linalg

from ulx.metrics.frechet import Moments, frechet_distance


def gaussian(mean, covariance, count=1000):
    """Moments with exactly this mean and (unbiased) covariance."""
    return Moments(count, np.asarray(mean, np.float64), np.asarray(covariance, np.float64) * (count - 1))


def random_covariance(seed, dims=20, rank=None):
    factor = np.random.default_rng(seed).normal(size=(dims, rank or 2 * dims))
    return factor @ factor.T / factor.shape[1]


def draw(count, dims=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(size=dims) * 10


# --- the distance ---


def test_commuting_gaussians():
    # Σ = Q diag(w) Qᵀ with one Q: d² = Σ (√w_a − √w_b)² + |Δμ|²; 1e-12 relative is float64 at 30 dimensions.
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    w_a, w_b, delta = rng.uniform(0, 4, 30), rng.uniform(0, 9, 30), rng.normal(size=30)
    found = frechet_distance(gaussian(np.zeros(30), q * w_a @ q.T), gaussian(delta, q * w_b @ q.T))
    assert found == pytest.approx(np.sum((np.sqrt(w_a) - np.sqrt(w_b)) ** 2) + delta @ delta, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_other_gaussians_against_scipy(seed):
    # scipy's Schur method is independent of ours and good to about 1e-12 for well-conditioned matrices.
    a, b = random_covariance(seed), 3 * random_covariance(seed + 100)
    assert np.abs(a @ b - b @ a).max() > 0.1
    delta = np.random.default_rng(seed).normal(size=20)
    root = scipy.linalg.sqrtm(a @ b)
    expected = delta @ delta + np.trace(a) + np.trace(b) - 2 * np.trace(root).real
    moments = gaussian(delta, a), gaussian(np.zeros(20), b)
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(*moments[::-1]) == pytest.approx(expected, rel=1e-10)


def test_zero_for_equal_and_squared_length_for_translated():
    features = draw(500)
    moments, moved = Moments.of(features), Moments.of(features + np.arange(16))
    scale = np.trace(moments.covariance)
    assert 0 <= frechet_distance(moments, moments) < 1e-12 * scale
    for seed in range(10):  # rounding falls on either side of zero
        moments_of_few = Moments.of(draw(30, seed=seed))
        assert frechet_distance(moments_of_few, moments_of_few) >= 0
    assert frechet_distance(moments, moved) == pytest.approx(np.sum(np.arange(16) ** 2), abs=1e-11 * scale)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rank_deficient_covariances_are_exact(scale):
    # Two planes in 200 dimensions that share one axis: d² in the plane is known, and the 197 null directions
    # must add nothing. Square roots of rounded eigenvalues would miss by 1e-6 relative; ours by 1e-12.
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(200, 3)))[0] * scale
    a = 4 * np.outer(q[:, 0], q[:, 0]) + np.outer(q[:, 1], q[:, 1])
    b = 9 * np.outer(q[:, 0], q[:, 0]) + np.outer(q[:, 2], q[:, 2])
    found = frechet_distance(gaussian(np.zeros(200), a), gaussian(np.zeros(200), b))
    assert found == pytest.approx(((3 - 2) ** 2 + 1 + 1) * scale**2, rel=1e-10)


def test_few_examples_give_a_labelled_finite_number():
    few, many = Moments.of(draw(16, seed=1)), Moments.of(draw(17, seed=1))
    assert (few.rank_deficient, many.rank_deficient) == (True, False)  # N ≤ dims = 16, N > dims
    other = Moments.of(draw(5, seed=2))
    distance = frechet_distance(few, other)
    assert np.isfinite(distance)
    assert distance > 0
    # One direction each: points on two orthogonal lines with variances 2 and 8, d² = |Δμ|² + 2 + 8.
    line_a = Moments.of(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    line_b = Moments.of(np.array([[3.0, 2.0], [3.0, -2.0]]))
    assert frechet_distance(line_a, line_b) == pytest.approx(9 + 2 + 8, rel=1e-14)


def test_constant_features_have_no_spread():
    constant = Moments.of(np.ones((10, 3)))
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(constant, Moments.of(np.zeros((4, 3)))) == pytest.approx(3, rel=1e-15)


def test_what_cannot_be_compared_is_refused():
    three, four = Moments.of(draw(10, dims=3)), Moments.of(draw(10, dims=4))
    with pytest.raises(ValueError, match="features of 3 and of 4 dimensions"):
        frechet_distance(three, four)
    with pytest.raises(ValueError, match="of 3 and of 4 features"):
        three.merge(four)
    with pytest.raises(ValueError, match="at least two examples, there are 1"):
        frechet_distance(three, Moments.of(draw(1, dims=3)))
    broken = draw(20, dims=3)
    broken[13, 1] = np.inf
    with pytest.raises(ValueError, match="example 13 are not finite"):
        Moments.of(broken, rows=8)


# --- the moments ---


def same(a, b, tolerance):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=tolerance)
    np.testing.assert_allclose(a.m2, b.m2, rtol=0, atol=tolerance * np.abs(b.m2).max())


def test_moments_are_numpy_s():
    features = draw(300)
    moments = Moments.of(features)
    same(moments, gaussian(features.mean(axis=0), np.cov(features.T), count=300), 1e-13)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_batch_size_does_not_matter(batch):
    features = draw(1000)
    moments = Moments.empty(16)
    for i in range(0, 1000, batch):
        moments = moments.update(features[i : i + batch])
    same(moments, Moments.of(features), 1e-10)
    same(Moments.of(features, rows=batch), Moments.of(features), 1e-10)
    reference = Moments.of(draw(400, seed=5))
    found, expected = frechet_distance(moments, reference), frechet_distance(Moments.of(features), reference)
    assert found == pytest.approx(expected, rel=1e-10)


def test_merging_is_taking_them_together():
    a, b, c = draw(100, seed=1), draw(3, seed=2) + 50, draw(1, seed=3)
    together = Moments.of(np.concatenate([a, b, c]))
    a, b, c = Moments.of(a), Moments.of(b), Moments.of(c)
    same(a.merge(b).merge(c), together, 1e-12)
    same(c.merge(a.merge(b)), together, 1e-12)
    same(Moments.empty(16).merge(a), a, 0)
    same(a.merge(Moments.empty(16)), a, 0)


def test_a_large_mean_does_not_eat_the_spread():
    # E[x²] − E[x]² would lose all: 1e8² against a variance of about 1. float32 features must not round either.
    features = np.random.default_rng(0).normal(size=(5000, 4))
    moments = Moments.of(features + 1e8, rows=100)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), atol=1e-7)  # input rounding 1.5e-8
    coarse = np.random.default_rng(1).normal(size=(5000, 4)).astype(np.float32) + np.float32(1000)
    np.testing.assert_allclose(Moments.of(coarse).covariance, np.cov(coarse.T.astype(np.float64)), rtol=1e-10)


# --- the file ---


def test_saved_moments_come_back_under_their_key_only(tmp_path):
    moments, path = Moments.of(draw(50)), tmp_path / "train.moments"
    moments.save(path, key="openmoji 32 train | network 5793")
    same(Moments.load(path, "openmoji 32 train | network 5793"), moments, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["train.moments"]
    with pytest.raises(ValueError, match=r"train\.moments holds moments of something else") as error:
        Moments.load(path, "openmoji 64 train | network 5793")
    assert "openmoji 32" in str(error.value)
    assert "openmoji 64" in str(error.value)


def test_damaged_or_missing_files_are_named(tmp_path):
    path = tmp_path / "train.npz"
    with pytest.raises(FileNotFoundError, match=r"train\.npz: no such file of moments"):
        Moments.load(path, "k")
    Moments.of(draw(50)).save(path, "k")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for broken in (b"", b"text", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train\.npz is not a readable file of moments"):
            Moments.load(path, "k")
    with path.open("wb") as file:
        np.savez(file, format="another", key="k", count=2, mean=np.zeros(3), m2=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="has format 'another'"):
        Moments.load(path, "k")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path, old = tmp_path / "train.npz", Moments.of(draw(50))
    old.save(path, "k")

    def full(file, **_):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        Moments.of(draw(60)).save(path, "k")
    same(Moments.load(path, "k"), old, 0)
    assert list(tmp_path.iterdir()) == [path]
