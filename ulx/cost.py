"""What each network of a model costs: its parameters, and its FLOPs per example by the paper's convention (§5.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ulx import flops
from ulx.decoders import Decoder
from ulx.denoiser import Denoiser, StandardNormal
from ulx.models import UnifiedLatents
from ulx.nn.conditions import Conditions, Text

__all__ = ["Cost", "network_costs", "num_parameters"]


@dataclasses.dataclass(frozen=True)
class Cost:
    parameters: int
    forward_flops: int
    """Of one example; a multiply and an add are two."""

    @property
    def training_flops(self) -> int:
        """Forward and backward of one example."""
        return flops.TRAINING * self.forward_flops


def num_parameters(module: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(module) if hasattr(leaf, "size"))


def network_costs(model: UnifiedLatents, base: Denoiser, text_length: int = 0) -> dict[str, Cost]:
    """`encoder`, `prior`, `decoder`, `base` -> what one call costs, with a caption of so many tokens where a network is
    told one. Nothing is computed: weights may be shapes alone.

    A part without weights (a standard normal prior, the pixels themselves) costs nothing. A single-stage model's base
    is its prior.
    """
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    level = jax.ShapeDtypeStruct((1,), jnp.float32)
    knows_level = model.logsnr_0 is not None

    def text(part: Denoiser | StandardNormal | Decoder) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = (1, text_length, part.conditions.text_channels)
        shapes = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], jnp.bool_)
        return shapes if shape[1] and shape[2] else ()

    def denoise(denoiser, z, level, *text):
        return denoiser.given(Conditions(text=Text(*text) if text else None))(z, level)

    def decode(decoder, x, level, z, *text):
        told = Conditions(text=Text(*text) if text else None)
        return decoder.given(z, level if knows_level else None, told)(x, level)

    calls = {
        "encoder": (model.encoder, lambda encoder, x: encoder(x), (x,)),
        "prior": (model.prior, denoise, (z, level, *text(model.prior))),
        "decoder": (model.decoder, decode, (x, level, z, *text(model.decoder))),
        "base": (base, denoise, (z, level, *text(base))),
    }
    return {
        name: Cost(num_parameters(network), flops.forward_flops(call, network, *inputs))
        for name, (network, call, inputs) in calls.items()
    }
