"""Cards are set side by side only where their numbers mean the same."""

import copy
import json

import pytest

from ulx import cards


def card(**metrics):
    entry = {"value": 12.5, "definition": "a distance", "n_a": 100, "n_b": 50, "rank_deficient": False}
    network = {"network": {"definition": "a network", "sha256": "c0"}}
    pairs = {"value": 20.0, "standard_error": 0.5, "n_pairs": 50, "definition": "a mean"}
    return {
        "metrics": {"fd_efflite0": entry | network, "psnr": pairs} | metrics,
        "a": {"path": "real", "pixels_sha256": "aa"},
        "b": {"path": "fake", "pixels_sha256": "bb"},
        "resolution": 32,
        "preparation": "cropped",
        "dtype": "float32",
        "commit": "1",
    }


def changed(path, value):
    found = copy.deepcopy(card())
    entry = found
    for name in path[:-1]:
        entry = entry[name]
    entry[path[-1]] = value
    return found


@pytest.fixture
def written(tmp_path):
    def write(*each):
        paths = [tmp_path / f"{index}.json" for index in range(len(each))]
        for path, content in zip(paths, each, strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write


def test_what_was_measured_may_differ(written, capsys):
    other = changed(("b",), {"path": "other", "pixels_sha256": "cc"})
    other["commit"] = "2"
    other["metrics"]["fd_efflite0"]["value"] = 7.25
    cards.main([str(path) for path in written(card(), other)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fake", "other"]
    assert lines[1].split()[0] == "fd_efflite0"
    assert "12.5" in lines[1]
    assert "7.25" in lines[1]


@pytest.mark.parametrize(
    ("path", "value", "reason", "names"),
    [
        (("a", "pixels_sha256"), "zz", "the reference's pixels: aa, zz", "fd_efflite0, psnr"),
        (("resolution",), 64, "the resolution: 32, 64", "fd_efflite0, psnr"),
        (("preparation",), "padded", "the preparation: cropped, padded", "fd_efflite0, psnr"),
        (("dtype",), "bfloat16", "the dtype: float32, bfloat16", "fd_efflite0, psnr"),
        (("metrics", "fd_efflite0", "n_b"), 51, "the number of measured images: 50, 51", "fd_efflite0"),
        (("metrics", "fd_efflite0", "n_a"), 99, "the number of reference images: 100, 99", "fd_efflite0"),
        (("metrics", "fd_efflite0", "definition"), "x", "the definition: a distance, x", "fd_efflite0"),
        (("metrics", "fd_efflite0", "network", "sha256"), "c1", "the network's weights: c0, c1", "fd_efflite0"),
        (("metrics", "psnr", "n_pairs"), 49, "the number of pairs: 50, 49", "psnr"),
    ],
)
def test_refuses_with_the_field_that_differs(path, value, reason, names, written):
    one, other = written(card(), changed(path, value))
    with pytest.raises(ValueError, match="may not be compared") as error:
        cards.table([one, other])
    assert f"{one} and {other} may not be compared by {names}: {reason}" == str(error.value)


def test_a_metric_that_agrees_can_be_asked_for_alone(written):
    paths = written(card(), card(), changed(("metrics", "psnr", "n_pairs"), 49))
    with pytest.raises(ValueError, match=r"0\.json and .*2\.json may not"):
        cards.table(paths)
    assert cards.table(paths, ["fd_efflite0"]).splitlines()[1].split() == ["fd_efflite0", "12.50", "12.50", "12.50"]


def test_equal_pairs_have_an_infinite_psnr(written):
    infinite = card(psnr={"value": None, "standard_error": None, "n_pairs": 50, "definition": "a mean"})
    assert cards.table(written(infinite, infinite), ["psnr"]).splitlines()[1].split() == ["psnr", "inf", "inf"]


def test_what_is_no_card_is_named(written, tmp_path, capsys):
    (path,) = written([1, 2])
    for bad, match in ((tmp_path / "none.json", "is no file"), (path, "has no 'metrics'")):
        with pytest.raises((FileNotFoundError, ValueError), match=match):
            cards.table([bad, path])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        cards.table([path, path])
    one, other = written(card(), card(extra={"value": 1.0}))
    with pytest.raises(ValueError, match="extra is not on all cards; on all of them: fd_efflite0, psnr"):
        cards.table([one, other], ["extra"])
    with pytest.raises(SystemExit):
        cards.main([str(one)])
    assert f"error: {one} is one card" in capsys.readouterr().err
