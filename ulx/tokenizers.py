"""A door for other tokenizers: the small protocol by which any of them is measured, and ulx's own runs behind it.

    class Mine:
        def encode(self, x): ...         # images in [−1, 1], `b h w 3` → latents `b *latent k`
        def decode(self, z, key): ...    # latents → images in [−1, 1]
        def rate(self, x, key): ...      # optional: nats per image, `b`
        logsnr_0 = 10.0                  # optional: λ of the noise on the latents that `decode` takes; by default
                                         # they are free of noise, whatever their scale

Arrays may be of any library that NumPy can read; `key` seeds whatever is drawn. Nothing of ulx is imported.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ulx import run_folder, runs
from ulx.config import SampleConfig
from ulx.generate import decode, example_keys
from ulx.latents import posterior
from ulx.models import UnifiedLatents
from ulx.nn.conditions import Conditions
from ulx.runner import latent_rate

__all__ = ["NOISE_FREE", "RatedRunTokenizer", "RunTokenizer", "Tokenizer", "load", "noise_level"]

NOISE_FREE = 10.0
"""The log-SNR at which latents count as free of noise: 0.7 % of noise on latents of variance 1."""
LEVELS = 16
"""Noise levels per image of a run's rate."""


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a tokenizer; see the head of this module for what it may have besides."""

    def encode(self, x: Any, /) -> Any:
        """Latents of images in [−1, 1], the same whenever it is asked."""
        ...

    def decode(self, z: Any, key: Key[Array, ""], /) -> Any:
        """Images in [−1, 1] from latents as `encode` gives them, under the noise that belongs to `logsnr_0`."""
        ...


def noise_level(tokenizer: Tokenizer) -> float | None:
    """λ of the noise, exp(−λ/2) of standard deviation, on the latents that `decode` takes; None: free of noise."""
    level = getattr(tokenizer, "logsnr_0", None)
    return None if level is None else float(level)


@dataclasses.dataclass(frozen=True)
class RunTokenizer:
    """The autoencoder of a run: Unified Latents, one of its variants, a KL autoencoder, or pixels."""

    model: UnifiedLatents
    sample: SampleConfig
    """The decoder's solver and its steps."""

    @property
    def logsnr_0(self) -> float:
        return float(self.model.latent_schedule.logsnr_max)

    def encode(self, x: Float[np.ndarray, "b h w 3"], /) -> Float[Array, "b *latent k"]:
        """z_clean, or its mean from an encoder of variance."""
        return posterior(self.model, jnp.asarray(x)).mean

    def decode(
        self, z: Float[np.ndarray, "b *latent k"] | Float[Array, "b *latent k"], key: Key[Array, ""], /
    ) -> Float[Array, "b h w 3"]:
        alpha = jax.nn.sigmoid(self.logsnr_0) ** 0.5  # the decoder knows z_0 = α (z + noise)
        keys = example_keys(key, 0, len(z))
        return decode(self.model, alpha * jnp.asarray(z, jnp.float32), self.sample, keys=keys).z


class RatedRunTokenizer(RunTokenizer):
    """The same of a run that measures its latent's rate: any but pixels."""

    def rate(self, x: Float[np.ndarray, "b h w 3"], key: Key[Array, ""], /) -> Float[Array, " b"]:
        """The prior's bound L_z, with the encoder's term, in nats."""
        keys = example_keys(key, 0, len(x))
        return latent_rate(self.model, self.model.prior, jnp.asarray(x), Conditions(), keys, LEVELS, 1).rate


def load(name: str) -> Tokenizer:
    """The tokenizer of a run's folder, or what `package.module:make` returns (the working directory is looked in too).

    Raises FileNotFoundError for a folder without a trained autoencoder, ImportError or ValueError, naming
    it, for one that cannot be made or is no tokenizer.
    """
    path = Path(name)
    if (path / "config.json").exists():
        config = run_folder.read_config(path)
        model, _ = runs.autoencoder(path, config, run_folder.spec_in(run_folder.read_data(path)))
        kind = RunTokenizer if config.model.latent == "pixels" else RatedRunTokenizer
        return kind(model, config.sample)
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(f"{name} is neither the folder of a run nor package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    make: Callable[[], Any] | None = getattr(importlib.import_module(module), attribute, None)
    if make is None:
        raise ImportError(f"{module} has no {attribute}")
    tokenizer = make()
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"what {name} returns has no encode and decode: it is a {type(tokenizer).__name__}")
    return tokenizer
