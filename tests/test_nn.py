"""Layers against NumPy written out, and the networks' invariants. Float32 sums of some hundred terms agree to 1e-5."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulx import diffusion
from ulx.nn import grid, layers, rotary
from ulx.nn.attention import attend
from ulx.nn.conditions import NO_LABEL, Conditions, ConditionSpec
from ulx.nn.encoder import Encoder, EncoderConfig
from ulx.nn.resnet import ResBlock
from ulx.nn.transformer import Attention, Block, BlockConfig, Stack
from ulx.nn.uvit import UViT, UViTConfig

CLASSES = ConditionSpec(num_classes=3)
KEY = jax.random.key(0)
SMALL = BlockConfig(head_size=8)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shaken(module, scale=0.1):
    """Every array moved off its initial value: zero-initialised gates hide mistakes."""
    leaves, tree = jax.tree.flatten(module)
    rng = np.random.default_rng(1)
    moved = [leaf + scale * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


def test_a_block_is_its_formula():
    """x + g₁ attention(mod₁(norm x)), then x + g₂ mlp(mod₂(norm x)), written out but for the attention."""
    block = shaken(Block(16, SMALL, cond_size=12, key=KEY))
    x, cond = normal(2, 5, 16), normal(2, 12, seed=1)
    parts = np.split(np.asarray(block.modulation(cond))[:, None], 6, axis=-1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
    norm = lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)  # noqa: E731
    y = np.asarray(x + gate_1 * block.attention(jnp.asarray(norm(np.asarray(x)) * (1 + scale_1) + shift_1)))
    hidden = (norm(y) * (1 + scale_2) + shift_2) @ np.asarray(block.up.weight) + np.asarray(block.up.bias)
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    out = hidden @ np.asarray(block.down.weight) + np.asarray(block.down.bias)
    np.testing.assert_allclose(block(x, cond), y + gate_2 * out, atol=1e-5)


def test_a_residual_block_scales_and_shifts_by_its_conditioning():
    block = shaken(ResBlock(2, 16, 32, cond_size=12, key=KEY))
    assert block.modulation is not None
    assert block.project is not None
    x, cond = normal(2, 4, 4, 16), normal(2, 12, seed=1)
    silu = lambda a: a / (1 + jnp.exp(-a))  # noqa: E731
    scale, shift = jnp.split(block.modulation(silu(cond))[:, None, None], 2, axis=-1)
    hidden = block.norm_2(block.conv_1(silu(block.norm_1(x)))) * (1 + scale) + shift
    np.testing.assert_allclose(block(x, cond), block.conv_2(silu(hidden)) + block.project(x), atol=1e-5)


def test_skips_are_sums():
    """With nothing coming up from the inner level, what an outer level sends across still arrives, once."""
    config = UViTConfig(patch=1, channels=(16, 32), blocks=(2, 1), block=SMALL)
    net = shaken(UViT((8, 8, 3), config, key=KEY))
    zero = lambda module: jax.tree.map(jnp.zeros_like, module)  # noqa: E731
    net = eqx.tree_at(lambda n: n.stages[0].up, net, replace_fn=zero)
    z, level = normal(1, 8, 8, 3), jnp.zeros(1)
    stage, cond = net.stages[0], net.logsnr(level)
    x = stage.go_out(stage.go_in(net.project_in(z), cond, None, None), cond, None, None)
    scale, shift = jnp.split(net.modulation(jax.nn.silu(cond))[:, None, None], 2, axis=-1)
    expected = net.project_out(layers.layer_norm(x) * (1 + scale) + shift)
    np.testing.assert_allclose(net(z, level), expected, atol=1e-5)


def test_no_two_weights_are_drawn_alike():
    """Of a network with all that there can be. Draws of one key begin alike, whatever their sizes and scales."""
    spec = ConditionSpec(num_classes=3, text_channels=5, frames_shape=(4, 8, 8, 3))
    config = UViTConfig(patch=1, conv_channels=(16,), conv_blocks=2, channels=(16, 16), blocks=(2, 2), block=SMALL)
    options = {"context_shape": (2, 2, 2, 4), "context_logsnr": True, "conditions": spec}
    network = UViT((4, 8, 8, 2), config, **options, key=KEY)
    names, draws = [], []
    for path, leaf in jax.tree.leaves_with_path(eqx.filter(network, eqx.is_array)):
        # Blocks of a stack are one array, each drawn by itself.
        for block in leaf if "blocks" in jax.tree_util.keystr(path) else [leaf]:
            first = np.ravel(block)[:8]
            if first.std() > 0:  # not what begins at zeros or ones
                names.append(jax.tree_util.keystr(path))
                draws.append(first / np.linalg.norm(first))
    alike = np.argwhere(np.triu(np.stack(draws) @ np.stack(draws).T > 0.999, 1))
    assert len(draws) > 40
    assert [(names[i], names[j]) for i, j in alike] == []


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution_is_the_sum_it_says(rank):
    conv = layers.Conv(rank, 3, 4, key=KEY)
    conv = eqx.tree_at(lambda c: c.bias, conv, normal(4))
    x = normal(2, *(4,) * rank, 3)
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), *[(1, 1)] * rank, (0, 0)])
    expected = np.zeros((2, *(4,) * rank, 4)) + np.asarray(conv.bias)
    for offset in np.ndindex(*(3,) * rank):
        window = padded[(slice(None), *(slice(o, o + 4) for o in offset))]
        expected += window @ np.asarray(conv.weight)[offset]
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)
    # Of three axes a CPU takes another way than an accelerator: both are this.
    np.testing.assert_allclose(layers.convolve(x, conv.weight) + conv.bias, expected, atol=1e-5)


def test_group_norm():
    norm = shaken(layers.GroupNorm(32, group_size=16))
    x = 3 + 2 * normal(2, 4, 4, 32)
    wide = np.asarray(x, np.float64).reshape(2, 16, 2, 16)
    wide = (wide - wide.mean((1, 3), keepdims=True)) / np.sqrt(wide.var((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x), wide.reshape(x.shape) * norm.scale + norm.shift, atol=1e-5)


def test_layer_and_rms_norm():
    x = 3 + 2 * normal(4, 16)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(x), expected, atol=1e-5)
    scale = normal(16)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(layers.rms_norm(x, scale), expected, atol=1e-5)


def test_attention_with_normalised_queries_and_keys():
    attention = shaken(Attention(16, 8, key=KEY))
    x = normal(2, 5, 16)
    query, key, value = np.split(np.asarray(x @ attention.qkv.weight, np.float64).reshape(2, 5, 3, 2, 8), 3, axis=2)
    unit = lambda a, scale: a[:, :, 0] / np.sqrt((a[:, :, 0] ** 2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)  # noqa: E731
    query, key = unit(query, attention.query_scale), unit(key, attention.key_scale)
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value[:, :, 0]).reshape(2, 5, 16)
    expected = mixed @ np.asarray(attention.out.weight) + np.asarray(attention.out.bias)
    np.testing.assert_allclose(attention(x), expected, atol=1e-5)


@pytest.mark.parametrize(("space", "patch"), [((4, 6), 2), ((4, 6), (2, 3)), ((2, 4, 4), (1, 2, 2)), ((8,), 4)])
def test_patches_hold_their_pixels_and_come_back(space, patch):
    x = normal(2, *space, 3)
    patched = grid.patchify(x, patch)
    sizes = grid.per_axis(patch, len(space))
    for position in np.ndindex(*patched.shape[1:-1]):
        window = tuple(slice(p * n, (p + 1) * n) for p, n in zip(position, sizes, strict=True))
        np.testing.assert_array_equal(patched[(slice(None), *position)], x[(slice(None), *window)].reshape(2, -1))
    np.testing.assert_array_equal(grid.unpatchify(patched, patch), x)


def test_bad_patches_are_named():
    with pytest.raises(ValueError, match=r"\(5, 4\) does not divide into patches of \(2, 2\)"):
        grid.patchify(normal(1, 5, 4, 3), 2)
    with pytest.raises(ValueError, match="one number per spatial axis"):
        grid.patchify(normal(1, 4, 4, 3), (2, 2, 2))


def test_dropout_belongs_to_the_example():
    dropout = layers.Dropout(0.25)
    x, keys = jnp.ones((4, 50, 20)), jax.random.split(KEY, 4)
    dropped = dropout(x, keys)
    np.testing.assert_array_equal(dropped[2:3], dropout(x[2:3], keys[2:3]))
    # 4000 draws: the share of zeros has a standard error of 0.007.
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.03
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.75)
    assert dropout(x, None) is x


def test_blocks_of_a_stack_drop_out_independently_and_only_with_a_key():
    """Two equal blocks: were their masks the same, running the first one twice with one key would be the stack."""
    stack = shaken(Stack(2, 16, BlockConfig(head_size=8, dropout=0.5), cond_size=12, key=KEY))
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), stack.blocks)
    stack = eqx.tree_at(lambda s: s.blocks, stack, same)
    block = jax.tree.map(lambda leaf: leaf[0], stack.blocks)
    x, cond, keys = normal(2, 5, 16), normal(2, 12, seed=1), jax.random.split(KEY, 2)
    dropped, quiet = stack(x, cond, keys), stack(x, cond)
    assert np.abs(dropped - quiet).max() > 1e-2
    masks = diffusion.split_keys(keys, 2)
    modulated = jax.nn.silu(cond)
    expected = block(block(x, modulated, masks[0]), modulated, masks[1])
    np.testing.assert_allclose(dropped, expected, atol=1e-5)
    assert np.abs(dropped - block(block(x, modulated, masks[0]), modulated, masks[0])).max() > 1e-2


@pytest.mark.parametrize("remat", ["none", "block"])
def test_stack_is_its_blocks_one_after_another(remat):
    stack = shaken(Stack(3, 16, BlockConfig(head_size=8, remat=remat), cond_size=12, key=KEY))
    x, cond = normal(2, 5, 16), normal(2, 12, seed=1)
    expected = x
    for i in range(3):
        block = jax.tree.map(lambda leaf: leaf[i], stack.blocks)  # noqa: B023
        expected = block(expected, jax.nn.silu(cond))
    np.testing.assert_allclose(stack(x, cond), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_attention_on_a_cpu_is_the_library_s(scale):
    """Output and gradients, of another number of keys too; at scale 40 the scores reach some thousands, whose
    exponential is infinite."""
    query, key, value = scale * normal(2, 5, 3, 8), scale * normal(2, 7, 3, 8, seed=1), normal(2, 7, 3, 8, seed=2)

    def found(function):
        return jax.value_and_grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs))), (0, 1, 2))(query, key, value)

    (ours, own), (theirs, other) = found(attend), found(jax.nn.dot_product_attention)
    np.testing.assert_allclose(attend(query, key, value), jax.nn.dot_product_attention(query, key, value), atol=1e-5)
    assert ours == pytest.approx(float(theirs), abs=1e-4)
    for a, b in zip(own, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)  # a gradient of a query is a sum of keys
    low = [x.astype(jnp.bfloat16) for x in (query / scale, key / scale, value)]
    assert attend(*low).dtype == jnp.bfloat16
    # bfloat16 has 8 bits.
    np.testing.assert_allclose(
        np.asarray(attend(*low), np.float32), attend(query / scale, key / scale, value), atol=0.03
    )


def test_new_blocks_are_the_identity():
    x = normal(2, 4, 4, 16)
    np.testing.assert_array_equal(ResBlock(2, 16, 16, cond_size=8, key=KEY)(x, normal(2, 8)), x)
    tokens = x.reshape(2, 16, 16)
    np.testing.assert_array_equal(Stack(2, 16, SMALL, cond_size=8, key=KEY)(tokens, normal(2, 8)), tokens)


CONFIGS = {
    "vit": ((8, 8, 3), UViTConfig(patch=2, channels=(16,), blocks=(2,), block=SMALL), None),
    "two levels": ((8, 8, 3), UViTConfig(patch=1, channels=(16, 32), blocks=(3, 2), block=SMALL), None),
    "uvit": (
        (16, 16, 3),
        UViTConfig(patch=2, conv_channels=(16, 16), conv_blocks=1, channels=(16,), blocks=(2,), block=SMALL),
        (4, 4, 5),
    ),
    "finer context": ((8, 8, 3), UViTConfig(patch=4, channels=(16,), blocks=(1,), block=SMALL), (8, 8, 2)),
    "coarser context": ((8, 8, 3), UViTConfig(patch=1, channels=(16, 16), blocks=(2, 1), block=SMALL), (2, 2, 2)),
    "video": (
        (4, 8, 8, 3),
        UViTConfig(
            patch=(1, 2, 2),
            conv_channels=(16,),
            conv_blocks=1,
            channels=(16,),
            blocks=(1,),
            down=((2, 1, 1),),
            block=SMALL,
        ),
        (1, 2, 2, 6),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_network_uses_every_input_and_parameter(name):
    shape, config, context_shape = CONFIGS[name]
    network = shaken(UViT(shape, config, context_shape=context_shape, conditions=CLASSES, key=KEY))
    z, logsnr, label = normal(3, *shape), jnp.asarray([-8.0, 0.0, 4.0]), jnp.asarray([0, 1, 3])
    context = None if context_shape is None else normal(3, *context_shape)

    def total(network, z, context):
        return jnp.sum(network(z, logsnr, Conditions(label), context=context) * normal(3, *shape, seed=5))

    grads = eqx.filter_jit(jax.grad(total, argnums=(0, 1) if context is None else (0, 1, 2)))(network, z, context)
    dead = [
        jax.tree_util.keystr(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(eqx.filter(grads, eqx.is_array))
        # Label 2 did not occur; everything else has a say in the output.
        if not np.any(np.asarray(grad))
    ]
    assert not dead
    call = eqx.filter_jit(network)
    out = call(z, logsnr, Conditions(label), context=context)
    assert out.shape == z.shape
    # The examples of a batch do not see each other.
    alone = call(z[1:2], logsnr[1:2], Conditions(label[1:2]), context=None if context is None else context[1:2])
    np.testing.assert_allclose(out[1:2], alone, atol=1e-4)
    # The level and the label matter.
    assert np.abs(call(z, logsnr + 1, Conditions(label), context=context) - out).max() > 1e-4
    assert np.abs(call(z, logsnr, Conditions(label * 0), context=context) - out).max() > 1e-4


def test_no_label_is_the_null_label_and_a_new_network_predicts_zero():
    shape, config, _ = CONFIGS["vit"]
    network = UViT(shape, config, conditions=CLASSES, key=KEY)
    z, logsnr = normal(2, *shape), jnp.zeros(2)
    np.testing.assert_array_equal(network(z, logsnr), jnp.zeros_like(z))
    network = shaken(network)
    np.testing.assert_array_equal(network(z, logsnr), network(z, logsnr, Conditions(jnp.full(2, NO_LABEL))))


def test_grids_are_fitted():
    z = normal(1, 4, 4, 2)
    np.testing.assert_array_equal(grid.fit_grid(z, (2, 2)), grid.patchify(z, 2))
    np.testing.assert_array_equal(grid.fit_grid(z, (8, 4))[:, ::2], z)
    with pytest.raises(ValueError, match=r"a latent grid of \(4, 4\) does not fit a token grid of \(3, 4\)"):
        grid.fit_grid(z, (3, 4))


def test_mistakes_are_caught_at_construction():
    with pytest.raises(ValueError, match="does not divide"):
        UViT((9, 8, 3), UViTConfig(patch=2), key=KEY)
    with pytest.raises(ValueError, match="one entry per level"):
        UViTConfig(channels=(16, 32), blocks=(2,))
    with pytest.raises(ValueError, match="multiple of head_size"):
        UViT((8, 8, 3), UViTConfig(channels=(20,), blocks=(1,), block=SMALL), key=KEY)
    with pytest.raises(ValueError, match=r"reduces its grid by \(4, 4\), which does not divide \(10, 8\)"):
        Encoder((10, 8, 3), EncoderConfig(channels=(16, 16)), key=KEY)
    with pytest.raises(ValueError, match=r"one entry per step between two stages \(1\), got down=\(2, 2\)"):
        EncoderConfig(channels=(16, 16), down=(2, 2))
    with pytest.raises(ValueError, match=r"factors of at least 1, got patch=1, down=\(\(1, 0, 2\),\)"):
        UViTConfig(patch=1, channels=(16, 16), blocks=(2, 1), down=((1, 0, 2),))
    with pytest.raises(ValueError, match=r"one number per spatial axis \(2\), got \(1, 2, 2\)"):
        UViT((8, 8, 3), UViTConfig(patch=(1, 2, 2)), key=KEY)


def test_mistakes_are_caught_at_the_call():
    shape, config, _ = CONFIGS["vit"]
    network = UViT(shape, config, key=KEY)
    with pytest.raises(ValueError, match=r"built for inputs of shape \(8, 8, 3\), got \(4, 4, 3\)"):
        network(normal(1, 4, 4, 3), jnp.zeros(1))
    with pytest.raises(ValueError, match="takes no context"):
        network(normal(1, *shape), jnp.zeros(1), context=normal(1, 4, 4, 2))
    with pytest.raises(ValueError, match="built without classes"):
        network(normal(1, *shape), jnp.zeros(1), Conditions(jnp.zeros(1, jnp.int32)))


def test_encoder_reduces_and_every_parameter_counts():
    encoder = shaken(Encoder((16, 16, 3), EncoderConfig(channels=(16, 32), blocks=1, last_blocks=1), key=KEY))
    x = normal(2, 16, 16, 3)
    assert encoder(x).shape == (2, *encoder.latent_shape) == (2, 4, 4, 8)
    grads = jax.jit(jax.grad(lambda encoder: jnp.sum(encoder(x) * normal(2, 4, 4, 8, seed=3))))(encoder)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))


def inflated(image, video):
    """The weights of `image` as those of the video network `video` that does the same to every frame of a still.

    Kernels act in the middle of their three frames, tables repeat, a step over two frames takes or gives them alike.
    """

    def inflate(a, b):
        if a.shape == b.shape:
            return a
        if a.ndim == b.ndim - 1 and b.shape[0] == 3 and a.ndim == 4:
            return jnp.zeros_like(b).at[1].set(a)
        if a.ndim == b.ndim - 1:
            return jnp.broadcast_to(a, b.shape)
        if b.shape[0] == 2 * a.shape[0] and a.ndim == 2:
            return jnp.concatenate([a, a]) / 2
        return jnp.concatenate([a, a], axis=-1)

    return jax.tree.unflatten(
        jax.tree.structure(video),
        [inflate(a, b) for a, b in zip(jax.tree.leaves(image), jax.tree.leaves(video), strict=True)],
    )


def still(image, frames):
    return jnp.repeat(image[:, None], frames, axis=1)


def test_chroma_gain_amplifies_colour_against_grey():
    config = EncoderConfig(channels=(16, 32), blocks=1, last_blocks=1)
    plain = shaken(Encoder((16, 16, 3), config, key=KEY))
    gained = shaken(Encoder((16, 16, 3), dataclasses.replace(config, chroma_gain=4.0), key=KEY))
    x = normal(2, 16, 16, 3, seed=2)
    grey = np.asarray(x).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(gained(x), plain(jnp.asarray(grey + 4 * (x - grey))), atol=1e-4)
    with pytest.raises(ValueError, match="chroma_gain must be positive"):
        EncoderConfig(chroma_gain=0.0)


def test_encoder_of_a_still_video_is_the_image_encoder():
    """Patches and steps per axis: height and width shrink as in the image, two frames become one where asked."""
    sizes = {"channels": (16, 16, 16), "blocks": 1, "last_blocks": 1, "latent_channels": 4}
    image = shaken(Encoder((8, 8, 3), EncoderConfig(patch=2, down=(2, 1), **sizes), key=KEY))
    video = Encoder((4, 8, 8, 3), EncoderConfig(patch=(1, 2, 2), down=((1, 2, 2), (2, 1, 1)), **sizes), key=KEY)
    assert (image.latent_shape, video.latent_shape) == ((2, 2, 4), (2, 2, 2, 4))
    assert [down.factor for down in video.downs] == [(1, 2, 2), (2, 1, 1)]
    x = normal(2, 8, 8, 3)
    # The temporal kernel sees zeros beyond the ends but is itself zero there; sums of a few hundred float32 terms.
    np.testing.assert_allclose(
        eqx.filter_jit(inflated(image, video))(still(x, 4)), still(eqx.filter_jit(image)(x), 2), atol=1e-5
    )


def test_network_of_a_still_video_is_the_image_network():
    """The same through a convolution stage, a transformer level on every frame and one on half of them.

    Attention is over all frames at once: repeated keys and values do not change it.
    """
    sizes = {"conv_channels": (16,), "conv_blocks": 1, "channels": (16, 16), "blocks": (2, 1), "block": SMALL}
    build = lambda shape, context, **steps: UViT(shape, UViTConfig(**sizes, **steps), context_shape=context, key=KEY)  # noqa: E731
    image = shaken(build((8, 8, 3), (4, 4, 5), patch=2, down=(2, 1)))
    video = build((4, 8, 8, 3), (2, 4, 4, 5), patch=(1, 2, 2), down=((1, 2, 2), (2, 1, 1)))
    z, logsnr, z_0 = normal(2, 8, 8, 3), jnp.asarray([-3.0, 2.0]), normal(2, 4, 4, 5, seed=1)
    assert [stage.down.factor for stage in video.stages] == [(1, 2, 2), (2, 1, 1)]
    expected = eqx.filter_jit(image)(z, logsnr, context=z_0)
    out = eqx.filter_jit(inflated(image, video))(still(z, 4), logsnr, context=still(z_0, 2))
    np.testing.assert_allclose(out, still(expected, 4), atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_rotated_products_depend_on_the_places_difference_alone():
    """q at p and k at p', for every pair of places of a grid: the same for the same p − p', and not for others."""
    sizes = (3, 4, 5)
    by = rotary.angles(sizes, 16)
    query, key = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)
    everywhere = lambda x: rotary.rotate(jnp.broadcast_to(x, (1, 60, 1, 16)), by)[0, :, 0]  # noqa: E731
    products = np.asarray(everywhere(query) @ everywhere(key).T, np.float64)
    places = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, 3)
    found: dict[tuple[int, ...], list[float]] = {}
    for i, place in enumerate(places):
        for j, other in enumerate(places):
            found.setdefault(tuple((place - other).tolist()), []).append(products[i, j])
    for same in found.values():
        np.testing.assert_allclose(same, same[0], atol=2e-5)  # float32's sums of 16 terms
    means = np.sort([np.mean(same) for same in found.values()])
    assert len(means) == 5 * 7 * 9
    assert np.median(np.diff(means)) > 1e-4
    np.testing.assert_allclose(products[0, 0], float((query * key).sum()), atol=1e-5)  # the first place is not turned


def test_rotary_angles_are_refused_for_too_few_channels():
    with pytest.raises(ValueError, match="head_size=4 is to be a pair of channels or more for each axis"):
        rotary.angles((2, 2, 2), 4)
    with pytest.raises(ValueError, match="head_size=7"):
        rotary.angles((2,), 7)


def test_a_rotary_stack_sees_how_tokens_lie():
    """Without positions a stack treats all orders of its tokens alike; a rotary one does not."""
    plain, turned = (
        shaken(Stack(2, 16, BlockConfig(head_size=16, rotary=rotary), cond_size=8, key=KEY)) for rotary in (False, True)
    )
    cond, x = normal(1, 8), normal(1, 2, 3, 16)
    swapped = x[:, ::-1]
    np.testing.assert_allclose(plain(swapped, cond), plain(x, cond)[:, ::-1], atol=1e-5)
    assert np.abs(turned(swapped, cond) - turned(x, cond)[:, ::-1]).max() > 1e-2
    assert turned(x, cond).shape == x.shape
