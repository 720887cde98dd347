"""FLOPs against counts by hand: exact, they are integers."""

import jax
import jax.numpy as jnp

from ulx.flops import forward_flops
from ulx.nn.layers import Conv
from ulx.nn.transformer import BlockConfig, Stack


def test_matrix_products_and_batches():
    a, b = jnp.ones((5, 7)), jnp.ones((7, 3))
    assert forward_flops(lambda a, b: a @ b + 1, a, b) == 2 * 5 * 7 * 3
    assert forward_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((4, 5, 7)), jnp.ones((4, 7, 3))) == (
        4 * 2 * 5 * 7 * 3
    )


def test_convolution():
    conv = Conv(2, 6, 10, key=jax.random.key(0))
    assert forward_flops(conv, jnp.ones((3, 8, 8, 6))) == 3 * 8 * 8 * 2 * 9 * 6 * 10


def test_transformer_blocks_through_scan_and_remat():
    """12 c² per token and block for the projections (MLP ratio 4), 2 n² c for attention, and the modulation."""
    depth, width, tokens, batch, cond = 3, 16, 5, 2, 12
    stack = Stack(depth, width, BlockConfig(head_size=8, remat="block"), cond_size=cond, key=jax.random.key(0))
    counted = forward_flops(stack, jnp.ones((batch, tokens, width)), jnp.ones((batch, cond)))
    projections = 2 * 12 * width**2 * tokens
    attention = 2 * 2 * tokens**2 * width
    modulation = 2 * cond * 6 * width
    assert counted == depth * batch * (projections + attention + modulation)
