"""The training set as latents: what stage 2 reads, so that no image is encoded twice.

The encoder is frozen and draws nothing, so its posterior is encoded once and all noise is drawn while training; the
loss is that of encoding each batch anew. The latents are kept in shards, as prepared images are (`ulx.data.cache`):
float32, `n · h · w · k · 4` bytes, and twice as many with mirror images.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ulx.data.cache import Made, Recipe, prepare_in
from ulx.data.pixels import to_float
from ulx.data.source import Dataset
from ulx.data.split import Item
from ulx.models import UnifiedLatents
from ulx.posterior import Posterior
from ulx.sharding import on_own_devices

__all__ = ["encoded", "posterior", "weights_hash"]

MIRRORED = " mirrored"
"""After an image's name, the name of its mirror image."""
READERS = 4
"""Threads that read the images of a batch."""


@eqx.filter_jit
def posterior(model: UnifiedLatents, x: Float[Array, "b *space c"]) -> Posterior:
    """What the encoder makes of images in [−1, 1]: z_clean, or its mean and standard deviation."""
    return model.posterior(x)


def encoded(
    dataset: Dataset, model: UnifiedLatents, directory: Path, *, batch_size: int, flip: bool, first: int = 0
) -> Dataset:
    """`dataset` with the fields `mean`, for an encoder of variance `std`, and `label` in its training examples.

    They are the posterior's (float32 `*latent k`). With `flip` every image is there twice, as it is and mirrored: the
    mirror image of a latent is none. The `first` frames of a clip are kept too, in the field `first` (uint8
    `f h w c`): what a base model is given. Captions stay with their images. The held-out split stays one of images.

    What is in the directory already is not encoded again, and an interrupted encoding goes on from its last shard.
    Several processes encode some shards each. The fingerprint is that of the data and the encoder, so a run is not
    continued on another encoder's latents. Raises `ValueError` for a directory with the latents of another encoder or
    of other data, `OSError` if it cannot be written.
    """
    model = on_own_devices(model)
    images, encoder = dataset.train, weights_hash(model.encoder)
    items = [Item(name, label) for name, label in zip(images.names, images.labels.tolist(), strict=True)]
    index = {name: i for i, name in enumerate(images.names)}
    if flip:
        items += [Item(item.name + MIRRORED, item.label) for item in items]
        index |= {name + MIRRORED: i for name, i in index.items()}

    def read(name: str) -> np.ndarray:
        image = images[index[name]]["image"]
        return image[..., ::-1, :] if flip and name.endswith(MIRRORED) else image

    def make(names: Sequence[str]) -> Iterator[Made]:
        with ThreadPoolExecutor(READERS) as pool:
            for begin in range(0, len(names), batch_size):
                some = names[begin : begin + batch_size]
                x = np.stack(list(pool.map(read, some)))
                # The last batch is filled up by its last image, so that one shape is compiled.
                rows = np.minimum(np.arange(batch_size), len(some) - 1)
                found = vars(posterior(model, jnp.asarray(to_float(x[rows]))))
                fields = {name: np.asarray(value) for name, value in found.items() if value is not None}
                if first:
                    fields["first"] = x[:, :first]
                for row in range(len(some)):
                    yield {name: value[row] for name, value in fields.items()}, None

    recipe = Recipe(
        name="latents",
        resolution=dataset.resolution,
        class_names=dataset.class_names,
        settings={"data": dataset.fingerprint, "encoder": encoder, "mirrored": flip, "first": first},
        items=lambda: (items, []),
        make=make,
        example_bytes=4 * math.prod(model.latent_shape) + first * math.prod(model.shape[1:]),
        attribution=dataset.attribution,
    )
    train = prepare_in(directory, recipe, together=True).dataset.train
    if images.captions is not None:
        of = images.captions
        captions = tuple(of[index[name]] for name in train.names)
        train = dataclasses.replace(train, captions=captions)
    both = f"{dataset.fingerprint} {encoder} {1 + flip}"
    return dataclasses.replace(dataset, train=train, fingerprint=hashlib.sha256(both.encode()).hexdigest())


def weights_hash(module: PyTree) -> str:
    """sha256 of the arrays of a module, in their order: latents of different encoders cannot be mixed up."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter(module, eqx.is_array)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
