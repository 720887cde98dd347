import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import alpha_sigma, gaussian

from ulx import guidance, samplers

# Two classes: the conditional best denoisers are those of Gaussians at +1 and −1; "no class" is a wide one between.
CONDITIONAL, NULL = gaussian(np.full(3, 1.0), np.full(3, 0.2)), gaussian(np.zeros(3), np.full(3, 1.2))
Z_T = jnp.linspace(-2.0, 2.0, 12).reshape(4, 3)
LOGSNR = jnp.array([-3.0, 0.0, 1.0, 4.0])


def denoise_both(z_t, logsnr, *, key=None):
    """First half conditional, second half not."""
    half = z_t.shape[0] // 2
    return jnp.concatenate([CONDITIONAL.denoise(z_t[:half], logsnr[:half]), NULL.denoise(z_t[half:], logsnr[half:])])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_scale_goes_from_null_over_conditional_and_beyond(scale):
    conditional, null = CONDITIONAL.denoise(Z_T, LOGSNR), NULL.denoise(Z_T, LOGSNR)
    guided = guidance.classifier_free(denoise_both, scale)(Z_T, LOGSNR)
    # float32 roundings of numbers up to 3.
    np.testing.assert_allclose(guided, (1 - scale) * null + scale * conditional, atol=2e-6)
    if scale == 1.0:
        np.testing.assert_allclose(guided, conditional, atol=1e-6)
    if scale == 0.0:
        np.testing.assert_array_equal(guided, null)


def test_scale_may_differ_by_example():
    scales = jnp.array([0.0, 1.0, 2.0, 0.5])
    together = guidance.classifier_free(denoise_both, scales)(Z_T, LOGSNR)
    for i, scale in enumerate(np.asarray(scales)):
        alone = guidance.classifier_free(denoise_both, float(scale))(Z_T[i : i + 1], LOGSNR[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-6)  # float32


def test_one_pass_of_twice_the_batch():
    batches = []

    def denoise(z_t, logsnr, *, key=None):
        batches.append((z_t, logsnr))
        return z_t

    guidance.classifier_free(denoise, 2.0)(Z_T, LOGSNR)
    [(z_t, logsnr)] = batches
    np.testing.assert_array_equal(z_t, jnp.concatenate([Z_T, Z_T]))
    np.testing.assert_array_equal(logsnr, jnp.concatenate([LOGSNR, LOGSNR]))


class TestInterval:
    guided = staticmethod(guidance.classifier_free(denoise_both, 3.0))
    limited = staticmethod(
        guidance.within((0.0, 1.0), guidance.classifier_free(denoise_both, 3.0), CONDITIONAL.denoise)
    )

    def test_guided_inside_and_not_outside(self):
        """λ = −3, 0, 1, 4 in one batch: the ends belong to the interval."""
        x_hat = self.limited(Z_T, LOGSNR)
        guided, plain = self.guided(Z_T, LOGSNR), CONDITIONAL.denoise(Z_T, LOGSNR)
        # float32: inside a program of its own a product and a sum may be rounded once.
        np.testing.assert_allclose(x_hat[1:3], guided[1:3], rtol=1e-6)
        np.testing.assert_allclose(x_hat[jnp.array([0, 3])], plain[jnp.array([0, 3])], rtol=1e-6)
        assert np.abs(guided - plain).max() > 0.1

    @pytest.mark.parametrize(("logsnr", "calls"), [(-0.01, 1), (-1e-4, 2), (0.5, 2), (1.0001, 2), (1.01, 1)])
    def test_only_what_is_needed_is_called(self, logsnr, calls):
        rows = []

        def noted(denoise):
            def call(z_t, logsnr, *, key=None):
                jax.debug.callback(lambda _: rows.append(z_t.shape[0]), z_t)
                return denoise(z_t, logsnr)

            return call

        guided = guidance.classifier_free(noted(denoise_both), 3.0)
        limited = guidance.within((0.0, 1.0), guided, noted(CONDITIONAL.denoise))
        x_hat = limited(Z_T, jnp.full(4, logsnr))
        jax.effects_barrier()
        assert rows == [4 * calls]
        assert int(guidance.network_calls(limited, jnp.asarray(logsnr))) == calls
        expected = self.guided if calls == 2 else CONDITIONAL.denoise
        np.testing.assert_allclose(x_hat, expected(Z_T, jnp.full(4, logsnr)), atol=1e-6)  # float32

    @pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, -2.0), (float("nan"), 1.0)])
    def test_refuses_an_empty_interval(self, interval):
        with pytest.raises(ValueError, match="lowest < highest"):
            guidance.within(interval, self.guided, CONDITIONAL.denoise)


