import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import alpha_sigma

from ulx import diffusion

EPS32 = float(jnp.finfo(jnp.float32).eps)
EXTREMES = [-20.0, -15.0, -5.0, 0.0, 5.0, 15.0, 20.0]


def variables(logsnr, shape=(3, 4, 4, 2)):
    """x, ε, z_t and λ of a batch, made in float64 and rounded once."""
    rng = np.random.default_rng(0)
    x, eps = rng.uniform(-1, 1, shape), rng.standard_normal(shape)
    alpha, sigma = alpha_sigma(logsnr)
    as_float32 = [jnp.asarray(array, jnp.float32) for array in (x, eps, alpha * x + sigma * eps)]
    return *as_float32, jnp.full(shape[0], logsnr, jnp.float32)


def test_alpha_and_sigma_keep_their_digits_at_the_extremes():
    logsnr = np.linspace(-40.0, 40.0, 161, dtype=np.float32)
    alpha, sigma = alpha_sigma(logsnr)
    # A few roundings of an exponent of up to 20: 20 eps.
    np.testing.assert_allclose(diffusion.alpha(jnp.asarray(logsnr)), alpha, rtol=40 * EPS32)
    np.testing.assert_allclose(diffusion.sigma(jnp.asarray(logsnr)), sigma, rtol=40 * EPS32)
    np.testing.assert_allclose(diffusion.edm_sigma(jnp.asarray(logsnr)), sigma / alpha, rtol=40 * EPS32)


def test_the_latent_s_noise_is_the_paper_s():
    # λ_z(0) = 5: α ≈ 0.997, σ ≈ 0.082.
    level = jnp.array(5.0)
    assert float(diffusion.alpha(level)) == pytest.approx(0.997, abs=5e-4)
    assert float(diffusion.sigma(level)) == pytest.approx(0.082, abs=5e-4)


@pytest.mark.parametrize("logsnr", EXTREMES)
def test_noise(logsnr):
    x, eps, z_t, level = variables(logsnr)
    np.testing.assert_allclose(diffusion.noise(x, level, eps), z_t, atol=8 * EPS32)  # two products and a sum, |z| < 4


def test_noise_takes_a_level_per_example():
    x, eps, _, _ = variables(0.0)
    levels = jnp.array([-3.0, 0.0, 4.0])
    together = diffusion.noise(x, levels, eps)
    for i in range(3):
        np.testing.assert_array_equal(
            together[i : i + 1], diffusion.noise(x[i : i + 1], levels[i : i + 1], eps[i : i + 1])
        )


@pytest.mark.parametrize("logsnr", EXTREMES)
class TestConversions:
    """The digits a conversion loses are its own: an error of one rounding of z_t grows by what z_t is divided by."""

    def test_definitions(self, logsnr):
        x, eps, z_t, level = variables(logsnr)
        alpha, sigma = alpha_sigma(logsnr)
        v = alpha * np.asarray(eps, np.float64) - sigma * np.asarray(x, np.float64)
        np.testing.assert_allclose(diffusion.eps_from_x(x, z_t, level), eps, atol=16 * EPS32 / sigma)
        np.testing.assert_allclose(diffusion.v_from_x(x, z_t, level), v, atol=16 * EPS32 / sigma)

    @pytest.mark.parametrize(
        ("prediction", "amplification"),
        [
            ("x", lambda alpha, sigma: 0.0),
            ("eps", lambda alpha, sigma: 1 / alpha),  # at λ = −20 an ε network's x̂ keeps 3 of its 7 digits
            ("v", lambda alpha, sigma: 1.0),  # at every λ exact to a few roundings
        ],
    )
    def test_round_trip_from_x(self, logsnr, prediction, amplification):
        x, _, z_t, level = variables(logsnr)
        output = {
            "x": x,
            "eps": diffusion.eps_from_x(x, z_t, level),
            "v": diffusion.v_from_x(x, z_t, level),
        }[prediction]
        back = diffusion.x_from_prediction(prediction, output, z_t, level)
        np.testing.assert_allclose(back, x, atol=16 * EPS32 * amplification(*alpha_sigma(logsnr)))

    @pytest.mark.parametrize("prediction", ["eps", "v"])
    def test_round_trip_from_the_network_s_output(self, logsnr, prediction):
        x, eps, z_t, level = variables(logsnr)
        alpha, sigma = alpha_sigma(logsnr)
        output = eps if prediction == "eps" else jnp.asarray(alpha * eps - sigma * x)
        x_hat = diffusion.x_from_prediction(prediction, output, z_t, level)
        back = (diffusion.eps_from_x if prediction == "eps" else diffusion.v_from_x)(x_hat, z_t, level)
        np.testing.assert_allclose(back, output, atol=16 * EPS32 / sigma)

    def test_one_loss_in_three_forms(self, logsnr):
        """e^λ ‖x − x̂‖² = ‖ε − ε̂‖² = α² ‖v − v̂‖²."""
        x, eps, z_t, level = variables(logsnr)
        alpha, _ = alpha_sigma(logsnr)
        x_hat = x + 0.5 * eps  # any wrong guess
        in_x = np.exp(logsnr) * np.sum((x - x_hat) ** 2)
        in_eps = np.sum((eps - diffusion.eps_from_x(x_hat, z_t, level)) ** 2)
        in_v = alpha**2 * np.sum((diffusion.v_from_x(x, z_t, level) - diffusion.v_from_x(x_hat, z_t, level)) ** 2)
        # ε̂ − ε is (α/σ) 0.5 ε, made of numbers 1/σ large: its relative error is a few roundings / α.
        np.testing.assert_allclose([in_eps, in_v], in_x, rtol=32 * EPS32 / alpha)


class TestRandomness:
    """An example's noise belongs to its key, not to its batch or its place in it."""

    like = jnp.zeros((4000, 5))

    def test_a_key_per_example_gives_the_same_noise_in_any_batch(self):
        keys = jax.random.split(jax.random.key(0), 4000)
        whole = diffusion.normal(keys, self.like)
        picked = jnp.array([3, 0])
        np.testing.assert_array_equal(diffusion.normal(keys[picked], self.like[picked]), whole[picked])

    def test_one_key_gives_an_example_the_same_noise_in_a_larger_batch(self):
        key = jax.random.key(0)
        np.testing.assert_array_equal(diffusion.normal(key, self.like)[:2], diffusion.normal(key, self.like[:2]))

    def test_examples_differ_and_the_noise_is_standard_normal(self):
        noise = np.asarray(diffusion.normal(jax.random.key(0), self.like))
        # Of 20,000 numbers the mean and the correlation are known to 0.007, the variance to 0.01: 4 standard errors.
        assert abs(noise.mean()) < 0.028
        assert abs(noise.var() - 1) < 0.04
        assert abs(np.mean(noise[1:] * noise[:-1])) < 0.028
        assert len(np.unique(noise)) > 0.99 * noise.size


class TestKeysThatCannotServe:
    def test_old_style_keys_are_named(self):
        with pytest.raises(TypeError, match=r"use jax.random.key\(seed\)"):
            inspect.unwrap(diffusion.per_example_keys)(jax.random.PRNGKey(0), 2)

    def test_one_key_too_few(self):
        with pytest.raises(ValueError, match="1 keys for a batch of 3"):
            diffusion.per_example_keys(jax.random.split(jax.random.key(0), 1), 3)

    def test_unknown_prediction(self):
        with pytest.raises(ValueError, match="unknown prediction 'score'"):
            inspect.unwrap(diffusion.x_from_prediction)("score", jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1))
