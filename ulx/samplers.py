"""Sampling: a time grid × a solver, on diffrax, over any denoiser.

The probability-flow ODE in u = z/α over s = σ/α is du/ds = (u − x̂)/s. There an Euler step is a DDIM step and Heun
is EDM's second-order sampler. The grid ends at a finite λ: for latents at λ_z(0), because what the base model hands
to the decoder is the noisy z_0, never a denoised latent; for images where the noise is invisible.
"""

import dataclasses
import math
from typing import Literal

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ulx.diffusion import alpha, edm_sigma, expand
from ulx.typing import Batch, Denoise, pytree

__all__ = ["Sample", "Solver", "logsnr_grid", "network_calls", "sample"]

Solver = Literal["euler", "heun"]
STAGES = {"euler": 1, "heun": 2}


@pytree
@dataclasses.dataclass(frozen=True)
class Sample:
    z: Batch
    """The sample at the end of the grid, z = α x + σ ε with the λ of the grid's last point."""
    nfe: Array
    """Calls of the denoiser: solver steps × stages, as diffrax counted them. A guided denoiser counts once here."""


def logsnr_grid(num_steps: int, *, logsnr_min: float, logsnr_max: float) -> Float[Array, " points"]:
    """num_steps + 1 log-SNRs from the noisiest to the cleanest, evenly spaced (geometric in s = σ/α).

    Raises ValueError if num_steps < 1 or the ends are not increasing.
    """
    if num_steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got num_steps={num_steps}")
    if not (math.isfinite(logsnr_min) and math.isfinite(logsnr_max) and logsnr_min < logsnr_max):
        raise ValueError(
            f"the grid runs from logsnr_min up to logsnr_max, both finite; got {logsnr_min} and {logsnr_max}"
        )
    return jnp.linspace(logsnr_min, logsnr_max, num_steps + 1)


def network_calls(num_steps: int, solver: Solver, guided: bool = False) -> int:
    """NFE of `sample` with that grid and solver; guidance doubles it."""
    return num_steps * STAGES[solver] * (2 if guided else 1)


def sample(denoise: Denoise, noise: Batch, grid: Float[Array, " points"], solver: Solver = "heun") -> Sample:
    """Integrate the probability-flow ODE of `denoise` from z_1 = `noise` along a grid of log-SNRs.

    `noise` is standard normal, `b *dims`; the grid is increasing in λ. Returns z at the grid's last λ: **not**
    divided by α and not denoised once more.

    Raises:
        ValueError: unknown solver, or a grid of fewer than two points.
    """
    match solver:
        case "euler":
            method = diffrax.Euler()
        case "heun":
            method = diffrax.Heun()
        case _:
            raise ValueError(f"unknown solver {solver!r}: use one of {', '.join(STAGES)}")
    if grid.shape[0] < 2:
        raise ValueError(f"a grid has at least two points, got {grid.shape[0]}")
    s = edm_sigma(grid.astype(jnp.float32))
    batch = noise.shape[0]

    def velocity(s, u, args):
        # Inside one step s is a float between two grid points, and λ follows from it.
        logsnr = jnp.full(batch, -2 * jnp.log(s))
        x_hat = denoise(expand(alpha(logsnr), u) * u, logsnr)
        return (u - x_hat) / s

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        method,
        t0=s[0],
        t1=s[-1],
        dt0=None,
        y0=noise / alpha(grid[0]),
        saveat=diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.StepTo(s),
        adjoint=diffrax.ForwardMode(),
        max_steps=grid.shape[0],
    )
    assert solution.ys is not None
    return Sample(z=solution.ys[0] * alpha(grid[-1]), nfe=solution.stats["num_steps"] * STAGES[solver])
