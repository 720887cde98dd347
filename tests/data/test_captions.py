from collections import Counter

import pytest

from ulx.data.captions import caption
from ulx.data.openmoji import _stems


@pytest.fixture(scope="module")
def stems():
    return _stems()


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("1F600", "grinning face"),
        ("2764", "red heart"),  # without the presentation selector and with it
        ("2764-FE0F", "red heart"),
        ("1F3F3-FE0F-200D-1F308", "rainbow flag"),
        ("0034-20E3", "keycap 4"),
        ("1F469-1F3FD-200D-1F52C", "woman scientist medium skin tone"),
        ("1F1F3-1F1F4", "Norway"),
        ("E2C9", None),  # OpenMoji's own
    ],
)
def test_caption(stem, expected):
    assert caption(stem) == expected


def test_how_many_drawings_have_a_name(stems):
    captions = [caption(stem) for stem in stems]
    named = [each for each in captions if each is not None]
    assert (len(stems), len(named)) == (4495, 3953)
    # No two drawings share a name, and none is left as the package writes it.
    assert len(set(named)) == 3953, Counter(named).most_common(3)
    assert not [each for each in named if each != each.strip() or "_" in each or ":" in each or not each]


def test_other_languages(stems):
    assert caption("2764", "de") == "rotes herz"
    with pytest.raises(ValueError, match=r"there are no captions in 'xx'.*en"):
        caption("2764", "xx")
