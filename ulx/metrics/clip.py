"""CLIP (Radford et al. 2021): an image and a caption to vectors of one space, batched, inference only, float32.

Both towers are transformers whose layers normalise first,

    x <- x + attention(norm(x)),  x <- x + W₂ act(W₁ norm(x) + b₂) + b₁

with act(x) = x σ(1.702 x) ("quick_gelu", OpenAI's weights) or GELU by erf ("gelu", LAION's). The image tower cuts the
image into patches, puts a class token before them, and projects what becomes of it. In the text tower a token sees
itself and those before it; what becomes of the end token is projected, and what fills up a caption behind it changes
nothing.

Which token is the end one is transformers' rule: the first that is `eos_token_id`. Where this is 2, as in the
configurations of OpenAI's weights, it is wrong, and the first one with the largest id is taken instead.

Sizes come from a config.json in Hugging Face's layout; what it leaves out has the value that transformers gives it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from ulx.metrics.layers import PRECISION, Pointwise

__all__ = [
    "ACTIVATIONS",
    "CLIP",
    "LEGACY_EOS",
    "MEAN",
    "STD",
    "ImageTower",
    "Layer",
    "Norm",
    "Settings",
    "TextTower",
    "causal",
    "from_arrays",
    "settings",
]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1]."""
LEGACY_EOS = 2
"""The `eos_token_id` that stands for the largest id of a caption."""


def _quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": _quick_gelu, "gelu": _gelu}
"""By their names in config.json."""


