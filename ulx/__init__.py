"""Unified Latents (arXiv 2602.17270) in JAX: a latent whose bitrate is bounded, measured and controlled.

Submodules load when they are first used, so that `from ulx import losses` pulls in jax and jaxtyping alone.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = (
    "bound",
    "config",
    "cost",
    "data",
    "diffusion",
    "ema",
    "flops",
    "generate",
    "guidance",
    "likelihood",
    "losses",
    "metrics",
    "models",
    "nn",
    "presets",
    "runs",
    "samplers",
    "schedules",
    "solvers",
    "time_sampling",
    "training",
    "weightings",
)
_NAMES = {"load": "ulx.runs"}

__all__ = ["__version__", "load"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"ulx.{name}")
    raise AttributeError(f"module 'ulx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *_SUBMODULES, *_NAMES])
