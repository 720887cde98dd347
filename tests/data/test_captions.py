import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from ulx.data import DataConfig, open_dataset
from ulx.data.captions import attached, caption, kinds, of_openmoji
from ulx.data.openmoji import _stems, family, render


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


def test_drawings_with_their_names(tmp_path):
    config = DataConfig(resolution=16, limit=60, captions="de", cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"^(\d+) of 60 images have no name in 'de'\. They are left out$") as caught:
        dataset = open_dataset(config)
    (unnamed,) = (int(str(warning.message).split()[0]) for warning in caught)
    assert 0 < unnamed == 60 - len(dataset.train) - len(dataset.validation) < 20
    for split in (dataset.train, dataset.validation):
        assert len(split.captions or ()) == len(split) > 0
        for name, words, example in zip(split.names, split.captions or (), split, strict=True):
            assert words == caption(name, "de")
            np.testing.assert_array_equal(example["image"], render(name, 16))
    fingerprints = {dataset.fingerprint}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for changes in ({"captions": "en"}, {"labels": False}, {"captions": None}):
            fingerprints.add(open_dataset(replace(config, **changes)).fingerprint)
    assert len(fingerprints) == 4


def test_all_drawings_with_a_name_are_kept(openmoji):
    with pytest.warns(UserWarning, match=r"^542 of 4495 images have no name in 'en'\. They are left out$"):
        dataset = attached(openmoji, partial(of_openmoji, language="en"), "refuse")
    assert len(dataset.train) + len(dataset.validation) == 3953
    for split, whole in ((dataset.train, openmoji.train), (dataset.validation, openmoji.validation)):
        named = [i for i, name in enumerate(whole.names) if caption(name) is not None]
        assert split.names == tuple(whole.names[i] for i in named)
        np.testing.assert_array_equal(split.labels, whole.labels[named])
        np.testing.assert_array_equal(split[-1]["image"], whole[named[-1]]["image"])
    assert dataset.attribution == openmoji.attribution


def test_a_kind_of_drawing_is_its_family(openmoji):
    validation = openmoji.validation
    assert kinds("openmoji", validation) == tuple(family(name) for name in validation.names)
    assert len(set(kinds("openmoji", validation))) < len(validation)


def test_another_language_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="there are no captions in 'xx'"):
        open_dataset(DataConfig(captions="xx", cache_dir=str(tmp_path / "mine")))
    assert not (tmp_path / "mine").exists()
