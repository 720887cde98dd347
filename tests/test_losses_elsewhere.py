"""The losses in other people's projects: Flax NNX, Equinox's own layers, and plain JAX, with the same weights.

One small autoencoder is written three times, each in its library's way: NNX layers see the batch, channels last;
Equinox's see one example, channels first; plain JAX is a dictionary of arrays. Losses and gradients must agree.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ulx import losses, schedules, weightings

CHANNELS, HIDDEN, SIZE, PATCH = 4, 16, 8, 4
LATENT = (SIZE // PATCH) ** 2 * CHANNELS
SHAPES = {
    "encoder": (PATCH, PATCH, 3, CHANNELS),
    "prior_in": (LATENT + 1, HIDDEN),
    "prior_out": (HIDDEN, LATENT),
    "decoder_in": (3, 3, 3 + CHANNELS + 1, HIDDEN),
    "decoder_out": (3, 3, HIDDEN, 3),
}
"""Weights channels last (kernel, in, out); every layer has a bias too."""


def plain_weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {name: {"weight": draw(*shape), "bias": draw(shape[-1])} for name, shape in SHAPES.items()}


def flat_with_level(z, logsnr):
    return jnp.concatenate([z.reshape(z.shape[0], -1), logsnr[:, None] / 10], axis=-1)


def decoder_input(x_t, logsnr, z_0):
    """Noised image, z_0 on its grid, and a plane of λ: `b h w c`."""
    level = jnp.broadcast_to((logsnr / 10)[:, None, None, None], (*x_t.shape[:-1], 1))
    return jnp.concatenate([x_t, jnp.repeat(jnp.repeat(z_0, PATCH, axis=1), PATCH, axis=2), level], axis=-1)


def convolve(layer, x, stride, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, layer["weight"], (stride,) * 2, padding, dimension_numbers=dimensions)
    return y + layer["bias"]


class Plain:
    """Functions of a dictionary."""

    def __init__(self, weights):
        self.weights = weights

    def encode(self, x):
        return jnp.tanh(convolve(self.weights["encoder"], x, PATCH, "VALID"))

    def denoise_latent(self, z_t, logsnr, *, key=None):
        linear = lambda layer, x: x @ layer["weight"] + layer["bias"]  # noqa: E731
        hidden = jax.nn.silu(linear(self.weights["prior_in"], flat_with_level(z_t, logsnr)))
        return linear(self.weights["prior_out"], hidden).reshape(z_t.shape)

    def denoise_image(self, x_t, logsnr, z_0):
        hidden = jax.nn.silu(convolve(self.weights["decoder_in"], decoder_input(x_t, logsnr, z_0), 1, "SAME"))
        return convolve(self.weights["decoder_out"], hidden, 1, "SAME")


class Flax(nnx.Module):
    """NNX: layers hold their own parameters, `kernel` in the layout of `SHAPES`."""

    def __init__(self, weights):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.Conv(3, CHANNELS, (PATCH, PATCH), strides=PATCH, padding="VALID", rngs=rngs)
        self.prior_in = nnx.Linear(LATENT + 1, HIDDEN, rngs=rngs)
        self.prior_out = nnx.Linear(HIDDEN, LATENT, rngs=rngs)
        self.decoder_in = nnx.Conv(3 + CHANNELS + 1, HIDDEN, (3, 3), rngs=rngs)
        self.decoder_out = nnx.Conv(HIDDEN, 3, (3, 3), rngs=rngs)
        for name, layer in weights.items():
            getattr(self, name).kernel[...] = layer["weight"]
            getattr(self, name).bias[...] = layer["bias"]

    def encode(self, x):
        return nnx.tanh(self.encoder(x))

    def denoise_latent(self, z_t, logsnr, *, key=None):
        return self.prior_out(nnx.silu(self.prior_in(flat_with_level(z_t, logsnr)))).reshape(z_t.shape)

    def denoise_image(self, x_t, logsnr, z_0):
        return self.decoder_out(nnx.silu(self.decoder_in(decoder_input(x_t, logsnr, z_0))))


class Equinox(eqx.Module):
    """Equinox's own layers: one example at a time, channels first, weights (out, in, *kernel)."""

    encoder: eqx.nn.Conv2d
    prior_in: eqx.nn.Linear
    prior_out: eqx.nn.Linear
    decoder_in: eqx.nn.Conv2d
    decoder_out: eqx.nn.Conv2d

    def __init__(self, weights):
        key = jax.random.key(0)
        put = lambda layer, name: eqx.tree_at(  # noqa: E731
            lambda layer: (layer.weight, layer.bias),
            layer,
            (last_first(weights[name]["weight"]), weights[name]["bias"].reshape(layer.bias.shape)),
        )
        self.encoder = put(eqx.nn.Conv2d(3, CHANNELS, PATCH, stride=PATCH, key=key), "encoder")
        self.prior_in = put(eqx.nn.Linear(LATENT + 1, HIDDEN, key=key), "prior_in")
        self.prior_out = put(eqx.nn.Linear(HIDDEN, LATENT, key=key), "prior_out")
        self.decoder_in = put(eqx.nn.Conv2d(3 + CHANNELS + 1, HIDDEN, 3, padding=1, key=key), "decoder_in")
        self.decoder_out = put(eqx.nn.Conv2d(HIDDEN, 3, 3, padding=1, key=key), "decoder_out")

    def encode(self, x):
        return over_images(lambda x: jnp.tanh(self.encoder(x)), x)

    def denoise_latent(self, z_t, logsnr, *, key=None):
        one = lambda row: self.prior_out(jax.nn.silu(self.prior_in(row)))  # noqa: E731
        return jax.vmap(one)(flat_with_level(z_t, logsnr)).reshape(z_t.shape)

    def denoise_image(self, x_t, logsnr, z_0):
        one = lambda x: self.decoder_out(jax.nn.silu(self.decoder_in(x)))  # noqa: E731
        return over_images(one, decoder_input(x_t, logsnr, z_0))


