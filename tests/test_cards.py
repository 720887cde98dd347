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


def test_of_too_few_examples_it_is_said(written):
    few = copy.deepcopy(card())
    few["metrics"]["fd_efflite0"]["rank_deficient"] = True
    said = "fd_efflite0: rank-deficient, so biased: compare at equal N only"
    assert cards.table(written(few, few)).splitlines()[-1] == said
    assert "rank-deficient" not in cards.table(written(card(), card()))


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


def test_videos_are_to_be_decoded_alike(written):
    decoded = lambda by: card() | {"b": {"path": "b", "decoder": by}}  # noqa: E731
    one, same, other, pillow, newer, old = written(
        *map(decoded, ("PyAV 1", "PyAV 1", "PyAV 2", "Pillow 1", "Pillow 2")), card()
    )
    for alike in ((one, same), (pillow, newer), (one, old)):  # lossless, whoever reads them; and from before
        assert cards.table(alike)
    with pytest.raises(ValueError, match=r"by fd_efflite0, psnr: what decoded the videos: PyAV 1, PyAV 2$"):
        cards.table([one, other])


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


@pytest.fixture
def runs_of(tmp_path):
    """Writes metrics.json of runs, as an evaluation does."""

    def write(*each):
        for name, change in each:
            found = {
                "weights": "EMA",
                "bits_per_pixel": {"value": 0.5, "standard_error": 0.01, "n": 9, "levels": 16, "draws": 2},
                "fd_efflite0": {
                    "base": {"value": 80.0, "n": 7, "n_reference": 20, "nfe": 16, "against": "training images"},
                },
                "sampler": {"latent": "heun", "decoder": "ancestral", "decoder_nfe": 12, "guidance_scale": 1.0},
                "cost": {"seconds_stage1": 3.0},
                "definitions": {
                    "bits_per_pixel": {"definition": "a bound"},
                    "fd_efflite0": {"definition": "a distance", "network": {"definition": "n", "sha256": "c0"}},
                },
                "references": {
                    what: {"data": "emoji", "split": what[:5], "n": 20, "fingerprint": "f1"}
                    for what in ("training images", "held-out images")
                },
                "provenance": {"seed": 0, "dtype": "float32", "commit": "1"},
            }
            change(found)
            (tmp_path / name / "evaluation").mkdir(parents=True)
            (tmp_path / name / "evaluation" / "metrics.json").write_text(json.dumps(found))
        return [tmp_path / name for name, _ in each]

    return write


def test_runs_side_by_side_with_how_they_were_sampled(runs_of):
    def other(found):
        found["fd_efflite0"]["base"] |= {"value": 70.0, "nfe": 32}
        found["sampler"]["latent"] = "ddim"

    paths = runs_of(("one", lambda found: None), ("two", other))
    rows = [line.split("  ") for line in cards.table(paths).splitlines()]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert shown["bits_per_pixel"] == ["0.500 ± 0.010"] * 2
    assert shown["fd_efflite0.base"] == ["80.00", "70.00"]
    assert shown["NFE of the base model"] == ["16", "32"]
    assert shown["solver of the latent"] == ["heun", "ddim"]


def test_runs_on_other_data_or_other_samples_are_refused(runs_of):
    def data(found):
        found["references"]["training images"]["fingerprint"] = "f2"

    def count(found):
        found["fd_efflite0"]["base"]["n"] = 8
        found["bits_per_pixel"]["levels"] = 8

    one, of_data, of_count = runs_of(("one", lambda found: None), ("data", data), ("count", count))
    reference = "the reference: emoji train, 20 images f1, emoji train, 20 images f2"
    with pytest.raises(ValueError, match=f"may not be compared by fd_efflite0.base: {reference}$"):
        cards.table([one, of_data])
    with pytest.raises(ValueError, match=r"by bits_per_pixel, fd_efflite0\.base: .*noise levels: 16, 8.*images: 7, 8"):
        cards.table([one, of_count])
    assert "fd_efflite0" not in cards.table([one, of_data], ["bits_per_pixel"]).split("NFE")[0]


def test_runs_of_clips_are_compared_where_the_clips_and_the_task_are_the_same(runs_of):
    def clips(frames=16, stride=1, given=5):
        def change(found):
            found["fvd"] = found.pop("fd_efflite0")
            found["definitions"]["fvd"] = found["definitions"].pop("fd_efflite0")
            found["clip"] = {"frames": frames, "stride": stride, "given": given}

        return change

    one, same, longer, slower, harder = runs_of(
        ("one", clips()),
        ("same", clips()),
        ("longer", clips(frames=24)),
        ("slower", clips(stride=2)),
        ("harder", clips(given=1)),
    )
    shown = cards.table([one, same]).splitlines()
    assert [line.split()[-2:] for line in shown if line.startswith("NFE of the base model")] == [["16", "16"]]
    for other, reason in (
        (longer, "bits_per_pixel, fvd.base: the frames of each video: 16, 24"),
        (slower, "bits_per_pixel, fvd.base: the stride of frames: 1, 2"),
        (harder, "fvd.base: the given frames: 5, 1"),
    ):
        with pytest.raises(ValueError, match=f"may not be compared by {reason}$"):
            cards.table([one, other])
    assert cards.table([one, harder], ["bits_per_pixel"])  # of whole clips, without given frames


def test_a_run_that_is_not_evaluated_or_long_ago(runs_of, tmp_path):
    (path, clips) = runs_of(
        ("old", lambda found: found.pop("definitions")),
        ("old clips", lambda found: found.update(fvd=found["fd_efflite0"])),
    )
    for old in (path, clips):
        with pytest.raises(ValueError, match=f"python -m ulx.evaluate {old}"):
            cards.table([old, old])
    (clips / "evaluation" / "metrics.json").write_text('{"cut')
    with pytest.raises(ValueError, match=rf"metrics\.json is damaged .*python -m ulx.evaluate {clips}"):
        cards.table([clips, path])
    with pytest.raises(FileNotFoundError, match="is no evaluated run"):
        cards.table([tmp_path, path])
