"""The Fréchet distance between two sets of features, each taken as a Gaussian, from streaming float64 moments.

    d² = |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½

Covariances are unbiased (divided by N − 1). With N no larger than the number of dimensions a covariance has not
full rank and the distance is far too large, whatever the images: `Moments.rank_deficient` says so, and whoever
prints the number must too.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64

from ulx.aside import write_aside

__all__ = ["Moments", "frechet_distance"]

_FORMAT = "ulx moments 1"


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moments of features, all that the distance needs; they add up by `merge`.

    `m2` is the sum over examples of (x − mean)(x − mean)ᵀ, symmetric.
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    m2: Float64[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"], rows: int = 4096) -> "Moments":
        """The moments of an array of features; `rows` at a time are held in float64.

        Raises ValueError for a feature that is not finite.
        """
        parts = [features[i : i + rows] for i in range(0, len(features), rows)]
        moments = cls.empty(features.shape[1])
        for part in parts:
            moments = moments.merge(_centred(part, moments.count))
        return moments

    @classmethod
    def empty(cls, dims: int) -> "Moments":
        """The moments of no features, the start for `update`."""
        return cls(0, np.zeros(dims), np.zeros((dims, dims)))

    def update(self, features: Float[np.ndarray, "n d"]) -> "Moments":
        """These moments with more features added: `Moments.of(a).update(b)` is `Moments.of` of both."""
        return self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan, Golub and LeVeque 1979). Order does not matter beyond rounding."""
        if self.dims != other.dims:
            raise ValueError(f"moments of {self.dims} and of {other.dims} features cannot be merged")
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def dims(self) -> int:
        """The number of features."""
        return len(self.mean)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few examples, N ≤ dims, for a covariance of full rank."""
        return self.count <= self.dims

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """The unbiased covariance, m2/(N − 1). Raises ValueError with fewer than two examples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two examples, there are {self.count}")
        return self.m2 / (self.count - 1)

    def save(self, path: str | Path, key: str) -> None:
        """Writes an `.npz` under the exact name `path`, complete or not at all.

        `key` must identify all that went in (network, preprocessing, data, split, ...); `load` asks for it again.
        """
        path = Path(path)
        with write_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, format=_FORMAT, key=key, count=self.count, mean=self.mean, m2=self.m2)

    @classmethod
    def load(cls, path: str | Path, key: str) -> "Moments":
        """Reads what `save` wrote under the same `key`.

        Raises FileNotFoundError, or ValueError if the file is damaged or was saved under another key, so that
        moments of other data or of another network are never taken for these.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                kind, found = str(file["format"]), str(file["key"])
                moments = cls(int(file["count"]), file["mean"], file["m2"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file of moments") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a readable file of moments ({error}): delete it") from error
        if kind != _FORMAT:
            raise ValueError(f"{path} has format {kind!r}, expected {_FORMAT!r}: delete it")
        if found != key:
            raise ValueError(f"{path} holds moments of something else:\n  found    {found}\n  expected {key}")
        return moments


def _centred(features: Float[np.ndarray, "n d"], first: int) -> Moments:
    """The moments of one block of rows; `first` is the index of its first row, for the error."""
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        row = first + int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise ValueError(f"the features of example {row} are not finite")
    mean = x.mean(axis=0)
    x -= mean
    return Moments(len(x), mean, x.T @ x)


def frechet_distance(a: Moments, b: Moments) -> float:
    """d² between the Gaussians of a and b: never negative, complex or NaN, and symmetric up to rounding.

    Raises ValueError if the numbers of features differ or one side has fewer than two examples.
    """
    if a.dims != b.dims:
        raise ValueError(f"features of {a.dims} and of {b.dims} dimensions cannot be compared")
    cov_a, cov_b = a.covariance, b.covariance
    # With Σ = S Sᵀ, tr (Σ_a Σ_b)^½ is the sum of the singular values of S_aᵀ S_b. A square root of the product's
    # eigenvalues would turn their rounding, 1e-16, into 1e-8 for every direction in which a covariance is null.
    cross = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return max(float(distance), 0.0)


def _root(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """S with Σ = S Sᵀ, one column for each eigenvalue that stands out of the rounding."""
    values, vectors = np.linalg.eigh(covariance)
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])
