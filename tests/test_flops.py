"""FLOPs against counts by hand, exact, and against XLA's own cost analysis.

XLA counts every elementwise operation too, a convolution's products only where they do not fall on padding, and the
body of a loop once. So it agrees exactly on products, and elsewhere by a share of elementwise work that is stated.
"""

import jax
import jax.numpy as jnp
import pytest

from ulx.flops import TRAINING, forward_flops
from ulx.nn.layers import Conv, Linear
from ulx.nn.transformer import Attention, Block, BlockConfig, Stack

KEY = jax.random.key(0)


def xla_flops(function, *args) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


PRODUCTS = {
    "matrices": (lambda a, b: a @ b, ((5, 7), (7, 3)), 2 * 5 * 7 * 3),
    "batches": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ((4, 5, 7), (4, 7, 3)), 4 * 2 * 5 * 7 * 3),
    "two axes contracted": (lambda a, b: jnp.einsum("bij,bijk->bk", a, b), ((2, 5, 7), (2, 5, 7, 3)), 2 * 2 * 35 * 3),
    "tokens": (Linear(7, 3, bias=False, key=KEY).__call__, ((2, 5, 7),), 2 * 2 * 5 * 7 * 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    function, shapes, expected = PRODUCTS[name]
    args = [jnp.ones(shape) for shape in shapes]
    assert forward_flops(function, *args) == expected == xla_flops(function, *args)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution(rank):
    conv, size = Conv(rank, 6, 10, key=KEY), 8
    x = jnp.ones((3, *(size,) * rank, 6))
    counted = forward_flops(lambda x: conv(x), x)
    assert counted == 3 * size**rank * 2 * 3**rank * 6 * 10
    # Of 3n taps along an axis, 2 fall on XLA's padding (on a CPU the frames are padded by ourselves); and XLA counts
    # the bias.
    axes = min(rank, 2)
    on_the_grid, bias = counted * (3 * size - 2) ** axes // (3 * size) ** axes, 3 * size**rank * 10
    assert xla_flops(lambda conv, x: conv(x), conv, x) == on_the_grid + bias


def test_attention_products():
    """q kᵀ and the mixing of values: 2 n² c each."""
    batch, tokens, heads, head = 2, 32, 2, 64
    qkv = [jnp.ones((batch, tokens, heads, head))] * 3
    counted = forward_flops(jax.nn.dot_product_attention, *qkv)
    assert counted == batch * 2 * 2 * tokens**2 * heads * head
    # Scale and softmax cost XLA about 5 operations for each logit, next to 4 · 64 in the products.
    assert 1 < xla_flops(jax.nn.dot_product_attention, *qkv) / counted < 1 + 6 / (4 * head)


def block_flops(tokens: int, width: int, cond: int) -> int:
    """Of one example: 12 c² weights a token (qkv 3, out 1, MLP 4 + 4), attention, and the six modulations."""
    return 2 * 12 * width**2 * tokens + 2 * 2 * tokens**2 * width + 2 * cond * 6 * width


BATCH, TOKENS, WIDTH, COND = 2, 64, 64, 16
TOKEN_BATCH = jnp.ones((BATCH, TOKENS, WIDTH)), jnp.ones((BATCH, COND))


def gradients(module, x, cond):
    """Of everything: the weights and both inputs."""
    return jax.grad(lambda everything: jnp.sum(everything[0](*everything[1:]) ** 2))((module, x, cond))


def test_transformer_block_forward_and_backward():
    block = Block(WIDTH, BlockConfig(head_size=32), cond_size=COND, key=KEY)
    counted = forward_flops(block, *TOKEN_BATCH)
    assert counted == BATCH * block_flops(TOKENS, WIDTH, COND)
    # The paper's training = 3 × forward: each product has two of its size in the backward pass.
    assert forward_flops(gradients, block, *TOKEN_BATCH) == TRAINING * counted
    # Norms, GELU, softmax and residuals are some 75 operations a token and channel, next to 24 · 64 + 4 · 64 in the
    # products: 4.2 %; and 5.5 % of the gradient's.
    forward = lambda block, x, cond: block(x, cond)  # noqa: E731
    assert 1 < xla_flops(forward, block, *TOKEN_BATCH) / counted < 1.06
    assert 1 < xla_flops(gradients, block, *TOKEN_BATCH) / (TRAINING * counted) < 1.08


def test_stack_counts_its_depth_and_recomputation():
    """Through a loop, whose body XLA counts once, and recomputation, which is another forward pass."""
    depth = 3
    make = lambda remat: Stack(depth, WIDTH, BlockConfig(head_size=32, remat=remat), cond_size=COND, key=KEY)  # noqa: E731
    forward = depth * BATCH * block_flops(TOKENS, WIDTH, COND)
    for remat, passes in (("none", TRAINING), ("block", TRAINING + 1)):
        stack = make(remat)
        assert forward_flops(stack, *TOKEN_BATCH) == forward
        assert forward_flops(gradients, stack, *TOKEN_BATCH) == passes * forward
    call = lambda stack, x, cond: stack(x, cond)  # noqa: E731
    assert 1 < depth * xla_flops(call, make("block"), *TOKEN_BATCH) / forward < 1.06
    # Without recomputation there is no loop.
    assert 1 < xla_flops(call, make("none"), *TOKEN_BATCH) / forward < 1.06


def test_the_dearer_branch_counts_and_endless_loops_are_refused():
    a = jnp.ones((8, 8))
    branches = lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a)  # noqa: E731
    assert forward_flops(branches, a) == 2 * (2 * 8**3)
    with pytest.raises(ValueError, match="without a fixed number of turns"):
        forward_flops(lambda a: jax.lax.while_loop(lambda a: a[0, 0] < 2, lambda a: a @ a, a), a)
    assert forward_flops(lambda attention, x: attention(x), Attention(64, 32, key=KEY), jnp.ones((1, 4, 64))) == (
        2 * 4 * 64**2 * 4 + 4 * 4**2 * 64
    )