class TestAutoguidance:
    better, weaker = gaussian(np.full(3, 0.5), np.full(3, 0.2)), gaussian(np.full(3, 0.5), np.full(3, 0.6))

    def test_goes_from_the_weaker_over_the_better_and_beyond(self):
        better, weaker = self.better.denoise(Z_T, LOGSNR), self.weaker.denoise(Z_T, LOGSNR)
        scales = jnp.array([0.0, 1.0, 2.5, 2.5])
        x_hat = guidance.autoguidance(self.better.denoise, self.weaker.denoise, scales)(Z_T, LOGSNR)
        np.testing.assert_array_equal(x_hat[0], weaker[0])
        np.testing.assert_allclose(x_hat[1], better[1], atol=1e-6)  # float32
        np.testing.assert_allclose(x_hat[2:], weaker[2:] + 2.5 * (better - weaker)[2:], atol=2e-6)

    def test_both_get_the_key(self):
        keys = jax.random.split(jax.random.key(0), 4)
        draws = lambda z_t, logsnr, *, key=None: jax.vmap(lambda k: jax.random.normal(k, (3,)))(key)  # noqa: E731
        x_hat = guidance.autoguidance(draws, draws, 2.0)(Z_T, LOGSNR, key=keys)
        np.testing.assert_allclose(x_hat, draws(Z_T, LOGSNR, key=keys), atol=1e-6)

    def test_flow_between_gaussians_in_closed_form(self):
        """Guided within [−2, 1]. Data N(m, v) alone: u − m grows as sqrt(v + s²); mixed: as the product of powers.

        du/ds = (u − x̂)/s with x̂ = m + v/(v + s²) (u − m) for each model, and ∫ s/(v + s²) ds = ½ log(v + s²).
        """
        scale, logsnrs, starts = 2.5, np.array([-8.0, -2.0, 1.0, 5.0]), jnp.linspace(-2, 2, 6)[:, None]
        guided = guidance.autoguidance(self.better.denoise, self.weaker.denoise, scale)
        with jax.enable_x64(True):
            # A jump of the field inside a step would cost Heun its order: pieces end where the interval does.
            z, nfe = jnp.tile(jnp.asarray(starts, jnp.float64), (1, 3)), []
            run = jax.jit(samplers.sample, static_argnames=("denoise", "solver"))
            for begin, end, denoise in zip(
                logsnrs[:-1], logsnrs[1:], (self.better.denoise, guided, self.better.denoise), strict=True
            ):
                grid = samplers.logsnr_grid(64, logsnr_min=float(begin), logsnr_max=float(end))
                result = run(denoise, z, grid, "heun")
                z = result.z
                nfe.append(int(result.nfe))
        assert nfe == [128, 256, 128]
        (alpha, _), s = alpha_sigma(logsnrs), np.exp(-logsnrs / 2)
        spread = np.sqrt(0.2 + s**2)
        power = spread**scale * (0.6 + s**2) ** ((1 - scale) / 2)
        growth = spread[1] / spread[0] * power[2] / power[1] * spread[3] / spread[2]
        expected = alpha[3] * (0.5 + growth * (np.asarray(starts) / alpha[0] - 0.5))
        # Heun's own error at these steps, h = 0.05 to 0.1: some h²/24 of numbers up to 2.
        np.testing.assert_allclose(z, np.tile(expected, (1, 3)), atol=1e-3)
        assert growth < 0.8 * spread[3] / spread[0]  # narrower than without guidance
