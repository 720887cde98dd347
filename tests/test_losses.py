import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import alpha_sigma, assert_mean, gaussian, gaussian_nats

from ulx import diffusion, losses, schedules, weightings

# Every schedule from 5 to −10: the expected loss is the same for all (paper, Eq. 2).
SAME_ENDS = [
    schedules.linear(5.0, -10.0),
    schedules.cosine(5.0, -10.0),
    schedules.cosine(5.0, -10.0, shift=-3.0),
    schedules.linear(3.0, -12.0).shifted(2.0),
]
every_schedule = pytest.mark.parametrize("schedule", SAME_ENDS, ids=str)
# 128 Gauss-Legendre nodes integrate these loss curves over t to 1e-8, so that what is left is float32.
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(128)
T, T_WEIGHTS = jnp.asarray((NODES + 1) / 2, jnp.float32), NODE_WEIGHTS / 2
FLOAT32 = 1e-5  # a sum of 128 terms, each of a few roundings and an exponential
KEY = jax.random.key(0)
X = jnp.linspace(-2.0, 2.0, 128 * 6).reshape(128, 3, 1, 2)  # one shape for most tests: compiling is their time


def zero(z_t, logsnr, *, key=None):
    """The denoiser that always answers 0: its loss is the weight times ‖x‖², whatever the noise."""
    return jnp.zeros_like(z_t)


def off_by(x, squared_error):
    """A denoiser whose answer is off by squared_error(λ) in every dimension, whatever the noise."""
    return lambda z_t, logsnr, key=None: x + diffusion.expand(jnp.sqrt(squared_error(logsnr)), z_t)


def integral(denoise, x, schedule, weighting=None):
    """E_t of the diffusion loss of the one example `x` by quadrature over t."""
    batch = jnp.broadcast_to(x, (len(T), *x.shape))
    nats = losses.diffusion_loss(denoise, batch, schedule, weighting, key=KEY, t=T)
    return np.sum(T_WEIGHTS * np.asarray(nats, np.float64))


def softplus(x):
    return math.log1p(math.exp(x))


@every_schedule
class TestDiffusionLossAgainstItsIntegral:
    """Paper §2, traps 1 to 3, at once: a wrong sign, weight, factor or reduction leaves the closed form."""

    def test_elbo(self, schedule):
        # ∫ ½ e^λ ‖x‖² dλ, with ‖x‖² the sum over all dimensions.
        x = jnp.linspace(-1.0, 1.0, 6).reshape(3, 1, 2) + 0.25
        expected = 0.5 * (math.exp(5) - math.exp(-10)) * float(np.sum(np.asarray(x, np.float64) ** 2))
        assert integral(zero, x, schedule) == pytest.approx(expected, rel=FLOAT32)

    @pytest.mark.parametrize(("bias", "factor"), [(-3.0, 1.0), (2.5, 1.5)])
    def test_sigmoid(self, schedule, bias, factor):
        # ∫ ½ e^λ c sigmoid(b − λ) dλ = ½ c e^b [softplus(λ − b)] between the ends.
        per_square = 0.5 * factor * math.exp(bias) * (softplus(5 - bias) - softplus(-10 - bias))
        x, weighting = jnp.full((3, 1, 2), 0.7), weightings.sigmoid(bias, factor)
        assert integral(zero, x, schedule, weighting) == pytest.approx(6 * 0.49 * per_square, rel=FLOAT32)

    @pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
    def test_gaussian(self, schedule, variance):
        # The error of a Gaussian's best denoiser, s²/(1 + s² e^λ), integrates to a difference of capacities.
        x = jnp.zeros((3, 1, 2))
        denoise = off_by(x, lambda logsnr: variance / (1 + variance * jnp.exp(logsnr)))
        expected = gaussian_nats(np.full(6, variance), 5, -10)
        assert integral(denoise, x, schedule) == pytest.approx(expected, rel=FLOAT32)

    def test_decoder_and_prior_are_this_loss(self, schedule):
        x, weighting, t = X, weightings.sigmoid(2.5, 1.5), T
        np.testing.assert_array_equal(
            losses.decoder_loss(zero, x, schedule, weighting, key=KEY, t=t),
            losses.diffusion_loss(zero, x, schedule, weighting, key=KEY, t=t),
        )
        prior = losses.prior_loss(zero, x, schedule, key=KEY, t=t)
        np.testing.assert_array_equal(prior.diffusion, losses.diffusion_loss(zero, x, schedule, key=KEY, t=t))
        np.testing.assert_array_equal(prior.terminal, losses.terminal_kl(x, -10.0))
        np.testing.assert_array_equal(prior.total, prior.diffusion + prior.terminal)


