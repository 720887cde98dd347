"""Every preset takes a training step, by shapes alone; the paper's have the sizes that it states."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

from ulx.config import Config
from ulx.cost import network_costs
from ulx.data import DataConfig
from ulx.models import ModelConfig, UnifiedLatents
from ulx.nn.conditions import ConditionSpec
from ulx.nn.transformer import Stack
from ulx.presets import MODELS, PAPER
from ulx.stages import autoencoder_loss, base_loss, make_base
from ulx.training import Draws

SIZES: dict[str, tuple[ModelConfig, tuple[int, ...], int]] = {
    "tiny": (MODELS["tiny"], (32, 32, 3), 10),
    "tiny64": (MODELS["tiny64"], (64, 64, 3), 10),
    "small": (MODELS["small"], (64, 64, 3), 10),
    "video-smoke": (MODELS["video-smoke"], (16, 32, 32, 3), 1),
    "video-tiny": (MODELS["video-tiny"], (16, 32, 32, 3), 1),
    "video-small": (MODELS["video-small"], (16, 64, 64, 3), 1),
    **{name: (preset.model, preset.shape, preset.num_classes) for name, preset in PAPER.items()},
}


def networks(model: ModelConfig, shape: tuple[int, ...], num_classes: int, key):
    autoencoder = UnifiedLatents(shape, model, key=key)
    return autoencoder, make_base(autoencoder, model, ConditionSpec(num_classes), key=key)


@pytest.fixture(scope="module")
def abstract():
    """The networks of a paper preset as shapes, built once."""
    built = {}

    def build(name: str):
        if name not in built:
            built[name] = eqx.filter_eval_shape(lambda key: networks(*SIZES[name], key), jax.random.key(0))
        return built[name]

    return build


@pytest.mark.parametrize("name", SIZES)
def test_preset_initialises_and_takes_a_step(name):
    """Shapes and types of a whole training step of both stages, without computing it."""
    preset, shape, num_classes = SIZES[name]
    data = DataConfig("moving-emoji" if len(shape) == 4 else "openmoji", clips=len(shape) == 4, resolution=shape[-2])
    config = Config(data=data, model=preset)
    batch = {
        "image": jax.ShapeDtypeStruct((2, *shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
    }

    def steps(batch, key):
        model, base = networks(preset, shape, num_classes, key)
        draws = Draws(keys=jax.random.split(key, 2), step_key=key)
        results = []
        for loss, trained, frozen in (
            (autoencoder_loss(config), model, None),
            (base_loss(config, math.prod(shape[:-1])), base, model),
        ):
            params, static = eqx.partition(trained, eqx.is_inexact_array)

            def objective(p):
                return loss(eqx.combine(p, static), frozen, batch, draws, jnp.zeros((), jnp.int32))[0]  # noqa: B023

            value, grads = jax.value_and_grad(objective)(params)
            results += [value, params, optax.apply_updates(params, grads)]
        return results

    value_1, params_1, stepped_1, value_2, params_2, stepped_2 = jax.eval_shape(steps, batch, jax.random.key(0))
    assert (value_1.shape, value_2.shape) == ((), ())
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert types(stepped_1) == types(params_1)
    assert types(stepped_2) == types(params_2)


def stack_weights(stack: Stack) -> tuple[int, int]:
    """Depth and width, from the weights."""
    depth, width, hidden = stack.blocks.up.weight.shape
    assert hidden == 4 * width
    assert stack.blocks.attention.query_scale.shape == (depth, 64)
    return depth, width


@pytest.mark.parametrize("name", PAPER)
def test_networks_are_those_of_section_5_1(name, abstract):
    model, base = abstract(name)
    video = name.startswith("kinetics")
    latent_space = (4, 16, 16) if video else (32, 32)
    assert model.latent_shape == (*latent_space, 32)
    reductions = [
        network.config.reduction(len(latent_space)) for network in (model.encoder, model.decoder.denoiser.network)
    ]
    assert reductions == [(4, 8, 8)] * 2 if video else [(16, 16)] * 2

    # Encoder: 2×2 patches, [128, 256, 512, 512], 2 residual blocks a stage and 3 in the last.
    assert model.encoder.project_in.weight.shape == (2 * 2 * 3, 128)
    convolutions = [[block.conv_1.weight.shape[-1] for block in stage] for stage in model.encoder.stages]
    assert convolutions == [[128] * 2, [256] * 2, [512] * 2, [512] * 3]
    # Prior: one level of 8 × 1024, no dropout.
    prior = model.prior.network
    assert (stack_weights(prior.middle), len(prior.stages), prior.config.block.dropout) == ((8, 1024), 0, 0)
    # Decoder: 2×2 patches, stages of [128, 256, 512], 8 × 1024 in the middle, dropout 0.1, conditioned on z_0.
    decoder = model.decoder.denoiser.network
    assert decoder.project_in.weight.shape == (2 * 2 * 3, 128)
    widths = [[block.conv_1.weight.shape[-1] for block in (*stage.before, *stage.after)] for stage in decoder.stages]
    assert widths == [[128] * 4, [256] * 4, [512] * 4]
    assert (stack_weights(decoder.middle), decoder.config.block.dropout) == ((8, 1024), 0.1)
    assert decoder.context.weight.shape == (32, 1024)
    assert decoder.position.shape == (*latent_space, 1024)

    # Base: two levels, the inner one twice as wide; the paper's [512, 1024] and [6, 16] are the small one's.
    (outer,) = base.network.stages
    (before, width), (after, _) = stack_weights(outer.before), stack_weights(outer.after)
    depth, inner = stack_weights(base.network.middle)
    assert (before, after, base.network.config.block.dropout) == (3, 3, 0.1)
    assert inner == 2 * width
    if name.endswith("-small"):
        assert (width, inner, depth) == (512, 1024, 16)
    # 1024 tokens outside and 256 inside, images and video alike.
    assert (math.prod(outer.position.shape[:-1]), math.prod(base.network.position.shape[:-1])) == (1024, 256)


def base_flops_by_hand(width: int, depth: int) -> int:
    """12 w² weights a token and block (2 FLOPs each) and 4 n² w for attention: 6 blocks at 1024 tokens, the others
    twice as wide at 256; λ's embedding, modulation, the steps down and up, and 32 latent channels in and out."""
    block = lambda n, w: 24 * n * w**2 + 4 * n**2 * w  # noqa: E731
    cond = 2 * width
    blocks = 6 * block(1024, width) + depth * block(256, 2 * width)
    modulation = 2 * cond * 6 * (6 * width + depth * 2 * width) + 2 * cond * 2 * width
    embedding = 2 * (32 * cond + cond**2)
    steps = 2 * (2 * 256 * 4 * width * 2 * width)
    return blocks + modulation + embedding + steps + 2 * (2 * 1024 * 32 * width)


@pytest.mark.parametrize("name", PAPER)
def test_base_flops(name, abstract):
    base = network_costs(*abstract(name))["base"]
    channels, blocks = PAPER[name].model.base.channels, PAPER[name].model.base.blocks
    # Given frames: 4×8×8 pixels of 3 colours and a mask under each of 1024 positions; and once for all 4 steps of time
    # those of all of them, 4 times as many under a quarter of the positions.
    frames = 2 * 2 * 1024 * (4 * 8 * 8 * 4) * channels[0] if name.startswith("kinetics") else 0
    assert base.forward_flops == base_flops_by_hand(channels[0], blocks[-1]) + frames
    assert base.training_flops == 3 * base.forward_flops
    wanted = PAPER[name].paper_base_gflops
    if wanted is not None:
        # Widths are multiples of the head size, so that the paper's numbers cannot be hit exactly.
        assert base.forward_flops / 1e9 == pytest.approx(wanted, rel=0.02)
