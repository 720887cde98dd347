"""`python -m ulx.metrics` on folders of drawn images, with features that are known; the card says what went in."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from stand_ins import Corner

from ulx.data.image import read_image
from ulx.image_files import ImageFolder, write_png
from ulx.metrics import __main__ as command
from ulx.metrics import compare, efficientnet, inception, lpips
from ulx.metrics.entries import as_json
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.kernel import kernel_distance
from ulx.metrics.manifold import precision_recall
from ulx.metrics.pairs import namesakes

SIZE, COUNT, SHIFT = 16, 6, 5


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet, "load", Corner)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture
def originals():
    return np.random.default_rng(0).integers(0, 250, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path, originals):
    """A; and B, the same images SHIFT brighter and under the same names, with a contact sheet beside them."""
    for index, image in enumerate(originals):
        write_png(tmp_path / "a" / f"{index}.png", image)
        write_png(tmp_path / "b" / f"{index}.png", image + np.uint8(SHIFT))
    write_png(tmp_path / "b" / "contact_sheet.png", np.zeros((50, 70, 3), np.uint8))
    return tmp_path / "a", tmp_path / "b"


def run(*args):
    command.main([str(arg) for arg in args])


def fails(args, capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        run(*args)
    assert exit.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_card_and_table(folders, originals, tmp_path, capsys):
    out = tmp_path / "new" / "card.json"
    run(*folders, "--out", out, "--batch-size", "4")
    card = json.loads(out.read_text("utf-8"))
    metrics = card["metrics"]
    x, y = (originals[:, 0, 0].astype(np.float64) / 127.5 - 1 + shift for shift in (0, SHIFT / 127.5))
    # Features go through float32: 1e-7 of values up to 1, seen against distances of 5e-3.
    assert metrics["fd_efflite0"]["value"] == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-3)
    assert metrics["fd_efflite0"]["value"] == pytest.approx(3 * (SHIFT / 127.5) ** 2, rel=1e-3)  # a shift of 3 features
    kernel = kernel_distance(x, y, paired=True)  # files of one name
    assert metrics["kd_efflite0"]["value"] == pytest.approx(kernel.value, rel=1e-4)
    assert metrics["kd_efflite0"]["standard_error"] == pytest.approx(kernel.standard_error, rel=1e-4)
    shares = precision_recall(x, y)
    assert (metrics["precision"]["value"], metrics["recall"]["value"]) == (shares.precision, shares.recall)
    assert metrics["psnr"]["value"] == pytest.approx(20 * math.log10(255 / SHIFT), abs=1e-4)
    assert metrics["psnr"]["standard_error"] < 1e-4
    assert 0.9 < metrics["ssim"]["value"] < 1
    assert metrics["ssim"]["n_pairs"] == COUNT
    assert metrics["fd_efflite0"]["rank_deficient"] is False  # 6 examples of 3 features
    assert {(metrics[name]["n_a"], metrics[name]["n_b"]) for name in ("fd_efflite0", "precision")} == {(COUNT, COUNT)}
    assert all(metric["definition"] for metric in metrics.values())
    assert "Not FID" in metrics["fd_efflite0"]["definition"]
    assert "Not KID" in metrics["kd_efflite0"]["definition"]
    assert card["left_out"] == {}
    for name in ("fd_efflite0", "kd_efflite0", "precision", "recall"):
        assert metrics[name]["network"] == {"definition": "the corner", "sha256": "c0"}
    assert not {"network"} & (metrics["psnr"].keys() | metrics["ssim"].keys())
    assert card["resolution"] == SIZE
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", card["commit"] or "0" * 40)
    assert card["b"]["contact_sheets_left_out"] == ["contact_sheet.png"]
    printed = capsys.readouterr().out
    assert re.search(r"^psnr +34.15 ?.* dB$", printed, re.M)
    assert "left out of" in printed
    assert f"-> {out}" in printed
    assert "exists already" in fails([*folders, "--out", out], capsys)
    run(*folders, "--out", out, "--overwrite")
    assert json.loads(out.read_text("utf-8"))["a"] == card["a"]
    assert not list(out.parent.glob("*aside*"))


def test_precision_is_b_s_and_recall_a_s(folders, originals, tmp_path):
    """B holds copies of A's first image but for a level of its first pixel: all of them are in A, little of A in B."""
    for level in range(4):
        image = originals[0].copy()
        image[0, 0, 0] = image[0, 0, 0] // 8 * 8 + level
        write_png(tmp_path / "c" / f"{level}.png", image)
    metrics = compare.compare(folders[0], tmp_path / "c")["metrics"]
    assert metrics["precision"]["value"] == 1
    assert metrics["recall"]["value"] <= 1 / 6
    assert {(metric["n_a"], metric["n_b"]) for metric in metrics.values()} == {(6, 4)}


