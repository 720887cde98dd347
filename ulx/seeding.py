"""One seed, many independent roots: every use of randomness names its purpose.

`jax.random.split(key, n)[i]` is `fold_in(key, i)`, so keys of neighbouring small seeds, or of one seed used twice,
meet somewhere in the tree below them. A purpose's root is folded with 32 bits of a hash, which no index reaches.
"""

import hashlib

import jax
import numpy as np
from jaxtyping import Array, Key

__all__ = ["root_int", "root_key"]


def root_int(seed: int, purpose: str) -> int:
    """32 bits for a generator that wants a number (the data's shuffling, NumPy): a hash of the seed and the purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "little")


def root_key(seed: int, purpose: str) -> Key[Array, ""]:
    """The key that everything random about `purpose` descends from. Purposes of one seed are independent."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(root_int(seed, purpose)))