class Norm(eqx.Module):
    """Layer norm over the channels, with scale and shift; ε stands under the root."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape c"]) -> Float[Array, "*shape c"]:
        x = x - x.mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * self.scale + self.shift


class Layer(eqx.Module):
    """Attention, then two linear maps with an activation between; each sees its input normalised and is added to it."""

    attention_norm: Norm
    attention: Pointwise
    """Queries, keys and values side by side."""
    out: Pointwise
    norm: Norm
    widen: Pointwise
    narrow: Pointwise
    heads: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b n c"], mask: Bool[Array, "n n"] | None) -> Float[Array, "b n c"]:
        """`mask` is True where a token (row) sees another (column); None: all see all."""
        batch, length, channels = x.shape
        heads = self.attention(self.attention_norm(x)).reshape(batch, length, 3, self.heads, -1)
        query, key, value = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("bnhd,bmhd->bhnm", query / math.sqrt(query.shape[-1]), key, precision=PRECISION)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)  # every token sees itself, so that no row is empty
        attended = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), value, precision=PRECISION)
        x = x + self.out(attended.reshape(batch, length, channels))
        return x + self.narrow(ACTIVATIONS[self.activation](self.widen(self.norm(x))))


class ImageTower(eqx.Module):
    """Images of the network's own size, prepared, to their vectors."""

    patches: Float[Array, "p p 3 c"]
    """The weight of a convolution that steps from patch to patch."""
    first: Float[Array, " c"]
    """The class token."""
    positions: Float[Array, "n c"]
    """The class token's, then those of the patches row by row."""
    norm_before: Norm
    layers: tuple[Layer, ...]
    norm: Norm
    projection: Float[Array, "c d"]
    size: int = eqx.field(static=True)
    """Pixels each way."""

    def __call__(self, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """ValueError for images of another size than the network's."""
        x = self.embedded(images)
        for layer in self.layers:
            x = layer(x, None)
        return jnp.dot(self.norm(x[:, 0]), self.projection, precision=PRECISION)

    def embedded(self, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b n c"]:
        """What goes into the first layer."""
        if images.shape[1] != self.size:
            raise ValueError(f"this CLIP sees {self.size}×{self.size} pixels, got {images.shape[1]}: prepare first")
        batch, step = len(images), len(self.patches)
        grid = self.size // step  # a convolution leaves out what is not a whole patch
        x = (images[:, : grid * step, : grid * step].astype(jnp.float32) / 255.0 - jnp.asarray(MEAN)) / jnp.asarray(STD)
        x = jnp.einsum(
            "bipjqk,pqkc->bijc", x.reshape(batch, grid, step, grid, step, 3), self.patches, precision=PRECISION
        )
        first = jnp.broadcast_to(self.first, (batch, 1, len(self.first)))
        x = jnp.concatenate([first, x.reshape(batch, grid * grid, -1)], axis=1)
        return self.norm_before(x + self.positions)


class TextTower(eqx.Module):
    """Ids of captions' tokens to their vectors."""

    tokens: Float[Array, "v c"]
    positions: Float[Array, "p c"]
    layers: tuple[Layer, ...]
    norm: Norm
    projection: Float[Array, "c d"]
    eos: int = eqx.field(static=True)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b d"]:
        """Every row holds an end token. ValueError for more tokens than there are positions."""
        x, mask = self.embedded(ids), causal(ids.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        x = x[jnp.arange(len(ids)), self.ends(ids)]
        return jnp.dot(self.norm(x), self.projection, precision=PRECISION)

    def embedded(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        """What goes into the first layer."""
        length = ids.shape[1]
        if length > len(self.positions):
            raise ValueError(f"{length} tokens are too many: this network has {len(self.positions)} positions")
        return self.tokens[ids] + self.positions[:length]

    def ends(self, ids: Int[Array, "b n"]) -> Int[Array, " b"]:
        """Where each caption's end token stands, by transformers' rule (see above)."""
        return jnp.argmax(ids if self.eos == LEGACY_EOS else ids == self.eos, axis=1)


class CLIP(eqx.Module):
    """Pairs of an image and a caption to the cosine of their vectors. Made by `from_arrays`."""

    image: ImageTower
    text: TextTower

    def __call__(self, images: UInt8[Array, "b s s 3"], ids: Int[Array, "b n"]) -> Float[Array, " b"]:
        """Of images that are prepared, of the network's own size; see the towers for errors."""
        a, b = self.image(images), self.text(ids)
        return jnp.sum(a * b, axis=1) / (jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1))


def causal(length: int) -> Bool[Array, "n n"]:
    """Which token sees which: itself and those before it."""
    return jnp.tril(jnp.ones((length, length), bool))


# --- Configuration and weights ---------------------------------------------------------------------------

# What transformers takes where a config.json is silent: some of its versions write only what differs.
_LAYERS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TEXT = _LAYERS | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
_VISION = _LAYERS | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_VISION |= {"image_size": 224, "patch_size": 32, "num_channels": 3}
_BOTH = {"model_type": "clip", "projection_dim": 512}


class Settings(NamedTuple):
    """Of a config.json: what it says of either tower by its own names, and the width of what they share."""

    text: dict[str, Any]
    vision: dict[str, Any]
    projection_dim: int


def settings(config: Mapping[str, Any], source: str = "config.json") -> Settings:
    """What is needed of a config.json, checked; `source` names it in errors.

    Raises ValueError for what is no CLIP's, or a CLIP's that these networks are not.
    """

    def checked(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
        found = {name: values.get(name, default) for name, default in defaults.items()}
        for name, value in found.items():
            if type(value) is not type(defaults[name]) or (not isinstance(value, str) and value <= 0):
                raise ValueError(f"{source}: {where}{name} is {value!r}, expected such as {defaults[name]!r}")
        return found

    def tower(kind: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        # Old files have a part twice, and transformers takes all of the second one where it is there.
        name = next((name for name in (f"{kind}_config_dict", f"{kind}_config") if config.get(name) is not None), None)
        part = {} if name is None else config[name]
        if not isinstance(part, dict):
            raise ValueError(f"{source}: {name} is {part!r}, expected settings by their names")
        found = checked(part, defaults, f"{kind}_config.")
        if found["hidden_act"] not in ACTIVATIONS:
            known = " and ".join(ACTIVATIONS)
            raise ValueError(f"{source}: {kind}_config.hidden_act is {found['hidden_act']!r}: {known} are known")
        channels, heads = found["hidden_size"], found["num_attention_heads"]
        if channels % heads:
            raise ValueError(f"{source}: {kind}_config: {heads} heads do not divide {channels} channels")
        return found

    both = checked(config, _BOTH, "")
    if both["model_type"] != "clip":
        raise ValueError(f"{source}: model_type is {both['model_type']!r}: name the folder of a CLIP")
    text, vision = tower("text", _TEXT), tower("vision", _VISION)
    if vision["num_channels"] != 3:
        raise ValueError(f"{source}: vision_config.num_channels is {vision['num_channels']}: images have 3")
    if vision["patch_size"] > vision["image_size"]:
        raise ValueError(
            f"{source}: vision_config: a patch of {vision['patch_size']} pixels in images of {vision['image_size']}"
        )
    return Settings(text, vision, both["projection_dim"])


def from_arrays(state: Mapping[str, np.ndarray], settings: Settings, source: str = "weights") -> CLIP:
    """The network from arrays by transformers' names; linear maps are `out in`.

    `source` names the arrays' file in errors. Raises ValueError for an array that is missing, of another shape than the
    settings', not finite, or unknown.
    """
    text, vision, dims = settings
    # Old files hold 0, 1, 2, … as buffers; the scale of the logits in training is no part of a cosine.
    left = {
        name: value for name, value in state.items() if not name.endswith(".position_ids") and name != "logit_scale"
    }

    def bad(why: str) -> ValueError:
        return ValueError(f"{source}: {why}: these are not the weights of the CLIP of config.json")

    def take(name: str, *shape: int) -> Float[Array, "..."]:
        if name not in left:
            raise bad(f"there is no {name}")
        value = np.asarray(left.pop(name)).astype(np.float32)
        if value.shape != shape:
            raise bad(f"{name} has shape {value.shape}, expected {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{source}: {name} is not finite: the file is damaged, get it again")
        return jnp.asarray(value)

    def linear(c_in: int, c_out: int, *names: str) -> Pointwise:
        weight = jnp.concatenate([take(f"{name}.weight", c_out, c_in) for name in names]).T
        return Pointwise(weight, jnp.concatenate([take(f"{name}.bias", c_out) for name in names]))

    def norm(tower: Mapping[str, Any], name: str) -> Norm:
        scale, shift = (take(f"{name}.{part}", tower["hidden_size"]) for part in ("weight", "bias"))
        return Norm(scale, shift, tower["layer_norm_eps"])

    def layer(tower: Mapping[str, Any], name: str) -> Layer:
        width, wide = tower["hidden_size"], tower["intermediate_size"]
        return Layer(
            attention_norm=norm(tower, f"{name}.layer_norm1"),
            attention=linear(width, width, *(f"{name}.self_attn.{part}_proj" for part in "qkv")),
            out=linear(width, width, f"{name}.self_attn.out_proj"),
            norm=norm(tower, f"{name}.layer_norm2"),
            widen=linear(width, wide, f"{name}.mlp.fc1"),
            narrow=linear(wide, width, f"{name}.mlp.fc2"),
            heads=tower["num_attention_heads"],
            activation=tower["hidden_act"],
        )

    def layers(tower: Mapping[str, Any], name: str) -> tuple[Layer, ...]:
        return tuple(layer(tower, f"{name}.encoder.layers.{i}") for i in range(tower["num_hidden_layers"]))

    width, size, patch = (vision[name] for name in ("hidden_size", "image_size", "patch_size"))
    image = ImageTower(
        patches=take("vision_model.embeddings.patch_embedding.weight", width, 3, patch, patch).transpose(2, 3, 1, 0),
        first=take("vision_model.embeddings.class_embedding", width),
        positions=take("vision_model.embeddings.position_embedding.weight", (size // patch) ** 2 + 1, width),
        norm_before=norm(vision, "vision_model.pre_layrnorm"),
        layers=layers(vision, "vision_model"),
        norm=norm(vision, "vision_model.post_layernorm"),
        projection=take("visual_projection.weight", dims, width).T,
        size=size,
    )
    width = text["hidden_size"]
    words = TextTower(
        tokens=take("text_model.embeddings.token_embedding.weight", text["vocab_size"], width),
        positions=take("text_model.embeddings.position_embedding.weight", text["max_position_embeddings"], width),
        layers=layers(text, "text_model"),
        norm=norm(text, "text_model.final_layer_norm"),
        projection=take("text_projection.weight", dims, width).T,
        eos=text["eos_token_id"],
    )
    if left:
        raise bad(f"there is no place for {', '.join(sorted(left)[:3])}")
    return CLIP(image, words)