def test_the_hash_is_of_the_pixels(folders, originals, tmp_path):
    """Another name and another compression are the same pixels; one level in one of them is not."""
    card = compare.compare(*folders)
    (tmp_path / "c").mkdir()
    for index, image in enumerate(originals):
        Image.fromarray(image).save(tmp_path / "c" / f"x{index}.png", compress_level=0)
    other = compare.compare(tmp_path / "c", folders[1], batch_size=5)
    assert other["a"]["pixels_sha256"] == card["a"]["pixels_sha256"] != card["b"]["pixels_sha256"]
    assert other["left_out"] == dict.fromkeys(("psnr", "ssim"), "the folders do not hold the same file names")
    assert "psnr" not in other["metrics"]
    originals[3, 2, 1, 0] ^= 1
    write_png(tmp_path / "c" / "x3.png", originals[3])
    assert compare.compare(tmp_path / "c", folders[1])["a"]["pixels_sha256"] != card["a"]["pixels_sha256"]


def test_pairs_go_by_name_and_not_by_order(tmp_path, originals):
    """a.jpg is a.png's original; where two names differ by the suffix alone, a suffix more keeps them apart."""
    names_a, names_b = ("a.bmp", "d/b.bmp", "d/b.png", "e.bmp"), ("a.png", "d/b.bmp.png", "d/b.png.png", "e.webp")
    for name_a, name_b, image in zip(names_a, names_b, originals, strict=False):
        for folder, name in (("a", name_a), ("b", name_b)):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / folder / name, lossless=True)
    card = compare.compare(tmp_path / "a", tmp_path / "b", batch_size=3)
    assert card["metrics"]["psnr"]["value"] == math.inf
    assert card["metrics"]["ssim"]["value"] == pytest.approx(1, abs=1e-6)
    assert "inf dB" in command.table(card)
    assert json.loads(as_json(card))["metrics"]["psnr"]["value"] is None
    (tmp_path / "b" / "e.webp").rename(tmp_path / "b" / "f.webp")
    assert "psnr" in compare.compare(tmp_path / "a", tmp_path / "b")["left_out"]


def test_pairs_are_left_out_of_the_kernel_distance_in_whatever_order_the_folders_have_them(tmp_path, originals):
    """b.p.png comes first in one folder and second in the other; of equal images nothing is left."""
    for folder, names in (("a", ("b.p.png", "b.webp", "c.png")), ("b", ("b.p.png", "b.bmp", "c.png"))):
        (tmp_path / folder).mkdir()
        for name, image in zip(names, originals, strict=False):
            Image.fromarray(image).save(tmp_path / folder / name, lossless=True)
    assert ImageFolder(tmp_path / "a", None).names[0] == ImageFolder(tmp_path / "b", None).names[1] == "b.p.png"
    card = compare.compare(tmp_path / "a", tmp_path / "b")
    assert abs(card["metrics"]["kd_efflite0"]["value"]) < 1e-6  # float32 features


def test_names_that_could_be_one_another_s_are_no_pairs(tmp_path, originals):
    for name in ("x.bmp", "x.png", "x.bmp.png"):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(originals[0]).save(tmp_path / folder / name)
    a, b = (ImageFolder(tmp_path / folder, None) for folder in ("a", "b"))
    assert namesakes(a, b) == [(name, name) for name in a.names]
    (tmp_path / "b" / "x.bmp.png").unlink()
    assert namesakes(a, ImageFolder(tmp_path / "b", None)) is None


def test_resolution_is_the_data_cache_s_rule(folders, originals, capsys):
    """Both are resized and cropped as for training, larger or smaller, and images of several sizes need it."""
    a, b = folders
    Image.fromarray(np.kron(originals[0], np.ones((3, 2, 1), np.uint8))).save(a / "0.png")
    line = fails(folders, capsys)
    assert re.search(r"1\.png is 16×16 pixels, and 0\.png|0\.png is 32×48 pixels: give a --resolution", line)
    card = compare.compare(a, b, resolution=20)
    prepared = np.stack([read_image(a / name, 20)[0] for name in ImageFolder(a, 20).names])
    assert prepared.shape == (COUNT, 20, 20, 3)
    assert card["a"]["enlarged"] == COUNT - 1
    found = compare._measured([Corner()], ImageFolder(a, 20), 4)[0][0]
    np.testing.assert_allclose(found, prepared[:, 0, 0].astype(np.float64) / 127.5 - 1, atol=1e-6)  # float32
    for index, image in enumerate(originals):
        write_png(b / f"{index}.png", image[:12, :12])
    write_png(a / "0.png", originals[0])
    assert "two sizes" in fails(folders, capsys)


