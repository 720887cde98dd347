"""`python -m ulx.metrics` on folders of small videos, with features that are known; then with I3D's."""

import json
import math
import re

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from video_files import noise, write_video

from ulx import cards
from ulx.data.video import Clip
from ulx.image_files import write_png
from ulx.metrics import __main__ as command
from ulx.metrics import compare, i3d, lpips
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.images import ssim
from ulx.metrics.kernel import kernel_distance
from ulx.metrics.manifold import precision_recall
from ulx.video_files import VideoFolder

SIZE, COUNT, FRAMES = 16, 6, 20
SHIFTS = np.arange(1, FRAMES + 1) % 8 + 1
"""By which B's frames are brighter than A's."""


class Corner(eqx.Module):
    """Features of a video: a pixel of its first and its last frame, and of their mean."""

    metric: str = eqx.field(default="fvd", static=True)
    kernel_metric: str = eqx.field(default="kd_i3d", static=True)
    definition: str = eqx.field(default="the corner", static=True)
    sha256: str = eqx.field(default="c0", static=True)

    def __call__(self, videos):
        pixel = videos[:, :, 0, 0, 0]
        return jnp.stack([pixel[:, 0], pixel[:, -1], pixel.mean(axis=1)], axis=-1)


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path):
    monkeypatch.setattr(i3d, "load", Corner)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture
def originals():
    return noise(COUNT * FRAMES, SIZE, SIZE).reshape(COUNT, FRAMES, SIZE, SIZE, 3)


@pytest.fixture
def folders(tmp_path, originals):
    """A; and B, the same videos brighter and in other files, one in a subfolder, with a contact sheet beside them."""
    for index, frames in enumerate(originals):
        name = f"sub/{index}" if index == 3 else f"{index}"
        write_video(tmp_path / "a" / f"{name}.mkv", frames)
        brighter = frames + SHIFTS[:, None, None, None].astype(np.uint8)
        write_video(tmp_path / "b" / f"{name}{'.avi' if index % 2 else '.mp4'}", brighter)
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


def corners(frames):
    """The features, from `n t h w 3`, with 6 of 6 names in a folder's order."""
    pixel = frames[[0, 1, 2, 4, 5, 3], :, 0, 0, 0].astype(np.float64) / 127.5 - 1
    return np.stack([pixel[:, 0], pixel[:, -1], pixel.mean(axis=1)], axis=-1)


def test_card_and_table(folders, originals, tmp_path, capsys):
    out = tmp_path / "card.json"
    run(*folders, "--frames", "10", "--stride", "2", "--out", out, "--batch-size", "40")
    card = json.loads(out.read_text("utf-8"))
    metrics, shifts = card["metrics"], SHIFTS[:20:2]
    x = originals[:, :20:2]
    y = x + shifts[:, None, None, None]
    moments = Moments.of(corners(x)), Moments.of(corners(y))
    # Features go through float32: 1e-7 of values up to 1, seen against distances of 5e-3.
    assert metrics["fvd"]["value"] == pytest.approx(frechet_distance(*moments), rel=1e-3)
    kernel = kernel_distance(corners(x), corners(y), paired=True)  # files of one name
    assert metrics["kd_i3d"]["value"] == pytest.approx(kernel.value, rel=1e-3)
    assert metrics["kd_i3d"]["standard_error"] == pytest.approx(kernel.standard_error, rel=1e-3)
    shares = precision_recall(corners(x), corners(y))
    assert (metrics["precision"]["value"], metrics["recall"]["value"]) == (shares.precision, shares.recall)
    # Decibels of each frame, averaged: not those of the frames' mean error.
    assert metrics["psnr"]["value"] == pytest.approx(np.mean(20 * np.log10(255 / shifts)), abs=1e-4)
    assert abs(metrics["psnr"]["value"] - 10 * np.log10(255**2 / np.mean(shifts**2))) > 0.5
    assert metrics["psnr"]["standard_error"] < 1e-4  # over videos, which are all alike in that
    of_frames = ssim(*(each.reshape(-1, SIZE, SIZE, 3) / np.float32(127.5) - 1 for each in (x, y)))
    of_videos = np.asarray(of_frames, np.float64).reshape(COUNT, 10).mean(axis=1)
    assert metrics["ssim"]["value"] == pytest.approx(of_videos.mean(), rel=1e-5)
    assert metrics["ssim"]["standard_error"] == pytest.approx(of_videos.std(ddof=1) / math.sqrt(COUNT), rel=1e-3)
    assert {metrics[name]["n_pairs"] for name in ("psnr", "ssim")} == {COUNT}
    assert {(metrics[name]["n_a"], metrics[name]["n_b"]) for name in ("fvd", "precision")} == {(COUNT, COUNT)}
    for name in ("fvd", "kd_i3d", "precision", "recall"):
        assert metrics[name]["network"] == {"definition": "the corner", "sha256": "c0"}
    assert "logits" in metrics["fvd"]["definition"]
    assert "each frame" in metrics["psnr"]["definition"]
    assert metrics["fvd"]["rank_deficient"] is False
    assert card["left_out"] == {}
    assert (card["kind"], card["resolution"]) == ("videos", SIZE)
    assert (card["clip"]["frames"], card["clip"]["stride"]) == (10, 2)
    assert "all of them count" in card["clip"]["rule"]
    assert "ulx.data.video" in card["preparation"]
    assert re.match(r"PyAV \d+\S* \(libavcodec \d+\S+, libswscale \d+\S+\)$", card["b"]["decoder"])
    assert card["b"]["contact_sheets_left_out"] == ["contact_sheet.png"]
    printed = capsys.readouterr()
    assert f"A {folders[0]}: 6 videos" in printed.out
    assert "of each the first 10 frames, with a stride of 2" in printed.out
    assert re.search(r"^psnr .* dB$", printed.out, re.M)
    assert "6/6 videos" in printed.err


