import itertools

import jax
import numpy as np

from ulx.seeding import root_int, root_key

PURPOSES = ("stage1 weights", "stage1 steps", "stage2 weights", "stage2 steps", "evaluation rate", "sample")


def tree(key, depth=2, width=8):
    """A key and what split and fold_in with small numbers make of it, as bytes."""
    yield jax.random.key_data(key).tobytes()
    if depth:
        for i in range(width):
            yield from tree(jax.random.fold_in(key, i), depth - 1, width)


def test_roots_of_seeds_and_purposes_never_meet():
    """Nor do keys two levels below them: those of plain small seeds do, as the last lines show."""
    keys = [set(tree(root_key(seed, purpose))) for seed in (0, 1) for purpose in PURPOSES]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(keys, 2))
    plain = jax.random.key(0)
    assert jax.random.split(plain, 3)[1] == jax.random.fold_in(plain, 1)  # why a purpose is more than a small number


def test_roots_are_fixed_and_their_numbers_differ():
    numbers = [root_int(seed, purpose) for seed in range(4) for purpose in PURPOSES]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 2**32 for number in numbers)
    # A change here changes every run: written down so that it is not made by accident.
    assert root_int(0, "stage1 weights") == 2258353564
    assert np.array_equal(jax.random.key_data(root_key(0, "sample")), jax.random.key_data(root_key(0, "sample")))
