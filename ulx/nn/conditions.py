"""What a network can be given beside what it denoises: a class, a caption, the first frames of a clip.

Each may be missing, of a batch or of single examples in it, and what a network does then is trained by taking it away
now and then: so a model can do without, and guidance has something to move away from.

`ConditionSpec` says what a network is built for, `Conditions` holds a batch's values, and whoever is between data and
network passes them on without looking inside. (The decoder's z_0 is none of them: it is always there.)
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ulx.nn.layers import Linear, draw, layer_norm

__all__ = ["NO_LABEL", "ConditionSpec", "Conditions", "Text", "TextInput"]

NO_LABEL = -1
"""In a batch of labels, that an example has none."""


@dataclasses.dataclass(frozen=True)
class ConditionSpec:
    """What a network can be given. Static: it decides which weights there are."""

    num_classes: int = 0
    """Classes, or 0 for no labels."""
    text_channels: int = 0
    """Numbers in a token's embedding, or 0 for no captions."""
    frames_shape: tuple[int, ...] | None = None
    """Of one example's given frames (`ulx.frames`), or None for no frames."""


class Text(eqx.Module):
    """Embedded captions (`ulx.text`)."""

    tokens: Float[Array, "b n c"]
    mask: Bool[Array, "b n"]
    """True where there is a token. An example without any has no caption."""


class Conditions(eqx.Module):
    """What a batch of b examples is given; None where none of them is given any of a kind."""

    label: Int[Array, " b"] | None = None
    """Classes, or `NO_LABEL`."""
    text: Text | None = None
    frames: Float[Array, "b *clip p"] | None = None
    """Given frames as `ulx.frames.given_frames` makes them, which says of each example how many there are."""

    @property
    def guides(self) -> bool:
        """Whether there is anything that guidance could move towards."""
        return self.label is not None or self.text is not None

    def without(self, dropped: Bool[Array, " b"] | bool = True) -> "Conditions":
        """Without labels and captions, all of them or those of the examples `dropped`. Given frames stay given: they
        are part of the answer, and guidance away from them would leave them."""
        label, text = self.label, self.text
        if label is not None:
            label = jnp.where(dropped, NO_LABEL, label)
        if text is not None:
            text = Text(text.tokens, text.mask & ~jnp.reshape(jnp.asarray(dropped), (-1, 1)))
        return Conditions(label, text, self.frames)

    def joined(self, other: "Conditions") -> "Conditions":
        """The batch of both, one after the other. Both are given the same kinds."""
        return jax.tree.map(lambda one, two: jnp.concatenate([one, two]), self, other)

    def known_to(self, spec: ConditionSpec) -> "Conditions":
        """What of them a network of this spec was built for."""
        return Conditions(
            self.label if spec.num_classes else None,
            self.text if spec.text_channels else None,
            self.frames if spec.frames_shape is not None else None,
        )

    def check(self, spec: ConditionSpec) -> None:
        """Raises ValueError for what a network of this spec was not built for."""
        if self.label is not None and not spec.num_classes:
            raise ValueError("this network was built without classes (num_classes=0), but got labels")
        if self.frames is not None and spec.frames_shape is None:
            raise ValueError("this network was built to be given no frames")
        if self.frames is not None and self.frames.shape[1:] != spec.frames_shape:
            raise ValueError(
                f"this network was built for given frames of shape {spec.frames_shape}, as ulx.frames.given_frames "
                f"makes them of a whole clip, and got {self.frames.shape[1:]}"
            )
        if self.text is not None and self.text.tokens.shape[-1] != spec.text_channels:
            built = f"for captions of {spec.text_channels} channels" if spec.text_channels else "without captions"
            raise ValueError(f"this network was built {built}, but got some of {self.text.tokens.shape[-1]}")


class TextInput(eqx.Module):
    """Captions -> the tokens that every block attends to, and a vector, of their mean, that modulates every block.

    Embeddings are normalised first, so that encoders of any scale will do. Without a caption there is nothing to attend
    to, and the vector is a learned one, as the null label's is.
    """

    project: Linear
    pooled: Linear
    no_caption: Float[Array, " k"]

    def __init__(self, channels: int, width: int, cond_size: int, *, key: Key[Array, ""]):
        project, pooled, no_caption = jax.random.split(key, 3)
        self.project = Linear(channels, width, key=project)
        self.pooled = Linear(channels, cond_size, key=pooled)
        self.no_caption = draw(no_caption, (cond_size,), 0.02)

    def __call__(self, text: Text | None, size: int) -> tuple[Text | None, Float[Array, "b k"]]:
        """Of `size` examples."""
        no_caption = jnp.broadcast_to(self.no_caption, (size, self.no_caption.size))
        if text is None:
            return None, no_caption
        tokens = layer_norm(text.tokens).astype(no_caption.dtype)
        weights = text.mask[..., None].astype(tokens.dtype)
        count = weights.sum(axis=1)
        pooled = self.pooled(layer_norm((tokens * weights).sum(axis=1) / jnp.maximum(count, 1)))
        return Text(self.project(tokens), text.mask), jnp.where(count > 0, pooled, no_caption)
