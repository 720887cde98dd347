"""The retrieval score, by hand."""

import numpy as np
import pytest

from ulx.metrics.images import nearest
from ulx.metrics.retrieval import chance, kinds_found, score

REFERENCES = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [-1.0, 0.0]], np.float32)
KINDS = ["heart", "heart", "star", "moon"]


def test_the_nearest_by_angle_whatever_the_length():
    found = kinds_found(np.array([[5.0, 0.1], [0.1, 0.2], [-9.0, -1.0]], np.float32), REFERENCES, KINDS)
    assert found == ["heart", "star", "moon"]


def test_an_image_does_not_find_itself():
    assert kinds_found(REFERENCES, REFERENCES, KINDS) == KINDS
    others = kinds_found(REFERENCES, REFERENCES, KINDS, np.arange(4))
    # The hearts find each other. By cosine the star's nearest is the second heart, and the moon's the star.
    assert others == ["heart", "heart", "heart", "star"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_what_is_left_out_is_so_in_any_chunk(chunk):
    rng = np.random.default_rng(0)
    queries, references = rng.standard_normal((7, 3)), rng.standard_normal((9, 3))
    left_out = rng.integers(0, 9, 7)
    squares = ((queries[:, None] - references[None]) ** 2).sum(-1)
    squares[np.arange(7), left_out] = np.inf
    index, distance = nearest(queries, references, chunk, left_out=left_out)
    np.testing.assert_array_equal(index, squares.argmin(1))
    np.testing.assert_allclose(distance, np.sqrt(squares.min(1)))
    with pytest.raises(ValueError, match="at least two references"):
        nearest(queries, references[:1], left_out=np.zeros(7, int))


def test_score_is_a_share_with_its_error():
    metric = score(["a", "b", "b", "c"], ["a", "b", "c", "c"])
    assert metric["value"] == 0.75
    assert metric["standard_error"] == pytest.approx(0.25)  # √(¾·¼·4/3/4)
    assert metric["n"] == 4


def test_chance_is_the_mean_over_all_other_prompts():
    found, wanted = ["a", "b", "b", "d"], ["a", "a", "b", "c"]
    pairs = [[found[i] == wanted[j] for j in range(4) if j != i] for i in range(4)]
    assert chance(found, wanted)["value"] == pytest.approx(np.mean(pairs))
    # As over all permutations that leave no prompt in its place, and not as over those that may.
    assert chance(["a", "b", "c"], ["a", "b", "c"])["value"] == 0
    with pytest.raises(ValueError, match="no other prompt"):
        chance(["a"], ["a"])
