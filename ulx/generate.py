"""Images and latents out of trained models, in batches of one compiled shape; an example owns its noise."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from ulx import guidance, samplers
from ulx.config import SampleConfig
from ulx.denoiser import Denoiser, StandardNormal
from ulx.diffusion import normal, split_keys
from ulx.frames import given_frames, padded
from ulx.models import UnifiedLatents
from ulx.nn.conditions import Conditions
from ulx.rows import Collected, Stored
from ulx.schedules import Schedule
from ulx.sharding import make_mesh, on_host, place_rows
from ulx.typing import Denoise, Keys

__all__ = ["decode", "encode", "example_keys", "extend", "in_batches", "sample_latents"]


def example_keys(key: Key[Array, ""], start: int, count: int) -> Key[Array, " b"]:
    """The keys of examples start … start + count − 1: example i is the same whatever batch it is drawn in."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(start, start + count))


@eqx.filter_jit
def sample_latents(
    denoiser: Denoiser | StandardNormal,
    schedule: Schedule,
    config: SampleConfig,
    *,
    keys: Key[Array, " b"],
    conditions: Conditions = Conditions(),
    guidance_scale: float | Float[Array, ""] = 1.0,
) -> samplers.Sample:
    """z_0 from the base model or the prior: from N(0, I) at λ_z(1) down to λ_z(0), and no further (Alg. 2).

    Guidance moves away from what is found without label and caption, and leaves given frames given. Raises ValueError
    for guidance without either. Scales given as arrays share one compiled program, with twice the calls even at 1.
    """
    noise_keys, solver_keys = split_keys(keys, 2)
    noise = normal(noise_keys, jnp.zeros((len(keys), *denoiser.shape)))
    denoise: Denoise = denoiser.given(conditions)
    if not isinstance(guidance_scale, float | int) or guidance_scale != 1:
        if not conditions.guides:
            raise ValueError(f"guidance_scale={guidance_scale} guides towards a label or a caption, and none was given")
        both = denoiser.given(conditions.joined(conditions.without()))
        guided = guidance.classifier_free(both, guidance_scale)
        interval = config.guidance_interval
        denoise = guided if interval is None else guidance.within(interval, guided, denoise)
    ends = {"logsnr_min": schedule.logsnr_min, "logsnr_max": schedule.logsnr_max}
    grid = samplers.logsnr_grid(config.num_steps, **ends, inverse_rho=config.inverse_rho)
    return samplers.sample(
        denoise, noise, grid, config.solver, churn=config.churn, tolerance=config.tolerance, key=solver_keys
    )


@eqx.filter_jit
def decode(
    model: UnifiedLatents,
    z_0: Float[Array, "b *latent k"],
    config: SampleConfig,
    *,
    keys: Key[Array, " b"],
    conditions: Conditions = Conditions(),
) -> samplers.Sample:
    """Images in [−1, 1] from z_0 at λ_z(0) by the model's decoder (Alg. 2, second half).

    Of the conditions the decoder is told what it was built for.
    """

    def solve(denoise: Denoise, noise: Float[Array, " b *dims"], schedule: Schedule, solver_keys: Keys):
        ends = {"logsnr_min": schedule.logsnr_min, "logsnr_max": schedule.logsnr_max}
        grid = samplers.logsnr_grid(config.decoder_num_steps, **ends, inverse_rho=config.decoder_inverse_rho)
        return samplers.sample(
            denoise,
            noise,
            grid,
            config.decoder_solver,
            churn=config.decoder_churn,
            tolerance=config.decoder_tolerance,
            key=solver_keys,
        )

    logsnr_0, known = model.decoder_logsnr_0(len(keys)), conditions.known_to(model.decoder.conditions)
    sample = model.decoder.sample(z_0, solve, keys=keys, logsnr_0=logsnr_0, conditions=known)
    return samplers.Sample(z=jnp.clip(sample.z, -1, 1), nfe=sample.nfe)


def extend(
    model: UnifiedLatents,
    base: Denoiser | StandardNormal,
    clips: Float[Array, "b t h w c"],
    frames: int,
    config: SampleConfig,
    *,
    given: int,
    keys: Key[Array, " b"],
    conditions: Conditions = Conditions(),
    guidance_scale: float = 1.0,
) -> Float[Array, "b _t h w c"]:
    """Clips continued to so many frames by rolling the window: the last `given` ones are those that the next clip, of
    the model's own length, is given in the place of the frames of `conditions`.

    Raises ValueError for a window that would add nothing, or clips too short to give so many frames.
    """
    length = model.shape[0]
    if not 0 < given < length or clips.shape[1] < given:
        raise ValueError(f"of {clips.shape[1]} frames, {given} cannot be given to a model of {length} frames a clip")
    window = 0
    while clips.shape[1] < frames:
        window += 1
        latent_keys, decoder_keys = split_keys(jax.vmap(lambda key, i=window: jax.random.fold_in(key, i))(keys), 2)
        first = given_frames(padded(clips[:, -given:], length), given)
        told = dataclasses.replace(conditions, frames=first)
        z_0 = sample_latents(
            base,
            model.latent_schedule,
            config,
            keys=latent_keys,
            conditions=told,
            guidance_scale=guidance_scale,
        ).z
        more = decode(model, z_0, config, keys=decoder_keys, conditions=told).z
        clips = jnp.concatenate([clips, more[:, given:]], axis=1)
    return clips[:, :frames]


@eqx.filter_jit
def encode(
    model: UnifiedLatents, x: Float[Array, "b *space c"], *, keys: Key[Array, " b"]
) -> Float[Array, "b *latent k"]:
    """z_0 of images in [−1, 1]."""
    return model.encode(x, key=keys)


def in_batches(
    function: Callable[..., PyTree],
    *rows: Any,
    batch_size: int,
    key: Key[Array, ""],
    start: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
    into: Collected | Stored | None = None,
) -> Any:
    """`function(*rows, keys=keys)`, given JAX arrays, over all rows, `batch_size` at a time; its results as NumPy
    arrays, concatenated.

    `rows` are trees whose leaves have a length and are indexed by an array of numbers: arrays, or what makes arrays (or
    a tree of them) when it is asked, such as captions that are embedded then. The first leaf says how many there are.
    The last batch is filled up by repeating its last row and the filling dropped, so that a jitted `function` compiles
    once. All devices of all processes share every batch, which is made larger if they do not divide it; each process
    has all rows and gets all results. Row i gets the key of example `start + i`: the batch size and the devices change
    no result beyond rounding. `into` takes the results, by default in memory; rows that it has are not computed again.
    """
    mesh = make_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    total = len(jax.tree.leaves(rows)[0])

    def batch(begin: int) -> tuple[PyTree, Keys]:
        wanted = np.minimum(np.arange(begin, begin + batch_size), total - 1)
        keys = example_keys(key, start + begin, batch_size)
        return place_rows((jax.tree.map(lambda leaf: leaf[wanted], rows), keys), mesh)

    into = Collected() if into is None else into
    structure = None
    for begin in range(into.done, total, batch_size):
        some, keys = batch(begin)
        leaves, structure = jax.tree.flatten(on_host(function(*some, keys=keys)))
        into.append([leaf[: total - begin] for leaf in leaves])
        on_batch(min(batch_size, total - begin))
    if structure is None:  # all were done before, and what they make up is known to the function alone
        some, keys = batch(0)
        structure = jax.tree.structure(jax.eval_shape(lambda some, keys: function(*some, keys=keys), some, keys))
    return jax.tree.unflatten(structure, into.leaves())