def test_inception_and_lpips_are_asked_for(folders, tmp_path, monkeypatch, capsys):
    """Under names of their own, and their networks on the card."""
    file = tmp_path / "inception.pth"

    def load(path, resize):
        assert (path, resize) == (file, "clean-bicubic")
        return Corner("clean_fid", "clean_kid", "another", "c1")

    monkeypatch.setattr(inception, "load", load)
    monkeypatch.setattr(lpips, "load", lambda: lambda x, y: abs(x - y).mean(axis=(1, 2, 3)))
    out = tmp_path / "card.json"
    run(*folders, "--inception-weights", file, "--inception-resize", "clean-bicubic", "--lpips", "--out", out)
    metrics = json.loads(out.read_text("utf-8"))["metrics"]
    own, other = ("fd_efflite0", "kd_efflite0", "precision", "recall"), ("clean_fid", "clean_kid")
    assert metrics.keys() == {*own, *other, "precision_clean_fid", "recall_clean_fid", "psnr", "ssim", "lpips_vgg16"}
    assert metrics["clean_fid"]["value"] == metrics["fd_efflite0"]["value"]
    assert metrics["clean_fid"]["network"] == {"definition": "another", "sha256": "c1"}
    assert "Not FID" not in metrics["clean_fid"]["definition"]
    assert metrics["lpips_vgg16"]["value"] == pytest.approx(SHIFT / 127.5, rel=1e-5)
    assert "vgg16" in metrics["lpips_vgg16"]["definition"]
    assert re.search(r"^precision_clean_fid +\d", capsys.readouterr().out, re.M)
    small = compare.compare(*folders, resolution=12, with_lpips=True)
    assert "network needs 16×16" in small["left_out"]["lpips_vgg16"]


def test_a_missing_file_of_weights_is_named(folders, tmp_path, capsys):
    assert "nothing.pth is no file" in fails([*folders, "--inception-weights", tmp_path / "nothing.pth"], capsys)


def test_few_or_small_images_leave_something_out(folders):
    a, b = folders
    for folder in folders:
        for index in range(3, COUNT):
            (folder / f"{index}.png").unlink()
    card = compare.compare(a, b)
    assert card["metrics"]["fd_efflite0"]["rank_deficient"] is True
    assert card["left_out"].keys() == {"precision", "recall"}
    assert "psnr" in card["metrics"]
    small = compare.compare(a, b, resolution=8)
    assert small["left_out"].keys() == {"precision", "recall", "ssim"}
    assert "without precision and recall: they need more than 3 images" in command.table(small)
    (a / "2.png").unlink()
    (b / "2.png").unlink()
    two = compare.compare(a, b)
    assert json.loads(as_json(two))["metrics"]["kd_efflite0"]["standard_error"] is None


def test_what_cannot_be_compared_is_named(folders, tmp_path, capsys):
    a, b = folders
    assert "nothing is no folder" in fails([a, tmp_path / "nothing"], capsys)
    (tmp_path / "empty").mkdir()
    assert f"no images in {tmp_path / 'empty'}" in fails([tmp_path / "empty", b], capsys)
    write_png(tmp_path / "empty" / "one.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    assert "holds one image: a comparison needs at least 2" in fails([tmp_path / "empty", b], capsys)
    whole = (b / "3.png").read_bytes()
    for damaged, extra in ((b"no image", []), (b"no image", ["--resolution", 16]), (whole[:60], [])):
        (b / "3.png").write_bytes(damaged)  # not even a header, and a header whose pixels are cut off
        assert re.search(r"b/3\.png cannot be read as an image \(.*\): repair", fails([a, b, *extra], capsys))
    with pytest.raises(SystemExit) as exit:
        run(a, b, "--resolution", "0")
    assert exit.value.code == 2
    assert "resolution must be at least 1" in capsys.readouterr().err


def test_the_command_is_named_and_the_package_stays_light(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/ulx/metrics/__main__.py"])
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "python -m ulx.metrics " in capsys.readouterr().out
    light = "import sys, ulx.metrics; assert not {'jax', 'numpy', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", light], check=True)
