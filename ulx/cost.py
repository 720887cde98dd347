"""What each network of a model costs: its parameters, and its FLOPs per example by the paper's convention (§5.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ulx import flops
from ulx.models import Denoiser, UnifiedLatents

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


def network_costs(model: UnifiedLatents, base: Denoiser) -> dict[str, Cost]:
    """`encoder`, `prior`, `decoder`, `base` -> what it costs. Nothing is computed: weights may be shapes alone."""
    x = jax.ShapeDtypeStruct((1, *model.encoder.shape), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    level = jax.ShapeDtypeStruct((1,), jnp.float32)
    calls = {
        "encoder": (model.encoder, lambda encoder, x: encoder(x), (x,)),
        "prior": (model.prior, lambda prior, z, level: prior(z, level), (z, level)),
        "decoder": (model.decoder, lambda decoder, x, level, z: decoder(x, level, context=z), (x, level, z)),
        "base": (base, lambda base, z, level: base(z, level), (z, level)),
    }
    return {
        name: Cost(num_parameters(network), flops.forward_flops(call, network, *inputs))
        for name, (network, call, inputs) in calls.items()
    }
