"""Optional packages, imported where they are used."""

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(module: str, extra: str = "data") -> Any:
    """The module, or an `ImportError` that says which extra of ulx brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the package is there, something inside it is not: its own message is better
        raise ModuleNotFoundError(f'{module} is not installed: pip install "ulx[{extra}]"', name=error.name) from error
