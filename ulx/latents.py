"""The training set as latents: what stage 2 reads, so that no image is encoded twice.

The encoder is frozen and draws nothing, so its posterior is encoded once and all noise is drawn while training; the
loss is that of encoding each batch anew. The latents are held in memory (float32: `n · h · w · k · 4` bytes).
"""

import dataclasses
import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ulx.data.pixels import to_float
from ulx.data.source import Dataset, InMemory, Split
from ulx.models import UnifiedLatents
from ulx.posterior import Posterior
from ulx.progress import Progress

__all__ = ["encoded", "posterior", "weights_hash"]


@eqx.filter_jit
def posterior(model: UnifiedLatents, x: Float[Array, "b *space c"]) -> Posterior:
    """What the encoder makes of images in [−1, 1]: z_clean, or its mean and standard deviation."""
    return model.posterior(x)


def encoded(dataset: Dataset, model: UnifiedLatents, *, batch_size: int, flip: bool, first: int = 0) -> Dataset:
    """`dataset` with the fields `mean`, for an encoder of variance `std`, and `label` in its training examples.

    They are the posterior's (float32 `*latent k`). With `flip` every image is there twice, as it is and mirrored: the
    mirror image of a latent is none. The fingerprint is that of the data and the encoder, so a run is not continued on
    another encoder's latents. The held-out split stays one of images. The `first` frames of a clip are kept too, in the
    field `first` (uint8 `f h w c`): what a base model is given.
    """
    images = dataset.train
    copies = 2 if flip else 1
    fields: dict[str, np.ndarray] = {}
    with Progress("encode", total=copies * len(images), unit="images") as progress:
        for begin in range(0, len(images), batch_size):
            # The last batch is filled up by its last image, so that one shape is compiled.
            rows = np.minimum(np.arange(begin, begin + batch_size), len(images) - 1)
            batch = np.stack([images[i]["image"] for i in rows.tolist()])
            end = min(begin + batch_size, len(images))
            for copy in range(copies):
                x = batch if copy == 0 else batch[..., ::-1, :]
                found = vars(posterior(model, jnp.asarray(to_float(x)))) | {"first": x[:, :first] if first else None}
                for name, value in found.items():
                    if value is None:
                        continue
                    kept = fields.setdefault(name, np.zeros((copies * len(images), *value.shape[1:]), value.dtype))
                    kept[copy * len(images) + begin : copy * len(images) + end] = np.asarray(value)[: end - begin]
                progress.advance(end - begin)
    labels = np.tile(images.labels, copies)
    train = Split(InMemory(fields | {"label": labels}), images.names * copies, labels)
    both = f"{dataset.fingerprint} {weights_hash(model.encoder)} {copies}"
    return dataclasses.replace(dataset, train=train, fingerprint=hashlib.sha256(both.encode()).hexdigest())


def weights_hash(module: PyTree) -> str:
    """sha256 of the arrays of a module, in their order: latents of different encoders cannot be mixed up."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter(module, eqx.is_array)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
