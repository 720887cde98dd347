"""Files that are whole or not there: written aside under another name, flushed to the disk, and then renamed.

    with write_aside(folder / "config.json") as aside:
        aside.write_text(text)

Where a process is killed on the way, its half of a file stays under the other name, which says whose it was. The next
process that writes in that folder removes it.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["AsideError", "remove_left", "write_aside"]

STALE_SECONDS = 3600.0  # a file aside untouched for so long was left by a process that was killed, wherever it ran
NOWHERE = "somewhere"
NAME_BYTES = 180  # of a file's name in that of its aside: with what is added it stays below the 255 that systems allow
_tidied: set[Path] = set()
"""Folders that this process has removed leftovers from: not before every one of thousands of files."""


class AsideError(OSError):
    """A file was written aside, and could not be made to last or to take its name."""


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A name to write under; at the end that file is renamed to `path`. Where writing fails, `path` stays as it was and
    nothing else is left. Raises `AsideError` if it is the end that fails."""
    if (folder := path.parent.absolute()) not in _tidied:
        _tidied.add(folder)
        remove_left(folder)
    # Nobody else writes under this name: not another thread, nor a process of the same number in another container.
    begin = path.name.encode()[:NAME_BYTES].decode(errors="ignore")
    aside = path.with_name(f"{begin}.{where()}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        try:
            with aside.open("rb+") as file:
                os.fsync(file.fileno())  # before the rename: else a power cut could leave a whole name on half a file
            aside.replace(path)
        except OSError as error:
            raise AsideError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)  # gone already when all went well


def remove_left(directory: Path) -> None:
    """Remove what killed processes left in a directory: what is of processes that ran here and are gone, and whatever
    was not written to for long."""
    here = where()
    for path in directory.glob("*.tmp"):
        with suppress(FileNotFoundError, PermissionError):  # another process has just renamed it; or another user's
            ours = re.fullmatch(r".*\.([^.]+)\.(\d+)-[0-9a-f]+\.tmp", path.name)
            if ours is None:  # somebody else's
                continue
            is_gone = ours[1] == here != NOWHERE and not _runs(int(ours[2]))
            if is_gone or time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def where() -> str:
    """Among whom a process's number means this process: a start of one machine and, in a container, the container; or
    `NOWHERE` if that is not known."""
    try:
        boot, container = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return NOWHERE
    return hashlib.sha256(f"{boot} {container}".encode()).hexdigest()[:12]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
