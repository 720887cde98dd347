"""The one place where stored pixels become model values and back. NumPy and JAX arrays alike, traced or not."""

from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8

__all__ = ["to_float", "to_uint8"]

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


def to_float(images: UInt8[AnyArray, "..."]) -> Float[AnyArray, "..."]:
    """uint8 0..255 -> float32 in [-1, 1]."""
    # One rounding, in the division: what comes before it is exact.
    return (images.astype(np.float32) * np.float32(2) - np.float32(255)) / np.float32(255)


def to_uint8(images: Float[AnyArray, "..."]) -> UInt8[AnyArray, "..."]:
    """Values in [-1, 1] -> uint8, rounded to the nearest; what lies outside is clipped."""
    scaled = (images.astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return scaled.round().clip(0, 255).astype(np.uint8)
