"""log p(z_0) of the latent under a denoiser's probability-flow ODE, and the rate it implies, beside the bound.

In u = z/α over s = σ/α the flow is du/ds = (u − x̂)/s. Along it log p(u) changes by minus the divergence, so that with
τ = ln s, and p(z_1) = N(0, I),

    log p(z_0) = log N(z_1; 0, I) + D ln(σ_1/σ_0) − ∫ tr(∂x̂/∂u) dτ,

where log p(z_0) = log p(u_0) − D ln α_0 and the identity in the divergence, D − tr(∂x̂/∂u), are taken in closed form.

The flow is another model than the ancestral one whose rate L_z bounds. Only with an exact denoiser is L_z less the
flow's rate a gap of the bound, and then its mean is 0: both are I(x; z_0) + KL[q(z_1) ‖ N(0, I)], for the flow carries
that divergence along unchanged. With a trained network it is the difference of two models and can have either sign.
"""

import dataclasses
import math
from typing import Literal

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ulx import diffusion
from ulx.diffusion import alpha, expand, sigma
from ulx.schedules import Schedule
from ulx.typing import Batch, Denoise, Keys, PerExample, pytree

__all__ = ["FlowLikelihood", "FlowRate", "flow_rate", "log_likelihood"]

Probes = Literal["rademacher", "gaussian"]


@pytree
@dataclasses.dataclass(frozen=True)
class FlowLikelihood:
    log_density: PerExample
    """log p(z_0) in nats, a density over z_0 itself (not over u)."""
    standard_error: PerExample
    """Of the trace's estimate, over the probes. 0 with the exact trace, nan with a single probe."""
    z_1: Batch
    """Where the flow carries z_0."""
    num_steps: Array
    """Solver steps of the batch, rejected ones included; each calls the denoiser six times."""


@pytree
@dataclasses.dataclass(frozen=True)
class FlowRate:
    rate: PerExample
    """−h(q(z_0|x)) − log p(z_0) in nats, at one z_0 per example: its mean is KL[q(z_0|x) ‖ p(z_0)] of the flow's p."""
    standard_error: PerExample
    """Of the trace's estimate, over the probes. The examples' own noise shows in their spread instead."""
    num_steps: Array


def log_likelihood(
    denoise: Denoise,
    z_0: Batch,
    schedule: Schedule,
    *,
    probes: int | None = None,
    distribution: Probes = "rademacher",
    key: Keys | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 2000,
) -> FlowLikelihood:
    """log p(z_0) by the probability-flow ODE from λ_z(0) to λ_z(1), on diffrax: Tsit5 with error control.

    The whole batch shares its steps, so that an example depends on the others within the tolerance. All is computed in
    the precision of z_0. The denoiser must be differentiable in forward mode and treat its examples apart.

    Args:
        probes: Hutchinson's estimate of the trace from so many random vectors per example, the same ones all along the
            flow, which is unbiased; None takes the exact trace, D derivatives of the denoiser at once: for small D.
        distribution: of the probes. Rademacher's has the smaller variance, none at all for a diagonal Jacobian.
        key: for the probes; one per batch or per example.
        tolerance: of each step, relative and absolute, on u and on the trace's integral per dimension (nats).

    Raises:
        ValueError: probes below 1, no key for them, or an unknown distribution.
        RuntimeError: the tolerance asks for more than max_steps.
    """
    size, shape = z_0.shape[0], z_0.shape[1:]
    dims = math.prod(shape)
    vectors = _basis(z_0) if probes is None else _probes(z_0, probes, distribution, key)
    least, most = (jnp.asarray(logsnr, z_0.dtype) for logsnr in (schedule.logsnr_max, schedule.logsnr_min))

    def velocity(tau, state, args):
        logsnr = jnp.full(size, -2 * tau)
        x_hat, derivative = jax.linearize(lambda u: denoise(expand(alpha(logsnr), u) * u, logsnr), state[0])
        traces = jnp.sum(vectors * jax.vmap(derivative)(vectors), axis=tuple(range(2, vectors.ndim))).T  # (b, vectors)
        traces = traces.sum(axis=1, keepdims=True) if probes is None else traces
        return state[0] - x_hat, traces / dims

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        t0=-least / 2,
        t1=-most / 2,
        dt0=0.01,
        y0=(z_0 / alpha(least), jnp.zeros((size, probes or 1), z_0.dtype)),
        saveat=diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=_worst),
        adjoint=diffrax.ForwardMode(),
        max_steps=max_steps,
    )
    assert solution.ys is not None
    u_1, integral = (part[0] for part in solution.ys)
    z_1 = alpha(most) * u_1
    log_normal = -0.5 * jnp.sum(jnp.square(z_1) + math.log(2 * math.pi), axis=tuple(range(1, z_1.ndim)))
    log_density = log_normal + dims * (jnp.log(sigma(most) / sigma(least)) - integral.mean(axis=1))
    error = jnp.zeros(size, z_0.dtype)
    if probes is not None:
        spread = jnp.std(integral, axis=1, ddof=1) if probes > 1 else jnp.full(size, jnp.nan, z_0.dtype)
        error = dims * spread / math.sqrt(probes)
    return FlowLikelihood(log_density, error, z_1, solution.stats["num_steps"])


