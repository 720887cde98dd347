import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian

from ulx import guidance

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
