"""Shape aliases and the one protocol that losses, samplers and guidance know: the denoiser.

Images and latents are channels last with any number of spatial axes: `h w c`, `t h w c`.
"""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Float, Key

__all__ = ["Batch", "Denoise", "Keys", "PerExample", "pytree"]

Class = TypeVar("Class", bound=type)


def pytree(cls: Class) -> Class:
    """Register a frozen dataclass as a pytree, every field data.

    Unlike `jax.tree_util.register_dataclass` it puts one together again without its `__init__`: transformations fill
    the fields with placeholders and with NumPy arrays, and what `__init__` promises (or checks) is for users.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(value: Any):
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(_: None, leaves: Any):
        value = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


Batch = Float[Array, "b *dims"]
"""A batch of clean or noised variables; `*dims` is `h w c`, `t h w c`, or just `d` in a test."""

PerExample = Float[Array, " b"]
"""One number per example: a time `t`, a log-SNR, or nats."""

Keys = Key[Array, ""] | Key[Array, " b"]
"""One random key for a batch, or one for each of its examples (so that noise does not depend on the sharding)."""


@runtime_checkable
class Denoise(Protocol):
    """`denoise(z_t, logsnr, key=None) -> x_hat`: the estimate of the clean variable, in float32.

    Conditioning (labels, z_0, text) is closed over. `key` is for dropout: one key per example, or None when
    sampling and evaluating. The first two are passed by position, so that they may have any names. Whatever the
    network predicts (x, eps or v) has been converted before it gets here.
    """

    def __call__(self, z_t: Batch, logsnr: PerExample, /, *, key: Keys | None = None) -> Batch: ...