@pytest.mark.parametrize("schedule", SAME_ENDS[:2], ids=str)
def test_monte_carlo_loss_of_the_exact_denoiser(schedule):
    """Noise, times and a real denoiser together, for a Gaussian with its own mean and variance in every dimension."""
    mean, variance = np.array([[0.5, -1.0], [0.0, 2.0]]), np.array([[0.3, 1.0], [4.0, 0.05]])
    data = gaussian(mean, variance)
    nats = jax.jit(lambda x, key: losses.diffusion_loss(data.denoise, x, schedule, key=key))(data.draw(1, 4096), KEY)
    # Stratified times make the true error of the mean smaller than this standard error.
    assert_mean(nats, gaussian_nats(variance, 5, -10))


@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
def test_same_loss_whatever_the_network_predicts(prediction):
    """−λ'/2 ‖ε − ε̂‖² and −λ'/2 α² ‖v − v̂‖² are this loss: a network wrong by δ in its own space costs just that."""
    schedule, delta = schedules.linear(5.0, -10.0), 0.3
    x, t = X, T
    logsnr = schedule(t)

    def denoise(z_t, logsnr, *, key=None):
        truth = {
            "x": x,
            "eps": diffusion.eps_from_x(x, z_t, logsnr),
            "v": diffusion.v_from_x(x, z_t, logsnr),
        }[prediction]
        return diffusion.x_from_prediction(prediction, truth + delta, z_t, logsnr)

    in_its_space = {"x": np.exp(logsnr), "eps": 1.0, "v": alpha_sigma(logsnr)[0] ** 2}[prediction]
    nats = losses.diffusion_loss(denoise, x, schedule, key=KEY, t=t)
    # At λ = 5 the error in x is 0.3 σ = 0.02: float32's rounding of x is 1e-5 of it, twice that squared.
    np.testing.assert_allclose(nats, 15 / 2 * in_its_space * 6 * delta**2, rtol=1e-4)