def test_cards_of_other_clips_may_not_be_compared(folders, tmp_path, capsys):
    for name, *options in (
        ("one", "--stride", 1),
        ("two", "--frames", 10, "--stride", 2),
        ("same", "--batch-size", 16),
    ):
        run(*folders, "--out", tmp_path / f"{name}.json", *options)
    one, two, same = (tmp_path / f"{name}.json" for name in ("one", "two", "same"))
    assert cards.table([one, same]).splitlines()[1].startswith("fvd")
    with pytest.raises(ValueError, match="may not be compared by fvd") as error:
        cards.table([one, two], ["fvd"])
    assert "the frames of each video: 16, 10; the stride of frames: 1, 2" in str(error.value)


def test_a_clip_s_rule_is_compared_too(folders, tmp_path):
    path, other = tmp_path / "one.json", tmp_path / "other.json"
    run(*folders, "--out", path)
    card = json.loads(path.read_text("utf-8"))
    card["clip"]["rule"] = "from the middle"
    other.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"the rule of clips: from the first frame .*, from the middle"):
        cards.table([path, other])


def test_the_batch_changes_nothing_and_the_resolution_is_the_images_rule(folders):
    one, other = (compare.compare(*folders, resolution=11, batch_size=size) for size in (1, 1000))
    assert one["a"] == other["a"]
    assert one["a"]["enlarged"] == 0
    for name, metric in one["metrics"].items():
        assert metric["value"] == pytest.approx(other["metrics"][name]["value"], rel=1e-4)
    large = compare.compare(*folders, resolution=20)
    assert (large["resolution"], large["a"]["enlarged"]) == (20, COUNT)
    assert "6 videos of" in command.table(large)


def test_lpips_is_of_frames(folders, monkeypatch):
    monkeypatch.setattr(lpips, "load", lambda: lambda x, y: abs(x - y).mean(axis=(1, 2, 3)))
    metric = compare.compare(*folders, clip=Clip(9), with_lpips=True)["metrics"]["lpips_vgg16"]
    assert metric["value"] == pytest.approx(SHIFTS[:9].mean() / 127.5, rel=1e-5)
    assert metric["n_pairs"] == COUNT
    small = compare.compare(*folders, resolution=8)["left_out"]
    assert small == {"ssim": "its window has 11×11 pixels, the videos are smaller"}


def test_clips_with_equal_frames_are_counted_and_left_out(folders, originals):
    """Of PSNR, whose mean they would make infinite."""
    _, b = folders
    brighter = originals[0] + SHIFTS[:, None, None, None].astype(np.uint8)
    brighter[5] = originals[0, 5]
    write_video(b / "0.mp4", brighter)
    card = compare.compare(*folders)
    psnr = card["metrics"]["psnr"]
    assert psnr["value"] == pytest.approx(np.mean(20 * np.log10(255 / SHIFTS[:16])), abs=1e-4)
    assert (psnr["n_pairs"], psnr["infinite"]) == (COUNT, 1)
    assert "infinite" not in card["metrics"]["ssim"]
    assert re.search(r"^psnr .*\(and 1 infinite\) dB$", command.table(card), re.M)


