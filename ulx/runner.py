"""A trained model's calls over many images: rates, latents, reconstructions and samples, in batches.

Whatever is drawn follows from the run's seed, the purpose and the image's place, and not from the batches.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key, UInt8

from ulx.bound import DiffusionEstimate, RateEstimate, estimate_decoder, estimate_rate
from ulx.config import Config
from ulx.data.pixels import to_float, to_uint8
from ulx.denoiser import Denoiser, StandardNormal
from ulx.diffusion import split_keys
from ulx.frames import given_frames, padded
from ulx.generate import decode, encode, in_batches, sample_latents
from ulx.likelihood import FlowRate, flow_rate
from ulx.models import UnifiedLatents
from ulx.nn.conditions import Conditions
from ulx.progress import Progress
from ulx.rows import Store
from ulx.seeding import root_key
from ulx.text.examples import Prompts
from ulx.typing import pytree

__all__ = ["FLOW_PROBES", "Runner", "Told", "latent_rate"]

FLOW_PROBES, FLOW_TOLERANCE = 2, 1e-4
"""Of the flow's likelihood: Hutchinson's probes, and the tolerance of a step, about 1e-3 nats per dimension in all."""

Images = UInt8[np.ndarray, "..."]
"""Images `n h w c`, or clips `n t h w c`."""


@pytree
@dataclasses.dataclass(frozen=True)
class Told:
    """What the model is told of each of n images, on the host."""

    label: Int32[np.ndarray, " n"] | None = None
    """Classes."""
    captions: Prompts | None = None
    first: Images | None = None
    """The first frames of clips that are to be continued."""

    def __getitem__(self, rows: slice | Int[np.ndarray, " m"]) -> "Told":
        """Of some of them."""
        return jax.tree.map(lambda each: each[rows], self)

    def conditions(self, shape: tuple[int, ...]) -> Conditions:
        """Of a batch, as arrays, what networks of images or clips of `shape` are given."""
        frames = None
        if self.first is not None:
            frames = given_frames(padded(to_float(jnp.asarray(self.first)), shape[0]), self.first.shape[1])
        return Conditions(self.label, self.captions, frames)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Runner:
    """The model's calls in batches. Each kind compiles once, whatever it is used for afterwards.

    Results that are given a `name` are kept under it in the store until all work is done, and not made again.
    """

    model: UnifiedLatents
    config: Config
    progress: Progress
    store: Store = Store()

    def _run(self, function, *rows, purpose: str, name: str | None, counts: bool = True):
        size, key = self.config.evaluate.batch_size, root_key(self.config.seed, f"evaluation {purpose}")
        into = self.store.rows(name, len(jax.tree.leaves(rows)[0]))
        on_batch = lambda done: None  # noqa: E731
        if counts:
            on_batch = self.progress.advance
            self.progress.skip(into.done)
        return in_batches(function, *rows, batch_size=size, key=key, on_batch=on_batch, into=into)

    def rate(
        self,
        images: Images,
        denoiser: Denoiser | StandardNormal,
        told: Told = Told(),
        *,
        name: str | None = None,
    ) -> RateEstimate:
        """L_z under the prior or the base model, `draws` independent estimates per image."""
        options = self.config.evaluate

        def measure(x, told, *, keys):
            conditions = told.conditions(self.model.shape)
            return latent_rate(self.model, denoiser, to_float(x), conditions, keys, options.levels, options.draws)

        rate = self._run(measure, images, told, purpose="rate", name=name)
        return jax.tree.map(jnp.asarray, rate)

    def decoder_nats(self, images: Images, told: Told = Told(), *, name: str | None = None) -> DiffusionEstimate:
        """L_x with w = 1. One draw of each level: the images' spread is far larger than the estimator's noise."""

        def measure(x, told, *, keys):
            return _decoder(
                self.model, to_float(x), told.conditions(self.model.shape), keys, self.config.evaluate.levels
            )

        nats = self._run(measure, images, told, purpose="decoder", name=name)
        return jax.tree.map(jnp.asarray, nats)

    def flow_nats(self, images: Images) -> tuple[Float[np.ndarray, " n"], int]:
        """The rate under the prior's probability flow, in nats per image, and the solver's steps."""

        def measure(x, *, keys):
            flow = _flow(self.model, to_float(x), keys)
            return flow.rate, jnp.broadcast_to(flow.num_steps, len(x))

        size, key = min(len(images), self.config.evaluate.batch_size), root_key(self.config.seed, "evaluation flow")
        nats, steps = in_batches(measure, images, batch_size=size, key=key, on_batch=self.progress.advance)
        return nats, int(steps.max())

    def encode(self, images: Images, *, name: str | None = None) -> Float[np.ndarray, "n *latent k"]:
        def latents(x, *, keys):
            return encode(self.model, to_float(x), keys=keys)

        return self._run(latents, images, purpose="encode", name=name)

    def decode(
        self, latents: np.ndarray, purpose: str, told: Told = Told(), *, name: str | None = None
    ) -> tuple[Images, int]:
        """Images of latents and the decoder's NFE. Clips whose first frames are given keep these as they are."""

        def images(z_0, told, *, keys):
            sample = decode(
                self.model, z_0, self.config.sample, keys=keys, conditions=told.conditions(self.model.shape)
            )
            pixels = to_uint8(sample.z)
            if told.first is not None:
                pixels = jnp.concatenate([told.first, pixels[:, told.first.shape[1] :]], axis=1)
            return pixels, jnp.broadcast_to(sample.nfe, len(z_0))

        pixels, nfe = self._run(images, latents, told, purpose=f"{purpose}, decoder", name=name)
        return pixels, round(nfe.mean())

    def sample(
        self,
        denoiser: Denoiser | StandardNormal,
        count: int,
        purpose: str,
        told: Told = Told(),
        *,
        guidance: float | Float[Array, ""] = 1.0,
        name: str | None = None,
    ) -> tuple[Images, int]:
        """Images and the latent sampler's mean NFE (the decoder's comes on top).

        Of clips, the continuations of the first frames, if they are given, with these before them.
        """
        of_latents = None if name is None else f"{name} latents"
        z_0, nfe = self.latents(denoiser, count, purpose, told, guidance=guidance, name=of_latents)
        return self.decode(z_0, purpose, told, name=name)[0], nfe

    def latents(
        self,
        denoiser: Denoiser | StandardNormal,
        count: int,
        purpose: str,
        told: Told = Told(),
        *,
        guidance: float | Float[Array, ""] = 1.0,
        name: str | None = None,
    ) -> tuple[Float[np.ndarray, "n *latent k"], int]:
        """What `sample` decodes, and the sampler's mean NFE."""

        def latents(index, told, *, keys):
            sample = sample_latents(
                denoiser,
                self.model.latent_schedule,
                self.config.sample,
                keys=keys,
                conditions=told.conditions(self.model.shape),
                guidance_scale=guidance,
            )
            return sample.z, jnp.broadcast_to(sample.nfe, len(index))

        z_0, nfe = self._run(latents, np.arange(count), told, purpose=purpose, name=name, counts=False)
        return z_0, round(nfe.mean())


