"""Sampling: a grid of log-SNRs × a solver, on diffrax, over any denoiser.

The probability-flow ODE in u = z/α over s = σ/α is du/ds = (u − x̂)/s. There an Euler step is a DDIM step and Heun
is EDM's second-order sampler. The grid ends at a finite λ: for latents at λ_z(0), because what the base model hands
to the decoder is the noisy z_0, never a denoised latent; for images where the noise is invisible.

| solver | what | order | calls a step | noise |
|---|---|---|---|---|
| "euler" | DDIM (Song et al. 2021) | 1 | 1 | with churn |
| "heun" | EDM (Karras et al. 2022) | 2 | 2 | with churn |
| "dpmpp_2m" | DPM-Solver++(2M) (Lu et al. 2022), multistep | 2 | 1 | |
| "tsit5" | Runge–Kutta (Tsitouras 2011), steps chosen by a tolerance | 5 | 6 | |
| "ancestral" | DDPM's posterior (Ho et al. 2020) | 1, weak | 1 | always |

With `churn` c > 0, "euler" and "heun" solve a reverse SDE: before a step of length h in λ, noise is put back for a
length of c·h (not past the grid's start), and the ODE is solved from there. c = 0 is the ODE, c = 1 in the limit of
short steps the reverse SDE that undoes the forward process. With the exact denoiser every c has the same marginals; the
order above is then that of expectations (weak).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import diffrax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ulx.diffusion import alpha, edm_sigma, expand, per_example_keys
from ulx.guidance import network_calls
from ulx.solvers import Ancestral, Churned, Counted, Multistep, Time, churned
from ulx.typing import Batch, Denoise, Keys, pytree

__all__ = ["Sample", "Solver", "check_inverse_rho", "check_solver", "logsnr_grid", "sample"]

Solver = Literal["euler", "heun", "dpmpp_2m", "tsit5", "ancestral"]
CHURNED = ("euler", "heun")
NODES = {"euler": (0.0,), "heun": (0.0, 1.0), "dpmpp_2m": (0.0,), "ancestral": (0.0,)}
"""Where in a step, from 0 to 1 in s, the denoiser is called."""
TSIT5_NODES = tuple(float(c) for c in diffrax.Tsit5.tableau.c)
"""The same in λ: the last call is at the end of the step, and the next step's first."""
MAX_STEPS = 4096
"""Of tsit5, tried ones included, after which diffrax gives up."""


@pytree
@dataclasses.dataclass(frozen=True)
class Sample:
    z: Batch
    """The sample at the end of the grid, z = α x + σ ε with the λ of the grid's last point."""
    nfe: Int[Array, ""]
    """Network calls per sample: every call of the denoiser, rejected steps included, times the networks behind it."""


def logsnr_grid(
    num_steps: int, *, logsnr_min: float, logsnr_max: float, inverse_rho: float = 0.0
) -> Float[Array, " points"]:
    """num_steps + 1 log-SNRs from the noisiest to the cleanest, evenly spaced in s^(1/ρ), s = σ/α (Karras et al. 2022,
    Eq. 5, whose ρ = 7 is inverse_rho = 1/7).

    0 is ρ = ∞, evenly spaced in λ. Above it steps in λ are shorter where there is much noise, below it where there is
    little.

    Raises ValueError if num_steps < 1, the ends are not increasing or inverse_rho is not within −1 to 1.
    """
    if num_steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got num_steps={num_steps}")
    if not (math.isfinite(logsnr_min) and math.isfinite(logsnr_max) and logsnr_min < logsnr_max):
        raise ValueError(
            f"the grid runs from logsnr_min up to logsnr_max, both finite; got {logsnr_min} and {logsnr_max}"
        )
    check_inverse_rho(inverse_rho)
    if inverse_rho == 0:
        return jnp.linspace(logsnr_min, logsnr_max, num_steps + 1)
    # In float64 and from the cleaner end's s, so that both ends are met and no power overflows.
    part = np.linspace(1, 0, num_steps + 1)
    noisiest = math.expm1(inverse_rho * (logsnr_max - logsnr_min) / 2)
    return jnp.asarray(logsnr_max - 2 / inverse_rho * np.log1p(part * noisiest))


def check_inverse_rho(inverse_rho: float) -> None:
    """Raises ValueError unless a grid can be spaced by it."""
    if not -1 <= inverse_rho <= 1:
        raise ValueError(f"inverse_rho must be from -1 to 1, 0 for even steps in λ; got {inverse_rho}")


