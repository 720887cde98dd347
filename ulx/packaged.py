"""Files that come inside installed packages: located without running the package, and checked before use."""

import hashlib
import importlib.util
from pathlib import Path

__all__ = ["packaged", "verified"]


def packaged(module: str, path: str, extra: str | None = None, *, install: str | None = None) -> Path:
    """The path of a data file inside an installed package; the package's own code is not run.

    `module` is the package's import name, `path` is relative to its folder, `extra` is the extra of ulx that
    installs it; for a package in no extra, `install` is what to give to `pip install`. Raises ModuleNotFoundError when
    the package is missing, FileNotFoundError when its file is.
    """
    install = install or f'"ulx[{extra}]"'
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {module!r} is not installed: pip install {install}")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; reinstall: pip install --force-reinstall {install}")
    return file


def verified(path: Path, sha256: str) -> bytes:
    """The file's bytes if their sha256 (hexadecimal) is the expected one; a ValueError naming both if not.

    It returns the very bytes that were hashed, so that nothing can change between the check and the reading.
    """
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.lower():
        raise ValueError(
            f"{path} is not the file this code was written for: sha256 {found}, expected {sha256}. "
            "It may be damaged or another version; reinstall its package at the pinned version."
        )
    return data