class TestTerminalKl:
    """Paper §2, trap 4."""

    @pytest.mark.parametrize("logsnr", [-15.0, -10.0, -2.0, 0.0, 3.0])
    def test_against_quadrature(self, logsnr):
        z_clean = np.array([[0.0, 0.0], [1.0, -2.0], [0.3, 3.0]])
        alpha, sigma = alpha_sigma(logsnr)
        unit = np.linspace(-12, 12, 4001)
        expected = []
        for z in z_clean.ravel():
            density = np.exp(-0.5 * unit**2) / np.sqrt(2 * np.pi)
            log_ratio = -0.5 * unit**2 - np.log(sigma) + 0.5 * (alpha * z + sigma * unit) ** 2
            expected.append(np.trapezoid(density * log_ratio, unit))
        expected = np.array(expected).reshape(z_clean.shape).sum(axis=1)
        # float32: 1e-6 relative, and 1e-12 where 1 − σ² + log σ² cancels in the quadrature itself.
        nats = losses.terminal_kl(jnp.asarray(z_clean, jnp.float32), logsnr)
        np.testing.assert_allclose(nats, expected, rtol=2e-6, atol=1e-12)

    def test_counts_the_dimensions_of_any_shape(self):
        flat = losses.terminal_kl(jnp.zeros((2, 24)), -1.0)
        np.testing.assert_array_equal(losses.terminal_kl(jnp.zeros((2, 2, 3, 4)), -1.0), flat)
        assert float(flat[0]) > 0  # even at z = 0: σ < 1

    @pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
    @pytest.mark.parametrize("logsnr_min", [-10.0, -3.0, 0.0, 2.0])
    def test_prior_bound_is_the_rate_plus_the_aggregate_s_own_kl(self, variance, logsnr_min):
        schedule = schedules.linear(5.0, logsnr_min)
        # ±s has the second moment s² that the terminal term needs, exactly; the denoiser has the Gaussian's error.
        z_clean = jnp.tile(jnp.array([[1.0], [-1.0]]) * math.sqrt(variance), (len(T) // 2, 1))
        denoise = off_by(z_clean, lambda logsnr: variance / (1 + variance * jnp.exp(logsnr)))
        terms = losses.prior_loss(denoise, z_clean, schedule, key=KEY, t=T)
        bound = np.sum(T_WEIGHTS * np.asarray(terms.diffusion, np.float64)) + float(terms.terminal.mean())

        rate = 0.5 * math.log1p(variance * math.exp(5))
        alpha, sigma = alpha_sigma(logsnr_min)
        marginal = alpha**2 * variance + sigma**2
        aggregate_kl = 0.5 * (marginal - 1 - math.log(marginal))
        assert bound == pytest.approx(rate + aggregate_kl, rel=FLOAT32)
        if variance == 1.0:
            assert bound == pytest.approx(rate, rel=FLOAT32)  # exact for every λ_z(1)
            assert losses.bits_per_latent_dim(jnp.array(bound), num_dims=1) == pytest.approx(3.61, abs=0.005)
        if (variance, logsnr_min) == (4.0, 0.0):
            assert bound - rate == pytest.approx(0.29, abs=0.005)


class TestTimes:
    @pytest.mark.parametrize("size", [1, 7, 64])
    def test_cover_the_unit_interval_evenly(self, size):
        for seed in range(5):
            t = np.sort(np.asarray(losses.sample_t(jax.random.key(seed), size), np.float64))
            assert t[0] >= 0
            assert t[-1] < 1
            # Neighbours are 1/size apart, around the end too (float32).
            np.testing.assert_allclose(np.diff(t, append=t[0] + 1), 1 / size, atol=1e-6)

    def test_each_is_uniform(self):
        t = jax.vmap(lambda key: losses.sample_t(key, 5))(jax.random.split(KEY, 4000))
        for column in t.T:
            assert_mean(column, 1 / 2)
            assert_mean(column**2, 1 / 3)

    def test_the_loss_draws_them_from_its_key(self):
        seen: list[np.ndarray] = []

        def denoise(z_t, logsnr, *, key=None):
            seen.append(np.asarray(schedules.linear(5.0, -10.0).inverse(logsnr)))
            return z_t

        for seed in (0, 0, 1):
            losses.diffusion_loss(denoise, X, schedules.linear(5.0, -10.0), key=jax.random.key(seed))
        np.testing.assert_array_equal(seen[0], seen[1])
        assert np.abs(seen[0] - seen[2]).min() > 1e-3
        np.testing.assert_allclose(np.diff(np.sort(seen[2])), 1 / 128, atol=1e-5)


class TestKeys:
    schedule = schedules.linear(5.0, -10.0)

    def test_an_example_s_loss_does_not_depend_on_its_batch(self):
        def nats(x, keys, t):
            return losses.diffusion_loss(lambda z_t, logsnr, key=None: 0.5 * z_t, x, self.schedule, key=keys, t=t)

        keys = jax.random.split(KEY, 128)
        once = nats(X, keys, T)
        # The last two again, elsewhere, in a batch whose other examples have other keys.
        other_keys = jax.random.split(jax.random.key(1), 128).at[:2].set(keys[-2:])
        again = nats(jnp.roll(X, 2, axis=0), other_keys, jnp.roll(T, 2))
        np.testing.assert_allclose(again[:2], once[-2:], rtol=1e-6)
        assert np.mean(np.abs(again[2:] / once[:-2] - 1) > 1e-3) > 0.9

    def test_the_denoiser_gets_keys_of_its_own(self):
        keys, seen = jax.random.split(KEY, 128), []

        def denoise(z_t, logsnr, *, key=None):
            assert key is not None
            seen.append((diffusion.eps_from_x(X, z_t, logsnr), key))
            return z_t

        losses.diffusion_loss(denoise, X, self.schedule, key=keys, t=jnp.full(128, 0.5))
        noise, dropout_keys = seen[0]
        assert len(np.unique(np.asarray(jax.random.key_data(dropout_keys)), axis=0)) == 128
        # Dropout drawn from those keys shares nothing with the noise in z_t.
        assert np.abs(diffusion.normal(dropout_keys, noise) - noise).min() > 1e-4

    def test_z_0_is_the_clean_latent_with_the_schedule_s_least_noise(self):
        alpha, sigma = alpha_sigma(5.0)
        expected = alpha * np.asarray(X) + sigma * np.asarray(diffusion.normal(KEY, X))
        np.testing.assert_allclose(losses.add_noise(X, self.schedule, key=KEY), expected, atol=1e-6)  # float32


class TestPriorWarmUp:
    """Paper §2, trap 9: it scales what the prior sends into the encoder, and nothing else."""

    @staticmethod
    @jax.jit
    def with_and_without(scale):
        """The prior's loss and its gradients for encoder and prior; first by way of `scale_gradient`, then plain."""

        def nats(encoder, prior, through):
            z_clean = through(jnp.tanh(encoder * jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)))
            schedule = schedules.linear(5.0, -2.0)
            terms = losses.prior_loss(lambda z_t, logsnr, key=None: prior * z_t, z_clean, schedule, key=KEY)
            return terms.total.mean()

        differentiate = jax.value_and_grad(nats, argnums=(0, 1))
        return tuple(
            differentiate(jnp.array(0.7), jnp.array(0.3), through)
            for through in (lambda z_clean: losses.scale_gradient(z_clean, scale), lambda z_clean: z_clean)
        )

    @pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
    def test_scales_the_encoder_s_gradient_alone(self, scale):
        (scaled_nats, (scaled_encoder, scaled_prior)), (nats, (encoder, prior)) = self.with_and_without(
            jnp.array(scale)
        )
        np.testing.assert_allclose([scaled_nats, scaled_prior], [nats, prior], rtol=1e-6)  # float32
        np.testing.assert_allclose(scaled_encoder, scale * encoder, rtol=1e-5)
        assert abs(float(encoder)) > 0.1

    @pytest.mark.parametrize("scale", [0.0, 0.3, 1 / 3, 1.0])
    def test_the_value_is_the_same_to_the_bit(self, scale):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1000, 3)), jnp.float32)
        np.testing.assert_array_equal(losses.scale_gradient(x, scale), x)
        np.testing.assert_array_equal(jax.jit(losses.scale_gradient)(x, jnp.array(scale)), x)


