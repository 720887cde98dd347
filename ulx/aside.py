"""Files that are whole or not there: written aside under another name, flushed to the disk, and then renamed.

    with write_aside(folder / "config.json") as aside:
        aside.write_text(text)

Where a process is killed on the way, its half of a file stays under the other name, which says whose it was. The next
that writes the same file removes it.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

__all__ = ["remove_left", "write_aside"]

STALE_SECONDS = 3600.0  # a file aside untouched for so long was left by a process that was killed, wherever it ran
NOWHERE = "somewhere"


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A name to write under; at the end that file is renamed to `path`. Where writing fails, `path` stays as it was and
    nothing else is left. Raises `OSError` where the disk does."""
    remove_left(path.parent, path.name)
    # Nobody else writes under this name: not another thread, nor a process of the same number in another container.
    aside = path.with_name(f"{path.name}.{where()}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        try:
            with aside.open("rb+") as file:
                os.fsync(file.fileno())  # before the rename: else a power cut could leave a whole name on half a file
            aside.replace(path)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)  # gone already when all went well


def remove_left(directory: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a directory of the file of that name, or of any: what is of processes that
    ran here and are gone, and whatever was not written to for long."""
    here = where()
    for path in directory.glob("*.tmp" if name is None else f"{escape(name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process has just renamed it
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
