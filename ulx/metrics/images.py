"""Errors between images, and the search for an image's nearest neighbour in a reference set."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int, Int64, Num

__all__ = ["SSIM_WINDOW", "nearest", "psnr", "ssim"]

SSIM_WINDOW = 11
"""Pixels each way, under a Gaussian of σ = 1.5."""
_SSIM_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(
    a: Float[Array, " b *shape"] | Float[np.ndarray, " b *shape"],
    b: Float[Array, "..."] | Float[np.ndarray, "..."],
) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio of each image (or clip) in dB, for values in [-1, 1]: 10 log10(2²/MSE).

    Inputs are used as they are, neither clipped nor rounded. Equal images give +inf: a set that has some has no
    finite mean, and its median still says something. Raises ValueError unless both have the same shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr compares images of one shape, got {a.shape} and {b.shape}")
    difference = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
    mse = jnp.mean(difference**2, axis=tuple(range(1, difference.ndim)))
    return 10.0 * jnp.log10(4.0 / mse)


def ssim(
    a: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"],
    b: Float[Array, "..."] | Float[np.ndarray, "..."],
) -> Float[Array, " b"]:
    """Structural similarity of each image (Wang et al. 2004), 1 for equal ones, for values in [-1, 1].

        (2 μ_a μ_b + C₁)(2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁)(σ_a² + σ_b² + C₂)),   C₁ = 0.01², C₂ = 0.03²

    in every channel by itself, then averaged over positions and channels. Means and (co)variances are under a Gaussian
    window of 11×11 pixels with σ = 1.5, only where it lies within the image: nothing is padded, nothing downsampled.
    Values are first taken to [0, 1], the data range of 1 behind C₁ and C₂: the means, other than PSNR, do not come out
    the same in [-1, 1]. They are neither clipped nor rounded.
    Raises ValueError unless both have the same shape, of at least 11 pixels each way.
    """
    if a.shape != b.shape:
        raise ValueError(f"ssim compares images of one shape, got {a.shape} and {b.shape}")
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels, got {a.shape[1]}×{a.shape[2]}"
        )
    x, y = ((jnp.asarray(image, jnp.float32) + 1.0) / 2.0 for image in (a, b))
    # Variances are those of values from which the image's mean is taken: E x² − (E x)² of the values themselves would
    # cancel to noise of the size of C₂ · 1e-4 where a bright image is flat.
    x_mean, y_mean = (jnp.mean(image, axis=(1, 2), keepdims=True) for image in (x, y))
    x, y = x - x_mean, y - y_mean
    mu_x, mu_y, xx, yy, xy = _windowed(jnp.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = xx - mu_x**2, yy - mu_y**2, xy - mu_x * mu_y
    mu_x, mu_y = mu_x + x_mean, mu_y + y_mean
    luminance = (2 * mu_x * mu_y + _K1**2) / (mu_x**2 + mu_y**2 + _K1**2)
    structure = (2 * cov + _K2**2) / (var_x + var_y + _K2**2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _windowed(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h2 w2 c"]:
    """Averages under the Gaussian window, one axis after the other, as sums of shifted copies."""
    weights = np.exp(-0.5 * ((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / _SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (x.ndim - 3, x.ndim - 2):
        size = x.shape[axis] - SSIM_WINDOW + 1
        shifted = (lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(SSIM_WINDOW))
        x = sum((float(w) * part for w, part in zip(weights, shifted, strict=True)), start=jnp.zeros(()))
    return x


def nearest(
    queries: Num[Array, " q *shape"] | Num[np.ndarray, " q *shape"],
    references: Num[Array, "r ..."] | Num[np.ndarray, "r ..."],
    chunk: int = 1024,
    left_out: Int[np.ndarray, " q"] | None = None,
) -> tuple[Int64[np.ndarray, " q"], Float64[np.ndarray, " q"]]:
    """For each query (pixels or features) the index of the closest reference and the Euclidean distance to it.

    The search takes `chunk` queries against `chunk` references at a time, as one matrix product in float64. Of
    references equally close up to rounding any may win. A copy has distance 0 exactly. `left_out` is the index of a
    reference for each query that is not to be found: itself, where queries are among the references.
    Raises ValueError if there are no references or shapes differ.
    """
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(f"queries have shape {queries.shape[1:]}, references {references.shape[1:]}")
    if not len(references):
        raise ValueError("nearest needs at least one reference")
    if left_out is not None and len(references) < 2:
        raise ValueError("nearest needs at least two references when one is left out")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    index = np.zeros(len(queries), np.int64)
    distance = np.full(len(queries), np.inf)
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        query = _rows(queries[part])
        best, closest = index[part], np.full(len(query), np.inf)
        for first in range(0, len(references), chunk):
            reference = _rows(references[first : first + chunk])
            # |q − r|² less |q|², which is the same for every r.
            score = np.einsum("rd,rd->r", reference, reference) - 2.0 * (query @ reference.T)
            if left_out is not None:
                inside = np.flatnonzero((left_out[part] >= first) & (left_out[part] < first + len(reference)))
                score[inside, left_out[part][inside] - first] = np.inf
            column = score.argmin(axis=1)
            lowest = score[np.arange(len(query)), column]
            better = lowest < closest
            best[better], closest[better] = first + column[better], lowest[better]
        # Again from the difference: the expansion above cancels badly where it matters, near zero.
        distance[part] = np.linalg.norm(query - _rows(references[best]), axis=1)
    return index, distance


def _rows(x: Num[Array, " n *shape"] | Num[np.ndarray, " n *shape"]) -> Float64[np.ndarray, "n d"]:
    return np.asarray(x).reshape(len(x), -1).astype(np.float64)