class TestBits:
    def test_a_uniform_byte_is_eight_bits(self):
        # 32×32 pixels of 3 uniform bytes: 24 bits per pixel, 8 per number.
        nats = jnp.array([32 * 32 * 3 * math.log(256)])
        assert float(losses.bits_per_pixel(nats, num_pixels=32 * 32)[0]) == pytest.approx(24)
        assert float(losses.bits_per_latent_dim(nats, num_dims=32 * 32 * 3)[0]) == pytest.approx(8)

    def test_one_divisor_for_both_terms(self):
        """Paper §2, traps 3 and 8: the latent's nats and the image's are divided by the same number of pixels."""
        x, z_clean = jnp.ones((2, 8, 8, 3)), jnp.full((2, 2, 2, 4), 2.0)
        schedule, t = schedules.linear(5.0, -10.0), jnp.array([0.2, 0.7])

        @jax.jit
        def bits(x, z_clean):
            prior = losses.prior_loss(zero, z_clean, schedule, key=KEY, t=t)
            decoder = losses.decoder_loss(zero, x, schedule, weightings.elbo(), key=KEY, t=t)
            return losses.bits_per_pixel(prior.total + decoder, num_pixels=64)

        # ‖x‖² = 192 and ‖z‖² = 64 by hand: sums over each, not means.
        per_square = 15 / 2 * np.exp(5 - 15 * np.asarray(t))
        expected = (per_square * (192 + 64) + np.asarray(losses.terminal_kl(z_clean, -10.0))) / 64 / math.log(2)
        np.testing.assert_allclose(bits(x, z_clean), expected, rtol=1e-5)  # float32

    @pytest.mark.parametrize("count", [0, -1])
    def test_refuses_no_pixels(self, count):
        with pytest.raises(ValueError, match=str(count)):
            losses.bits_per_pixel(jnp.ones(2), num_pixels=count)
        with pytest.raises(ValueError, match=str(count)):
            losses.bits_per_latent_dim(jnp.ones(2), num_dims=count)


