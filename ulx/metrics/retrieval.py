"""Do samples show what their prompts say? By the kind of the real image that is nearest to each.

A kind is what counts as the same thing (`ulx.data.captions.kinds`): an emoji's family, or simply the caption. The score
is the share of samples whose nearest real image, by the cosine of a network's features, is of the prompt's kind. It
needs real images of that kind, and says nothing of how good a sample looks.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from ulx.metrics.entries import Metric, mean
from ulx.metrics.images import nearest

__all__ = ["DEFINITION", "METRIC", "chance", "kinds_found", "score"]

METRIC = "retrieval"
DEFINITION = (
    "share of images whose nearest real image, by the cosine of their features, is of the kind that the prompt names"
)


def kinds_found(
    features: Float[np.ndarray, "n d"],
    references: Float[np.ndarray, "m d"],
    kinds: Sequence[str],
    left_out: Int[np.ndarray, " n"] | None = None,
) -> list[str]:
    """The kind of the reference that is nearest to each image, of references of these `kinds`.

    `left_out` are references that do not count, one for each image: itself, say.
    """
    index, _ = nearest(_unit(features), _unit(references), left_out=left_out)
    return [kinds[int(i)] for i in index]


def score(found: Sequence[str], wanted: Sequence[str]) -> Metric:
    """The share of images of which the kind found is the one wanted, with its standard error."""
    return mean([one == other for one, other in zip(found, wanted, strict=True)])


def chance(found: Sequence[str], wanted: Sequence[str]) -> Metric:
    """The score that is expected when the prompts are shuffled: every image with every other's.

    Raises ValueError for fewer than two images.
    """
    if len(found) < 2:
        raise ValueError("there is no other prompt to shuffle with")
    count = Counter(wanted)
    others = [count[one] - (one == own) for one, own in zip(found, wanted, strict=True)]
    return mean(np.array(others) / (len(wanted) - 1))


def _unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
