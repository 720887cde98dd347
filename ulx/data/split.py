"""Who is held out, decided by hashes of names: the same on every machine, in every process, for ever.

A name's fate does not depend on the other names, so adding files never moves an old one across the split.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = ["HELD_OUT", "LEAST", "Item", "check_limit", "clip_counts", "digest_of", "held_out", "subset", "unit_hash"]

HELD_OUT = 0.1  # share of the names that goes to validation
LEAST = 2
"""Held-out examples at least: of fewer there is no distance and no standard error."""


CLIPS = (65_536, 2_048)
"""Clips of an epoch, and held-out ones, of a source without end: of as many FVD is usually taken."""


class Item(NamedTuple):
    """An example to be: its name (unique in its data set) and its class."""

    name: str
    label: int


def unit_hash(text: str) -> float:
    """`text` as a uniform number in [0, 1), by sha256 (Python's own `hash` changes with every process)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def digest_of(rows: Iterable[Any]) -> str:
    """Hash of rows of names and numbers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def held_out(name: str) -> bool:
    """Whether the examples under `name` (a family, a path) belong to validation."""
    return unit_hash(name) < HELD_OUT


def check_limit(limit: int | None) -> None:
    """Raises `ValueError` for a limit that leaves a split without enough examples."""
    if limit is not None and limit <= LEAST:
        raise ValueError(f"--data.limit {limit}: at least {LEAST + 1} are needed, one to train on, {LEAST} to validate")


def subset(train: Sequence[Item], validation: Sequence[Item], limit: int | None) -> tuple[list[Item], list[Item]]:
    """`limit` examples in all, chosen by hash, in the splits' own proportion, of which `LEAST` at least are held out.

    Order is kept, and a larger limit contains a smaller one as far as the proportion allows.
    Raises `ValueError` as `check_limit` does.
    """
    total = len(train) + len(validation)
    check_limit(limit)
    if limit is None or limit >= total:
        return list(train), list(validation)
    held = min(max(LEAST, round(limit * len(validation) / total)), limit - 1)
    return _lowest(train, limit - held), _lowest(validation, held)


def clip_counts(limit: int | None) -> tuple[int, int]:
    """Training and held-out clips of a source without end; `limit` in all."""
    if limit is None:
        return CLIPS
    train, validation = CLIPS
    held = max(LEAST, round(limit * validation / (train + validation)))
    return min(train, max(1, limit - held)), min(validation, held)


def _lowest(items: Sequence[Item], count: int) -> list[Item]:
    chosen = set(sorted(items, key=lambda item: unit_hash(item.name))[:count])
    return [item for item in items if item in chosen]
