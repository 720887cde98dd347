import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_mean

from ulx import schedules
from ulx.time_sampling import antithetic, independent, low_discrepancy, proposal_from_levels, stratified

LINEAR = schedules.linear(5.0, -10.0)
SCHEDULES = [LINEAR, schedules.cosine(5.0, -10.0), schedules.cosine(8.0, -7.0).shifted(-3.0)]
KEY = jax.random.key(0)


class TestPlacements:
    @pytest.mark.parametrize("placement", [independent, stratified, antithetic, low_discrepancy])
    def test_unbiased(self, placement):
        """The mean of u³ over an example's points has expectation 1/4, in batches that are independent."""
        u = np.asarray(jax.vmap(lambda key: placement(key, 2, 4))(jax.random.split(KEY, 4096)))
        assert u.shape == (4096, 2, 4)
        assert np.all((u >= 0) & (u <= 1))
        assert_mean(np.mean(u**3, axis=(1, 2)), 0.25)
        assert_mean(np.mean(u[:, 1] ** 3, axis=1), 0.25)

    def test_independent(self):
        u = np.asarray(independent(KEY, 2000, 3))
        assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.1  # 1/sqrt(2000), four times
        assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.1

    def test_stratified_has_one_point_in_each_slice(self):
        u = np.asarray(stratified(KEY, 500, 8))
        np.testing.assert_array_equal(np.floor(u * 8), np.broadcast_to(np.arange(8), u.shape))
        inside = u * 8 % 1
        assert np.abs(np.corrcoef(inside.T) - np.eye(8)).max() < 0.2  # independent within the slices

    def test_antithetic_points_are_pairs(self):
        u = np.asarray(antithetic(KEY, 500, 6))
        np.testing.assert_allclose(u[:, :3] + u[:, 3:], 1, atol=1e-6)
        assert np.abs(np.corrcoef(u[:, :3].T) - np.eye(3)).max() < 0.2
        with pytest.raises(ValueError, match="must be even, got 3"):
            antithetic(KEY, 2, 3)

    def test_low_discrepancy_is_one_grid_and_a_grid_for_each_example(self):
        u = np.asarray(low_discrepancy(KEY, 5, 4))
        for points in (u.ravel(), *u):
            np.testing.assert_allclose(np.diff(np.sort(points)), 1 / points.size, atol=1e-6)

    @pytest.mark.parametrize("placement", [independent, stratified, antithetic])
    def test_an_example_owns_its_points(self, placement):
        keys = jax.random.split(KEY, 6)
        np.testing.assert_array_equal(placement(keys[2:], 4, 2), placement(keys, 6, 2)[2:])

    def test_a_shared_shift_has_one_key(self):
        with pytest.raises(ValueError, match="pass one key, not one per example"):
            low_discrepancy(jax.random.split(KEY, 3), 3, 2)


class TestProposal:
    EDGES = (5.0, 4.0, 0.5, -3.0, -10.0)
    U = ((jnp.arange(200_000) + 0.5) / 200_000)[:, None]

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_undoes_what_it_does(self, schedule):
        proposal = proposal_from_levels(self.EDGES, [3.0, 5.0, 0.0, 1.0], uniform_share=0.2)
        t, weight = (np.asarray(values, np.float64) for values in proposal(self.U, schedule))
        # Evenly spaced u: sums are integrals to the spacing over the smallest mass, 1e-4.
        for f, integral in ((lambda t: t**2, 1 / 3), (lambda t: np.exp(-20 * t), (1 - np.exp(-20)) / 20)):
            assert np.mean(weight * f(t)) == pytest.approx(integral, rel=1e-3)
        logsnr = np.asarray(schedule(jnp.asarray(t, jnp.float32)))
        share = [np.mean((logsnr <= upper) & (logsnr > lower)) for upper, lower in zip(self.EDGES, self.EDGES[1:])]  # noqa: B905
        np.testing.assert_allclose(share, [0.8 / 3 + 0.05, 0.8 * 5 / 9 + 0.05, 0.05, 0.8 / 9 + 0.05], atol=1e-4)

    def test_a_loss_that_is_constant_in_every_level_keeps_no_variance(self):
        nats = np.array([3.0, 5.0, 0.5, 1.0])
        proposal = proposal_from_levels([5.0, 1.25, -2.5, -6.25, -10.0], nats, uniform_share=1e-6)
        t, weight = (np.asarray(values) for values in proposal(self.U, LINEAR))
        loss = 4 * nats[np.minimum((4 * t).astype(int), 3)]
        inside = np.abs(4 * t - np.round(4 * t)) > 1e-4  # at an edge float32 may fall on either side
        np.testing.assert_allclose((weight * loss)[inside], nats.sum(), rtol=1e-4)

    def test_other_end_points_are_refused(self):
        proposal = proposal_from_levels(self.EDGES, [1.0, 1.0, 1.0, 1.0])
        for schedule in (schedules.linear(6.0, -10.0), schedules.linear(5.0, -9.0)):
            with pytest.raises(ValueError, match="the proposal covers log-SNRs from 5 to -10, the schedule"):
                proposal(self.U, schedule)

    @pytest.mark.parametrize(
        ("edges", "values", "share", "message"),
        [
            ((-10.0, 5.0), [1.0], 0.1, "must decrease"),
            ((5.0,), [], 0.1, "must decrease"),
            ((5.0, 0.0, -10.0), [1.0], 0.1, r"bound 2 levels, got values of shape \(1,\)"),
            ((5.0, 0.0, -10.0), [1.0, -1.0], 0.1, "not negative"),
            ((5.0, 0.0, -10.0), [1.0, np.nan], 0.1, "finite"),
            ((5.0, 0.0, -10.0), [0.0, 0.0], 0.1, "not all 0"),
            ((5.0, 0.0, -10.0), [1.0, 1.0], 0.0, r"uniform_share must be in \(0, 1\], got 0"),
        ],
    )
    def test_nothing_to_learn_from(self, edges, values, share, message):
        with pytest.raises(ValueError, match=message):
            proposal_from_levels(np.array(edges), np.array(values), uniform_share=share)