def flow_rate(
    denoise: Denoise,
    z_clean: Batch,
    schedule: Schedule,
    *,
    key: Keys,
    probes: int | None = None,
    distribution: Probes = "rademacher",
    tolerance: float = 1e-5,
) -> FlowRate:
    """KL[q(z_0|x) ‖ p(z_0)] with p that of the probability flow, from one z_0 per example. Nats.

    To report beside the bound L_z. The difference is a gap of the bound only if the denoiser is exact: see above.
    Arguments and errors as in `log_likelihood`.
    """
    noise_key, probe_key = diffusion.split_keys(key, 2)
    logsnr = jnp.full(z_clean.shape[0], schedule.logsnr_max, z_clean.dtype)
    found = log_likelihood(
        denoise,
        diffusion.noise(z_clean, logsnr, diffusion.normal(noise_key, z_clean)),
        schedule,
        probes=probes,
        distribution=distribution,
        key=probe_key,
        tolerance=tolerance,
    )
    dims = math.prod(z_clean.shape[1:])
    # The entropy of q, which is N(α z_clean, σ² I) for every x, needs no sample.
    entropy = dims * (0.5 * math.log(2 * math.pi * math.e) + jnp.log(sigma(logsnr)))
    return FlowRate(-entropy - found.log_density, found.standard_error, found.num_steps)


def _basis(z: Batch) -> Float[Array, "vectors b *dims"]:
    """The unit vectors of one example, for every example."""
    shape = z.shape[1:]
    dims = math.prod(shape)
    unit = jnp.eye(dims, dtype=z.dtype).reshape(dims, 1, *shape)
    return jnp.broadcast_to(unit, (dims, *z.shape))


def _probes(z: Batch, count: int, distribution: Probes, key: Keys | None) -> Float[Array, "vectors b *dims"]:
    if count < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace; got {count}")
    if key is None:
        raise ValueError("probes are random: pass a key, or probes=None for the exact trace")
    match distribution:
        case "rademacher":
            draw = jax.random.rademacher
        case "gaussian":
            draw = jax.random.normal
        case _:
            raise ValueError(f"unknown distribution {distribution!r}: use 'rademacher' or 'gaussian'")
    keys = diffusion.per_example_keys(key, z.shape[0])
    return jax.vmap(lambda k: draw(k, (count, *z.shape[1:]), z.dtype), out_axes=1)(keys)


def _worst(state: PyTree) -> Array:
    """The largest root mean square of any example's u and trace: neither a hard example among easy ones nor the few
    traces among the many entries of u may drown in a common mean."""
    per_example = [jnp.mean(jnp.square(part), axis=tuple(range(1, part.ndim))) for part in jax.tree.leaves(state)]
    return jnp.sqrt(jnp.max(jnp.stack(per_example)))