class TestBadInput:
    schedule = schedules.linear(5.0, -10.0)

    def test_keys_per_example_need_times(self):
        with pytest.raises(ValueError, match=r"sample_t"):
            losses.diffusion_loss(zero, X, self.schedule, key=jax.random.split(KEY, 128))

    def test_a_denoiser_that_answers_in_another_shape(self):
        def flat(z_t, logsnr, *, key=None):
            return z_t[:, 0, 0]

        with pytest.raises(ValueError, match=r"\(128, 2\).*\(128, 3, 1, 2\)"):
            losses.diffusion_loss(flat, X, self.schedule, key=KEY)


def python_examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_objective_in_the_docstring_runs():
    """The module's example, with stand-ins for the networks: bits that can be minimised."""
    (example,) = python_examples(losses.__doc__ or "")
    names = {
        "encode": lambda params, x: params * x.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)),
        "denoise_latent": lambda params: lambda z_t, logsnr, key=None: params * z_t,
        "denoise_given": lambda params, z_0: lambda x_t, logsnr, key=None: params * jnp.full_like(x_t, z_0.mean()),
    }
    exec(example, names)
    x = jnp.linspace(-1.0, 1.0, 4 * 32 * 32 * 3).reshape(4, 32, 32, 3)
    bits, slope = jax.jit(jax.value_and_grad(names["objective"]))(jnp.ones(()), x, KEY)
    assert bits.shape == ()
    assert bits > 0
    assert abs(slope) > 1e-3


def test_the_example_in_the_readme_runs():
    (example,) = python_examples((Path(__file__).parents[1] / "README.md").read_text())

    @jax.jit
    def run(x, z_clean):
        names = {"key": KEY, "denoise": zero, "denoise_given_z_0": zero, "x": x, "z_clean": z_clean}
        exec(example, names)
        return names["terms"], names["nats"], names["bits"]

    x, z_clean = jnp.full((4, 32, 32, 3), 0.5), jnp.ones((4, 8, 8, 4))
    terms, nats, bits = run(x, z_clean)
    # What its comments promise: nats per example, and bits per pixel of 32×32.
    assert terms.diffusion.shape == terms.terminal.shape == nats.shape == (4,)
    np.testing.assert_allclose(terms.terminal, losses.terminal_kl(z_clean, -10.0), rtol=1e-6)  # float32
    np.testing.assert_allclose(bits, terms.total / (1024 * math.log(2)), rtol=1e-6)
    assert np.all(nats > 0)


def test_importing_the_losses_loads_no_other_library():
    """Somebody else's project gets jax and jaxtyping with them, and no more."""
    code = "import sys, ulx.losses; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"jax", "jaxtyping", "ulx"} <= set(loaded)
    assert not {"equinox", "grain", "orbax", "diffrax", "optax"} & set(loaded)