def test_pairs_leave_given_frames_out(folders, originals, tmp_path, capsys):
    """Which are equal. The distances count them; cards of other numbers of them are not compared by pairs."""
    _, b = folders
    for index, name in enumerate(["0.mp4", "1.avi", "2.mp4", "sub/3.avi", "4.mp4", "5.avi"]):
        frames = originals[index] + SHIFTS[:, None, None, None].astype(np.uint8)
        frames[:4:2] = originals[index, :4:2]
        write_video(b / name, frames)
    cards_of = [tmp_path / f"{given}.json" for given in (2, 3)]
    for given, path in zip((2, 3), cards_of, strict=True):
        run(*folders, "--frames", 10, "--stride", 2, "--given", given, "--out", path)
    assert "of pairs the frames after the first 3" in capsys.readouterr().out
    two, three = (json.loads(path.read_text("utf-8")) for path in cards_of)
    shifts = SHIFTS[:20:2]
    for given, card in ((2, two), (3, three)):
        assert card["metrics"]["psnr"]["value"] == pytest.approx(np.mean(20 * np.log10(255 / shifts[given:])), abs=1e-4)
    assert two["metrics"]["ssim"]["value"] < 1
    assert two["metrics"]["fvd"] == three["metrics"]["fvd"]
    cards.table(cards_of, ["fvd"])
    with pytest.raises(ValueError, match="may not be compared by psnr"):
        cards.table(cards_of, ["psnr"])
    for given in (10, -1):
        message = fails([*folders, "--frames", "10", "--given", f"{given}"], capsys)
        assert message == f"error: --given {given}: must be below the 10 frames of a clip, and not below 0"


def test_few_or_unpaired_videos_leave_something_out(folders):
    a, b = folders
    for folder in folders:
        for path in [*folder.glob("[245].*"), *folder.glob("sub/*")]:
            path.unlink()
    card = compare.compare(a, b)
    assert card["left_out"] == dict.fromkeys(("precision", "recall"), "they need more than 3 videos in each folder")
    assert card["metrics"]["fvd"]["rank_deficient"] is True
    assert "rank-deficient" in command.table(card)
    (b / "0.mp4").rename(b / "9.mp4")
    assert {"psnr", "ssim"} < compare.compare(a, b)["left_out"].keys()


def test_animations_are_videos(folders, originals, tmp_path):
    a, _ = folders
    for index, frames in enumerate(originals):
        first, *others = map(Image.fromarray, frames)
        (tmp_path / "c" / "sub").mkdir(parents=True, exist_ok=True)
        name = f"sub/{index}.webp" if index == 3 else f"{index}.webp"
        first.save(tmp_path / "c" / name, save_all=True, append_images=others, lossless=True)
    card = compare.compare(a, tmp_path / "c")
    assert card["a"]["pixels_sha256"] == card["b"]["pixels_sha256"]
    assert card["metrics"]["fvd"]["value"] == pytest.approx(0, abs=1e-9)  # rounding
    assert [card[side]["decoder"].split()[0] for side in "ab"] == ["PyAV", "Pillow"]
    write_video(tmp_path / "c" / "more.mkv", originals[0])
    assert re.match(r"Pillow \S+, PyAV ", VideoFolder(tmp_path / "c", None, Clip()).decoder())


