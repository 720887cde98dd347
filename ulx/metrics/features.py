"""A network's features of many images or videos, on the host, in batches of one fixed shape (one compilation).

Each device takes an equal part of every batch, by itself: the number of devices changes nothing beyond rounding. Of
several processes each goes through all images and gets all features.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from ulx.progress import Progress
from ulx.rows import Collected, Stored
from ulx.sharding import BATCH, WHOLE, make_mesh, on_host, place, place_rows

__all__ = ["FeatureNetwork", "Network", "feature_batches", "features"]

# Underscores: the parts of an iterable may differ in length, and a change of size gets an error of its own.
Images = Num[Array, "..."] | Num[np.ndarray, "..."]
Network = Callable[[Float[Array, "b ..."]], Float[Array, "b d"]]


@runtime_checkable
class FeatureNetwork(Protocol):
    """A network of images or of videos, with what a distance between its features has to say of it."""

    def __call__(self, images: Float[Array, "b ..."], /) -> Float[Array, "b d"]: ...

    @property
    def metric(self) -> str:
        """What the Fréchet distance of its features is called."""
        ...

    @property
    def kernel_metric(self) -> str:
        """What their kernel distance is called."""
        ...

    @property
    def definition(self) -> str:
        """Architecture, weights and preprocessing: with another, an image or a video may have other features."""
        ...

    @property
    def sha256(self) -> str:
        """Of the file of its weights."""
        ...


def features(
    network: Network,
    images: Images | Iterable[Images],
    batch_size: int = 64,
    *,
    total: int | None = None,
    description: str = "features",
    unit: str = "images",
    into: Collected | Stored | None = None,
) -> Float[np.ndarray, "n d"]:
    """The features of all images, in order; see `feature_batches` for the arguments and errors.

    `into` takes them, by default in memory; the first of an array's images whose features it has are left out, and an
    iterable is to give those after them alone.
    """
    into = Collected() if into is None else into
    if isinstance(images, (Array, np.ndarray)):
        total, images = len(images), images[into.done :]
    if total is None or into.done < max(total, 1):  # of none it is an error
        arguments = {"total": total, "start": into.done, "description": description, "unit": unit}
        for batch in feature_batches(network, images, batch_size, **arguments):
            into.append([batch])
    return into.leaves()[0]


def feature_batches(
    network: Network,
    images: Images | Iterable[Images],
    batch_size: int = 64,
    *,
    total: int | None = None,
    start: int = 0,
    description: str = "features",
    unit: str = "images",
) -> Iterator[Float[np.ndarray, "b d"]]:
    """Yields the features of the images batch by batch (the last may be shorter), showing progress.

    `images` is one array, `n h w c` or of videos `n t h w c`, or an iterable of such arrays of any lengths, as uint8
    (0 to 255) or as floats in [-1, 1], which are used as they are: to measure what a PNG would hold, quantise first.
    `network` maps `n h w c` or `n t h w c` in [-1, 1] to `n d`, n being a device's share of `batch_size`; batches that
    are short, or that the devices do not divide, are padded for it and the padding's features dropped. `total`, the
    number of images, is needed for the progress of an iterable, which calls them `unit`; `start` of them were done
    before, and are not among `images`.
    Raises ValueError for no images, sizes that change, or values that are not finite or plainly not [-1, 1].
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(images, (Array, np.ndarray)):
        total, array = start + len(images), images
        images = (array[i : i + batch_size] for i in range(0, len(array), batch_size))
    if total is None:
        raise ValueError("an iterable of images needs total=, the number of images it will give")

    mesh = make_mesh()
    network = place(network, mesh)
    padded_size = -(-batch_size // mesh.size) * mesh.size
    with Progress(description, total, unit=unit, start=start) as progress:
        for batch in _rebatched(images, batch_size):
            padded = np.pad(batch, [(0, padded_size - len(batch))] + [(0, 0)] * (batch.ndim - 1))
            # On the host when the devices are done, so progress counts finished images.
            found = on_host(_apply(network, place_rows(padded, mesh), mesh))[: len(batch)]
            progress.advance(len(batch))
            yield found


@eqx.filter_jit
def _apply(network: Network, images: Any, mesh: Mesh) -> Float[Array, "b d"]:
    """The network on each device by itself: left to the compiler, a network that takes a few images at a time (a loop
    over the batch) would have every device do all of them."""
    arrays, static = eqx.partition(network, eqx.is_array)

    def each(arrays: Any, images: Float[Array, " b *shape"]) -> Float[Array, "b d"]:
        return eqx.combine(arrays, static)(images)

    # Any network is let in: one with a loop does not say how its state varies over devices, so JAX cannot check it.
    return jax.shard_map(each, mesh=mesh, in_specs=(WHOLE, BATCH), out_specs=BATCH, check_vma=False)(arrays, images)


def _rebatched(parts: Iterable[Images], size: int) -> Iterator[Float[np.ndarray, "..."]]:
    """Arrays of any lengths, cut and joined into arrays of `size` (the last one may be shorter)."""
    held: list[np.ndarray] = []
    count, seen, shape = 0, 0, None
    for part in parts:
        part = _floats(np.asarray(part), seen)
        shape = shape or part.shape[1:]
        if part.shape[1:] != shape:
            raise ValueError(f"image {seen} has shape {part.shape[1:]} after images of {shape}: resize first")
        held, count, seen = [*held, part], count + len(part), seen + len(part)
        while count >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if not seen:
        raise ValueError("no images: there is nothing to take features of")
    if count:
        yield np.concatenate(held)


def _floats(images: np.ndarray, first: int) -> Float[np.ndarray, " b *shape"]:
    """uint8 to [-1, 1]; floats are checked, because a wrong range or a NaN only shows as a strange distance."""
    if images.ndim not in (4, 5):
        raise ValueError(f"images must have axes `n h w c`, or videos `n t h w c`, got shape {images.shape}")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 127.5 - 1.0
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be uint8 (0 to 255) or floats in [-1, 1], got {images.dtype}")
    images = images.astype(np.float32)
    largest = np.abs(images).max(axis=tuple(range(1, images.ndim)), initial=0.0)
    # Samples may overshoot a little; beyond 2 it is another convention, such as 0 to 255.
    if (wrong := np.flatnonzero(~(largest <= 2.0))).size:
        i = int(wrong[0])
        raise ValueError(f"image {first + i} has |value| up to {largest[i]:.6g}: floats must lie in [-1, 1]")
    return images
