"""What each network of a model costs: its parameters, and its FLOPs per example by the paper's convention (§5.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ulx import flops
from ulx.denoiser import Denoiser
from ulx.models import UnifiedLatents

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
    """`encoder`, `prior`, `decoder`, `base` -> what one call costs. Nothing is computed: weights may be shapes alone.

    A part without weights (a standard normal prior, the pixels themselves) costs nothing. A single-stage model's base
    is its prior.
    """
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    level = jax.ShapeDtypeStruct((1,), jnp.float32)
    told = model.logsnr_0 is not None
    denoise = lambda denoiser, z, level: denoiser.given()(z, level)  # noqa: E731
    calls = {
        "encoder": (model.encoder, lambda encoder, x: encoder(x), (x,)),
        "prior": (model.prior, denoise, (z, level)),
        "decoder": (model.decoder, lambda d, x, level, z: d.given(z, level if told else None)(x, level), (x, level, z)),
        "base": (base, denoise, (z, level)),
    }
    return {
        name: Cost(num_parameters(network), flops.forward_flops(call, network, *inputs))
        for name, (network, call, inputs) in calls.items()
    }
