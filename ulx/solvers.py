"""Solvers that diffrax does not have, as diffrax solvers, and the count of network calls.

They solve du/dt = (u − x̂)/t in u = z/α over the time t = −s, s = σ/α: falling noise is rising time, as diffrax counts
it. x̂ comes back out of the field f as u − t f.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ulx.diffusion import normal
from ulx.typing import Batch

__all__ = ["Ancestral", "Churned", "Counted", "Multistep", "churned"]

Time = Float[Array, ""]


class _FixedStep(diffrax.AbstractSolver):
    """What diffrax wants to know of a solver that estimates no error."""

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = diffrax.LocalLinearInterpolation

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class Multistep(_FixedStep):
    """DPM-Solver++(2M), Lu et al. 2022, Alg. 2: second order with one call a step, the first step of first order.

    u' = r u + (1 − r) D with r = s'/s = e^{−h}, the exact step for a constant x̂ = D, and for D the line through the
    last two x̂ at the middle of the step: D = x̂ + h/(2 h_last) (x̂ − x̂_last). h is a step in log s.
    """

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        # An infinitely long step before the first has no say in it.
        return jnp.zeros_like(y0), jnp.full_like(t0, jnp.inf)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        last_x_hat, last_h = solver_state
        x_hat = y0 - t0 * terms.vf(t0, y0, args)
        h = jnp.log(t0 / t1)
        middle = x_hat + h / (2 * last_h) * (x_hat - last_x_hat)
        y1 = middle + t1 / t0 * (y0 - middle)
        return y1, None, {"y0": y0, "y1": y1}, (x_hat, h), diffrax.RESULTS.successful


class Ancestral(_FixedStep):
    """The DDPM posterior q(z_{λ'} | z_λ, x) with x̂ for x (Ho et al. 2020, Eq. 6–7): weak order 1.

    In u: mean x̂ + (s'/s)² (u − x̂), variance s'² (1 − (s'/s)²).
    """

    keys: Key[Array, " b"]

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return jnp.zeros((), jnp.int32)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        x_hat = y0 - t0 * terms.vf(t0, y0, args)
        ratio = (t1 / t0) ** 2
        y1 = x_hat + ratio * (y0 - x_hat) + jnp.sqrt(t1**2 * (1 - ratio)) * _noise(self.keys, solver_state, y0)
        return y1, None, {"y0": y0, "y1": y1}, solver_state + 1, diffrax.RESULTS.successful


class Churned(_FixedStep):
    """The reverse SDE by noising and solving (Karras et al. 2022, Alg. 2): before a step noise is put back.

    From s the sample goes up to `churned` by fresh noise, and from there `solver` (Euler or Heun) down along the ODE.
    """

    solver: diffrax.Euler | diffrax.Heun
    keys: Key[Array, " b"]
    churn: float
    start: Time

    def order(self, terms):
        return self.solver.order(terms)

    def init(self, terms, t0, t1, y0, args):
        return jnp.zeros((), jnp.int32)

    def step(self, terms, t0: Any, t1: Any, y0, args, solver_state, made_jump):
        t_hat = churned(t0, t1, self.churn, self.start)
        # At the grid's start t0 and `start` are one number, but may be rounded differently.
        variance = jnp.maximum(t_hat**2 - t0**2, 0)
        y_hat = y0 + jnp.sqrt(variance) * _noise(self.keys, solver_state, y0)
        y1, _, _, _, result = self.solver.step(terms, t_hat, t1, y_hat, args, None, made_jump)
        return y1, None, {"y0": y0, "y1": y1}, solver_state + 1, result


def churned(t0: Time, t1: Time, churn: float, start: Time) -> Time:
    """Where a step from `t0` to `t1` begins: as much as `churn` times its length in λ back, but not before `start`.

    In proportion to the step's length, so that ever shorter steps have a limit: the reverse SDE whose noise has
    `churn` times the variance of Anderson's, du = −(1 + churn)(u − x̂) dτ + sqrt(2 churn) s dW with τ = −log s.
    """
    return jnp.maximum(t0 * (t0 / t1) ** churn, start)


def _noise(keys: Key[Array, " b"], step: Int[Array, ""], like: Batch) -> Batch:
    """The noise of one step: each example's from its own key and the step's number alone."""
    return normal(jax.vmap(jax.random.fold_in, (0, None))(keys, step), like)


class Counted(diffrax.AbstractStepSizeController):
    """A step size controller that adds up the network calls of every step tried, rejected ones included.

    `calls(t0, t1)` says how many a step makes. The sum is the second part of the controller's final state.
    """

    controller: diffrax.AbstractStepSizeController
    calls: Callable[[Time, Time], Int[Array, ""]]

    def wrap(self, direction):
        return Counted(self.controller.wrap(direction), self.calls)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order) -> tuple[Any, Any]:
        first, state = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return first, (state, jnp.zeros((), jnp.int32))

    def adapt_step_size(
        self, t0: Any, t1: Any, y0, y1_candidate, args, y_error, error_order, controller_state
    ) -> tuple[Any, ...]:
        state, count = controller_state
        *decided, state, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state
        )
        return *decided, (state, count + self.calls(t0, t1)), result