def check_solver(solver: Solver, churn: float = 0.0, tolerance: float = 1e-3, dtype: DTypeLike = jnp.float32) -> None:
    """Raises ValueError for an unknown solver, and for a churn or a tolerance that `sample` could not honour.

    `dtype` is what it would compute in, which sets the least tolerance.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}: use one of {', '.join(get_args(Solver))}")
    if not (churn >= 0 and math.isfinite(churn)):
        raise ValueError(f"churn must be a finite number from 0 (the ODE) up, got {churn}")
    if churn > 0 and solver not in CHURNED:
        raise ValueError(f"solver {solver!r} takes no churn, got churn={churn}: use {' or '.join(CHURNED)}, or churn 0")
    least = 16 * float(jnp.finfo(dtype).eps)
    if not (tolerance >= least and math.isfinite(tolerance)):
        raise ValueError(
            f"tolerance={tolerance} is less than {jnp.dtype(dtype).name} can keep: use {least:.0e} or more"
        )


def sample(
    denoise: Denoise,
    noise: Batch,
    grid: Float[Array, " points"],
    solver: Solver = "heun",
    *,
    churn: float = 0.0,
    tolerance: float = 1e-3,
    key: Keys | None = None,
) -> Sample:
    """From z_1 = `noise` along a grid of log-SNRs, by the probability-flow ODE of `denoise` or by a reverse SDE.

    `noise` is standard normal, `b *dims`; the grid is increasing in λ. Returns z at the grid's last λ: **not**
    divided by α and not denoised once more. It is computed in the precision of `noise`, at least float32.

    Args:
        churn: how much noise "euler" and "heun" put back before each step, in steps.
        tolerance: "tsit5" alone heeds it, and of the grid only the two ends. The estimated error of a step is at most
            tolerance · (1 + |z|), root mean square over the dimensions of every example. All examples share the
            steps, so that a sample depends on the batch around it, about as much as the tolerance allows.
        key: for "ancestral" and churn. An example's noise depends on its own key alone, not on the batch around it.

    Raises:
        ValueError: what `check_solver` refuses; a grid of fewer than two points; no key where one is needed.
    """
    dtype = jnp.promote_types(noise.dtype, jnp.float32)
    check_solver(solver, churn, tolerance, dtype)
    if grid.shape[0] < 2:
        raise ValueError(f"a grid has at least two points, got {grid.shape[0]}")
    noise, grid = noise.astype(dtype), grid.astype(dtype)
    if solver == "tsit5":
        return _adaptive(denoise, noise, grid[0], grid[-1], tolerance)

    t, nodes = -edm_sigma(grid), jnp.asarray(NODES[solver], dtype)

    def keys() -> Key[Array, " b"]:
        if key is None:
            raise ValueError(f"solver {solver!r} with churn={churn} draws noise: pass key=, one or one per example")
        return per_example_keys(key, noise.shape[0])

    match solver:
        case "euler" | "heun":
            method = diffrax.Euler() if solver == "euler" else diffrax.Heun()
            if churn > 0:
                method = Churned(method, keys(), churn, t[0])
        case "dpmpp_2m":
            method = Multistep()
        case "ancestral":
            method = Ancestral(keys())

    def velocity(t: Time, u: Batch, args: None) -> Batch:
        # Inside one step s = −t is a float between two grid points, and λ follows from it.
        logsnr = jnp.full(u.shape[0], -2 * jnp.log(-t))
        x_hat = denoise(expand(alpha(logsnr), u) * u, logsnr)
        return (u - x_hat) / t

    def calls(t0: Time, t1: Time) -> Int[Array, ""]:
        begin = churned(t0, t1, churn, t[0]) if churn > 0 else t0
        return _total([network_calls(denoise, -2 * jnp.log(-(begin + node * (t1 - begin)))) for node in nodes])

    u, nfe = _solve(velocity, method, diffrax.StepTo(t), calls, noise / alpha(grid[0]), t[0], t[-1], None, len(t))
    return Sample(z=u * alpha(grid[-1]), nfe=nfe)


def _adaptive(denoise: Denoise, noise: Batch, begin: Time, end: Time, tolerance: float) -> Sample:
    """dz/dλ = ½ α (x̂ − α z), the same flow: over λ Tsit5 takes fewer steps than over s."""

    def velocity(logsnr: Time, z: Batch, args: None) -> Batch:
        per_example = jnp.full(z.shape[0], logsnr)
        return 0.5 * alpha(logsnr) * (denoise(z, per_example) - alpha(logsnr) * z)

    def calls(t0: Time, t1: Time) -> Int[Array, ""]:
        made = [network_calls(denoise, t0 + node * (t1 - t0)) for node in TSIT5_NODES]
        # Only the first step, until it is accepted, has none before it to take its first call from.
        first = t0 - begin < 1e-5 * (end - begin)
        return _total([*made, jnp.where(first, network_calls(denoise, t0), 0)])

    def largest_error(scaled: Batch) -> Float[Array, ""]:
        return jnp.sqrt(jnp.max(jnp.mean(scaled**2, axis=tuple(range(1, scaled.ndim)))))

    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=largest_error)
    first = (end - begin) / 10
    z, nfe = _solve(velocity, diffrax.Tsit5(), controller, calls, noise, begin, end, first, MAX_STEPS)
    return Sample(z=z, nfe=nfe)


def _solve(
    velocity: Callable[..., Batch],
    method: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    calls: Callable[[Time, Time], Int[Array, ""]],
    y0: Batch,
    t0: Time,
    t1: Time,
    dt0: Time | None,
    max_steps: int,
) -> tuple[Batch, Int[Array, ""]]:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        method,
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=y0,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        stepsize_controller=Counted(controller, calls),
        adjoint=diffrax.ForwardMode(),
        max_steps=max_steps,
    )
    assert solution.ys is not None
    assert solution.controller_state is not None
    return solution.ys[0], solution.controller_state[1]


def _total(calls: list[Int[Array, ""]]) -> Int[Array, ""]:
    return sum(calls, jnp.zeros((), jnp.int32))