@eqx.filter_jit
def latent_rate(
    model: UnifiedLatents,
    denoiser: Denoiser | StandardNormal,
    x: Float[Array, "b *space c"],
    conditions: Conditions,
    keys: Key[Array, " b"],
    levels: int,
    draws: int,
) -> RateEstimate:
    """L_z of images under the prior, which is given no conditions, or a base model."""
    clean_keys, rate_keys = split_keys(keys, 2)
    posterior, schedule = model.posterior(x), model.latent_schedule
    return estimate_rate(
        denoiser.given(conditions),
        posterior.sample(key=clean_keys),
        schedule,
        key=rate_keys,
        levels=levels,
        replicates=draws,
        encoder=posterior.nats(schedule.logsnr_max),
    )


@eqx.filter_jit
def _decoder(
    model: UnifiedLatents,
    x: Float[Array, "b *space c"],
    conditions: Conditions,
    keys: Key[Array, " b"],
    levels: int,
) -> DiffusionEstimate:
    z_key, decoder_key = split_keys(keys, 2)
    denoise = model.decoder.given(model.encode(x, key=z_key), model.decoder_logsnr_0(len(x)), conditions)
    return estimate_decoder(denoise, x, model.decoder.schedule, key=decoder_key, levels=levels)


@eqx.filter_jit
def _flow(model: UnifiedLatents, x: Float[Array, "b *space c"], keys: Key[Array, " b"]) -> FlowRate:
    clean_keys, flow_keys = split_keys(keys, 2)
    posterior, schedule = model.posterior(x), model.latent_schedule
    z_clean = posterior.sample(key=clean_keys)
    found = flow_rate(
        model.prior.given(), z_clean, schedule, key=flow_keys, probes=FLOW_PROBES, tolerance=FLOW_TOLERANCE
    )
    return dataclasses.replace(found, rate=found.rate + posterior.nats(schedule.logsnr_max))
