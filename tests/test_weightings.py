import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_mean

from ulx import weightings

LOGSNR = jnp.linspace(-15.0, 15.0, 121)


def test_elbo_is_one():
    np.testing.assert_array_equal(weightings.elbo()(LOGSNR), np.ones(LOGSNR.shape))


class TestSigmoid:
    """Paper §2, trap 2: sigmoid(b − λ) beside exp(λ)/2, so that low noise is discounted."""

    def test_discounts_low_noise(self):
        weight = weightings.sigmoid(bias=-3.0, factor=1.5)
        assert float(weight(jnp.array(-3.0))) == pytest.approx(0.75)
        assert float(weight(jnp.array(-15.0))) == pytest.approx(1.5, rel=1e-5)  # high noise: all of the loss factor
        assert float(weight(jnp.array(9.0))) == pytest.approx(1.5 * math.exp(-12), rel=1e-4)  # low noise: e^(b − λ)

    @pytest.mark.parametrize("bias", [-3.0, 0.0, 2.5])
    def test_is_the_public_sid2_loss(self, bias):
        # SiD2's codes weight the x-MSE by ½ e^b sigmoid(λ − b) and the ε-MSE, e^λ times smaller, by ½ sigmoid(b − λ).
        ours = jnp.exp(LOGSNR) / 2 * weightings.sigmoid(bias)(LOGSNR)
        np.testing.assert_allclose(ours, 0.5 * math.exp(bias) * jax.nn.sigmoid(LOGSNR - bias), rtol=1e-5)

    def test_is_the_chance_that_a_logistic_maximum_lies_above(self):
        # App. B of the paper: an ELBO whose maximum log-SNR is drawn from logistic(b, 1) is this weighting.
        bias, logsnr = 2.5, 3.5
        maximum = bias + jax.random.logistic(jax.random.key(0), (20_000,))
        assert_mean(maximum >= logsnr, float(weightings.sigmoid(bias)(jnp.array(logsnr))))

    def test_its_numbers_can_change_without_a_new_trace(self):
        traces = []

        @jax.jit
        def weigh(weighting):
            traces.append(weighting)
            return weighting(LOGSNR)

        for bias, factor in ((2.5, 1.5), (3.0, 1.7)):
            np.testing.assert_allclose(
                weigh(weightings.sigmoid(jnp.array(bias), jnp.array(factor))),
                factor / (1 + np.exp(np.asarray(LOGSNR) - bias)),
                rtol=1e-5,  # float32
            )
        assert len(traces) == 1


@pytest.mark.parametrize(("resolution", "bias"), [(512, -3.0), (64, 1.1589), (32, 2.5452), (1024, -4.3863)])
def test_bias_follows_the_resolution(resolution, bias):
    """Paper §2, trap 5: from −3 at 512 pixels up to +2.5 at 32."""
    assert weightings.sigmoid_bias(resolution) == pytest.approx(bias, abs=1e-4)
    assert weightings.sigmoid_bias(resolution, at_512=0.0) == pytest.approx(bias + 3, abs=1e-4)


@pytest.mark.parametrize(("bias", "factor"), [(2.5, 1.3), (0.0, 2.0), (-3.0, 4.0)])
def test_cutoff_is_where_the_weight_is_one(bias, factor):
    at = weightings.cutoff(bias, factor)
    assert float(weightings.sigmoid(bias, factor)(jnp.array(at))) == pytest.approx(1.0, rel=1e-5)  # float32
    assert at == pytest.approx(bias + math.log(factor - 1))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_nothing_is_worth_coding_at_a_factor_of_one(factor):
    assert weightings.cutoff(2.5, factor) == -math.inf
    # ... because the weight is below 1 at every noise level (at the noisiest, 1 to float32's precision).
    assert jnp.all(weightings.sigmoid(2.5, factor)(LOGSNR[LOGSNR > -5]) < 1)
    assert jnp.any(weightings.sigmoid(2.5, 1.01)(LOGSNR) > 1)