def test_folders_of_two_kinds_are_refused(folders, tmp_path, capsys):
    a, b = folders
    for index in range(2):
        write_png(tmp_path / "images" / f"{index}.png", np.full((SIZE, SIZE, 3), index, np.uint8))
    assert f"{a} holds videos and {tmp_path / 'images'} images" in fails([a, tmp_path / "images"], capsys)
    write_png(b / "thumbnail.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    line = fails([a, b], capsys)
    assert f"{b} holds images (such as thumbnail.png) and videos (such as 0.mp4): keep one kind" in line
    (tmp_path / "empty").mkdir()
    assert "no images in" in (line := fails([tmp_path / "empty", a], capsys))
    assert ".mkv" in line


def test_options_of_the_other_kind_are_refused(folders, tmp_path, monkeypatch, capsys):
    for index in range(2):
        write_png(tmp_path / "images" / f"{index}.png", np.full((SIZE, SIZE, 3), index, np.uint8))
    for options in (["--frames", 16], ["--stride", 1]):
        line = fails([tmp_path / "images", tmp_path / "images", *options], capsys)
        assert "hold images: --frames and --stride are for videos" in line
    line = fails([tmp_path / "images", tmp_path / "images", "--given", 5], capsys)
    assert "hold images: --given is for videos" in line
    monkeypatch.setattr(command.inception, "load", lambda *_: Corner())
    line = fails([*folders, "--inception-weights", tmp_path / "weights.pth"], capsys)
    assert "holds videos: networks of images (--inception-weights)" in line
    assert "at least 9 frames, got 8: give a larger --frames" in fails([*folders, "--frames", 8], capsys)
    for option in ("--frames", "--stride"):
        with pytest.raises(SystemExit) as exit:
            run(*folders, option, "0")
        assert exit.value.code == 2
        assert f"{option[2:]} must be at least 1" in capsys.readouterr().err


def test_what_cannot_be_compared_is_named(folders, tmp_path, capsys):
    a, b = folders
    line = fails([*folders, "--stride", 2], capsys)
    assert f"{a / '0.mkv'} has 20 frames, and 16 with a stride of 2 need 31: give smaller --frames or --stride" in line
    whole = (b / "2.mp4").read_bytes()
    for damaged, options in ((b"no video", []), (b"no video", ["--resolution", 16]), (whole[: len(whole) // 2], [])):
        (b / "2.mp4").write_bytes(damaged)
        assert re.search(r"b/2\.mp4 cannot be read as a video \(.*\): repair", fails([*folders, *options], capsys))
    write_video(b / "2.mp4", noise(FRAMES, 20, 24))
    assert re.search(r"2\.mp4 is 24×20 pixels, and 0\.mp4 is 16×16: give a --resolution", fails(folders, capsys))
    write_video(tmp_path / "one" / "a.mkv", noise(FRAMES, SIZE, SIZE))
    assert "holds one video: a comparison needs at least 2" in fails([a, tmp_path / "one"], capsys)
    write_video(tmp_path / "one" / "a.mkv", noise(FRAMES, 20, 20))
    write_video(tmp_path / "one" / "b.mkv", noise(FRAMES, 20, 20))
    assert "the videos have two sizes" in fails([a, tmp_path / "one"], capsys)


def test_the_folder_alone_says_what_it_wants(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the one that holds the videos"):
        VideoFolder(tmp_path / "nothing", None, Clip())
    with pytest.raises(ValueError, match=r"no videos in .* \(looked for \.mp4 .*, and animated \.gif \.webp \.png"):
        VideoFolder(tmp_path, None, Clip())


def test_clips_that_the_commands_write_are_read_again_frame_by_frame(tmp_path):
    """As animated PNGs: a frame like the one before it is a frame too. A sheet is none of the clips."""
    clip = noise(FRAMES, SIZE, SIZE)
    clip[1:4], clip[9] = clip[0], clip[8]
    for name in ("base-seed0-000000.png", "base-seed0-000001.png"):
        write_png(tmp_path / "a" / name, clip)
    write_png(tmp_path / "a" / "base-seed0-sheet.png", clip[0])
    folder = VideoFolder(tmp_path / "a", None, Clip(FRAMES))
    assert folder.names == ["base-seed0-000000.png", "base-seed0-000001.png"]
    read, enlarged = folder.read(folder.names[0])
    np.testing.assert_array_equal(read, clip)
    assert not enlarged


def test_fvd_of_i3d_itself(tmp_path, monkeypatch):
    """From files to the card, against the network called by hand."""
    monkeypatch.undo()
    clips = np.kron(noise(4 * 9, 4, 4), np.ones((1, 8, 8, 1), np.uint8)).reshape(4, 9, 32, 32, 3)
    for index, clip in enumerate(clips):
        write_video(tmp_path / "ab"[index // 2] / f"{index}.mkv", clip)
    card = compare.compare(tmp_path / "a", tmp_path / "b", clip=Clip(9), batch_size=18)
    network = i3d.load()
    logits = np.asarray(eqx.filter_jit(network)(jnp.asarray(clips / np.float32(127.5) - 1)))
    expected = frechet_distance(Moments.of(logits[:2]), Moments.of(logits[2:]))
    # float32 in two programs; the distance is far from zero.
    assert card["metrics"]["fvd"]["value"] == pytest.approx(expected, rel=1e-4)
    assert card["metrics"]["fvd"]["network"] == {"definition": i3d.DEFINITION, "sha256": i3d.SHA256}
    assert card["metrics"]["fvd"]["rank_deficient"] is True