def last_first(weight):
    """(*kernel, in, out) -> (out, in, *kernel)."""
    return jnp.moveaxis(weight, (-1, -2), (0, 1))


def over_images(function, x):
    """A function of one image `c h w`, over a batch `b h w c`."""
    return jnp.moveaxis(jax.vmap(function)(jnp.moveaxis(x, -1, 1)), 1, -1)


def objective(model, x, key):
    """Alg. 1 from `ulx.losses` alone: mean bits per pixel, and the terms in nats per example."""
    z_key, prior_key, decoder_key = jax.random.split(key, 3)
    latent_schedule = schedules.linear(5.0, -10.0)
    z_clean = model.encode(x)
    z_0 = losses.add_noise(z_clean, latent_schedule, key=z_key)
    prior = losses.prior_loss(model.denoise_latent, z_clean, latent_schedule, key=prior_key)
    decoder = losses.decoder_loss(
        lambda x_t, logsnr, key=None: model.denoise_image(x_t, logsnr, z_0),
        x,
        schedules.image_schedule(128),  # at so low a b that both terms weigh alike in so small a model
        weightings.sigmoid(weightings.sigmoid_bias(128), 1.5),
        key=decoder_key,
    )
    bits = losses.bits_per_pixel(prior.total + decoder, num_pixels=SIZE**2).mean()
    return bits, (prior, decoder)


@jax.jit
def with_plain_jax(weights, x, key):
    return jax.value_and_grad(lambda weights: objective(Plain(weights), x, key), has_aux=True)(weights)


def with_flax(weights, x, key):
    differentiate = nnx.jit(nnx.value_and_grad(lambda model: objective(model, x, key), has_aux=True))
    values, grads = differentiate(Flax(weights))
    return values, {name: {"weight": grads[name]["kernel"][...], "bias": grads[name]["bias"][...]} for name in SHAPES}


def with_equinox(weights, x, key):
    differentiate = eqx.filter_jit(eqx.filter_value_and_grad(lambda model: objective(model, x, key), has_aux=True))
    values, grads = differentiate(Equinox(weights))
    layers = {name: getattr(grads, name) for name in SHAPES}
    in_last = lambda weight: jnp.moveaxis(weight, (0, 1), (-1, -2))  # noqa: E731
    return values, {
        name: {"weight": in_last(layer.weight), "bias": layer.bias.reshape(-1)} for name, layer in layers.items()
    }


@pytest.fixture(scope="module")
def case():
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (6, SIZE, SIZE, 3)), jnp.float32)
    return plain_weights(), x, jax.random.key(3)


@pytest.fixture(scope="module")
def reference(case):
    return with_plain_jax(*case)


@pytest.mark.parametrize("elsewhere", [with_flax, with_equinox])
def test_same_losses_and_gradients(case, reference, elsewhere):
    """Float32 in another order of summation: losses agree to 1e-5, a layer's gradients to 1e-4 of their largest."""
    (bits, terms), grads = elsewhere(*case)
    (expected_bits, expected_terms), expected_grads = reference
    assert jax.tree.structure(terms) == jax.tree.structure(expected_terms)
    for nats, expected in zip(jax.tree.leaves(terms), jax.tree.leaves(expected_terms), strict=True):
        assert nats.shape == (6,)
        np.testing.assert_allclose(nats, expected, rtol=1e-5)
    np.testing.assert_allclose(bits, expected_bits, rtol=1e-5)
    for name in SHAPES:
        for part, expected in expected_grads[name].items():
            largest = np.abs(expected).max()
            assert largest > 1e-3  # every layer learns
            np.testing.assert_allclose(grads[name][part], expected, atol=1e-4 * largest, err_msg=f"{name} {part}")


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_finite_differences(case, reference, name):
    """Of the plain functions, along one direction through a layer; the encoder's comes by both terms and z_0."""
    weights, x, key = case
    rng, step = np.random.default_rng(2), 0.003
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    direction = {part: draw(leaf) for part, leaf in weights[name].items()}

    def bits(step):
        moved = {part: weights[name][part] + step * direction[part] for part in direction}
        return with_plain_jax(weights | {name: moved}, x, key)[0][0]

    slope = sum(jnp.vdot(reference[1][name][part], direction[part]) for part in direction)
    # Curvature leaves 0.3 % of the encoder's slope, float32 rounding of the bits 0.1 %.
    np.testing.assert_allclose((bits(step) - bits(-step)) / (2 * step), slope, rtol=1e-2)
