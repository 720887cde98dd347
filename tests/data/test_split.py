import subprocess
import sys

import numpy as np
import pytest

from ulx.data.split import HELD_OUT, Item, held_out, subset, unit_hash

TRAIN = [Item(f"t{i}", 0) for i in range(900)]
VALIDATION = [Item(f"v{i}", 1) for i in range(100)]


def test_the_hash_does_not_depend_on_the_process():
    program = "from ulx.data.split import unit_hash; print(repr(unit_hash('1F600')))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{unit_hash('1F600')!r}\n"}


def test_the_hash_is_uniform():
    values = np.array([unit_hash(f"name {i}") for i in range(10_000)])
    assert ((values >= 0) & (values < 1)).all()
    # Kolmogorov-Smirnov: the largest gap stays below 1.95 / sqrt(n) in all but one of a thousand hashes.
    gap = np.abs(np.sort(values) - (np.arange(10_000) + 0.5) / 10_000).max()
    assert gap < 1.95 / np.sqrt(10_000)
    share = np.mean([held_out(f"name {i}") for i in range(10_000)])
    assert abs(share - HELD_OUT) < 4 * np.sqrt(HELD_OUT * (1 - HELD_OUT) / 10_000)


@pytest.mark.parametrize(("limit", "expected"), [(3, (1, 2)), (10, (8, 2)), (50, (45, 5)), (999, (899, 100))])
def test_a_subset_keeps_the_proportion_and_the_order(limit, expected):
    train, validation = subset(TRAIN, VALIDATION, limit)
    assert (len(train), len(validation)) == expected
    assert train == sorted(train, key=TRAIN.index)
    assert subset(TRAIN, VALIDATION, limit) == (train, validation)


def test_a_subset_is_no_run_of_neighbours():
    train, _ = subset(TRAIN, VALIDATION, 100)
    places = np.array([TRAIN.index(item) for item in train])
    assert places.min() < 100
    assert places.max() >= 800


@pytest.mark.parametrize("limit", [None, 1000, 5000])
def test_a_limit_that_limits_nothing(limit):
    assert subset(TRAIN, VALIDATION, limit) == (TRAIN, VALIDATION)


@pytest.mark.parametrize("limit", [2, 0, -3])
def test_a_limit_too_small(limit):
    with pytest.raises(ValueError, match=f"--data.limit {limit}: at least 3"):
        subset(TRAIN, VALIDATION, limit)
