import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trees import CLASSES, LABELS, imagenet_files, package_videos, write_folders, write_kinetics, write_tar_files
from video_files import noise, write_video

from ulx import aside
from ulx.data import DataConfig, cache, open_dataset
from ulx.data.encoded import decode_clip
from ulx.data.image import center_crop, find_files, read_image
from ulx.data.pipeline import train_batches
from ulx.data.prepare import ImageNet, Kinetics, main, prepare
from ulx.data.prepared import open_prepared
from ulx.data.video import Clip, frames

SMALL_SHARDS = 2**16  # bytes: as many shards of these small examples as a real preparation has of large ones


@pytest.fixture(autouse=True)
def _several_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", SMALL_SHARDS)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """220 images in folders and in tar files, and the damaged ones."""
    root = tmp_path_factory.mktemp("imagenet")
    files, broken = imagenet_files(220)
    write_folders(root / "folders", files)
    write_tar_files(root / "tar", files)
    return root, files, broken


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinetics")
    annotations, broken = write_kinetics(root, 220)
    return Kinetics(str(root / "videos"), (str(annotations),), out="", resolution=32), broken


@pytest.fixture(scope="module")
def prepared_imagenet(imagenet, tmp_path_factory):
    root, _, _ = imagenet
    options = ImageNet(str(root / "folders"), str(tmp_path_factory.mktemp("out")), resolution=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_BYTES", SMALL_SHARDS)
        return options, prepare(options)


@pytest.fixture(scope="module")
def prepared_kinetics(kinetics, tmp_path_factory):
    options = replace(kinetics[0], out=str(tmp_path_factory.mktemp("out")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_BYTES", SMALL_SHARDS)
        return options, prepare(options)


def contents(folder):
    """The shards; the manifest and the notes beside them hold the sizes and hashes of these."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix == ".arrayrecord"}


def test_every_image_is_there_by_its_name_or_named_with_the_reason(imagenet, prepared_imagenet):
    root, files, broken = imagenet
    options, prepared = prepared_imagenet
    assert len(files) >= 200
    assert len(broken) >= 0.05 * len(files)
    refused = dict(prepared.refused)
    assert refused.keys() == broken.keys()
    assert all(reason in refused[name] for name, reason in broken.items())
    dataset = open_prepared(options.out, 64)
    assert dataset.class_names == CLASSES
    assert {*dataset.train.names, *dataset.validation.names} == files.keys() - broken.keys()
    for split, start in [(dataset.train, "train/"), (dataset.validation, "val/")]:
        for name, example in zip(split.names, split, strict=True):
            assert name.startswith(start)
            assert CLASSES[example["label"]] == name.split("/")[1]
            np.testing.assert_array_equal(example["image"], read_image(root / "folders" / name, 64)[0])


def test_odd_images_are_upright_and_of_the_right_colour(imagenet, prepared_imagenet):
    """By Pillow's own reading of the same bytes: CMYK, 16 bits, EXIF."""
    _, files, _ = imagenet
    dataset = open_prepared(prepared_imagenet[0].out, 64)
    example = {name.split("_")[-1]: (name, i) for i, name in enumerate(dataset.train.names)}
    for index in ("11.JPEG", "12.JPEG", "13.JPEG"):
        name, place = example[index]
        image = Image.open(BytesIO(files[name]))
        if index == "13.JPEG":
            image = image.transpose(Image.Transpose.ROTATE_270)  # EXIF 6: turn by 90° clockwise
        elif index == "12.JPEG":
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        np.testing.assert_array_equal(dataset.train[place]["image"], center_crop(image.convert("RGB"), 64))


def test_tar_files_and_folders_are_the_same_shards(imagenet, prepared_imagenet, tmp_path):
    root, _, _ = imagenet
    prepare(ImageNet(str(root / "tar"), str(tmp_path), resolution=64, workers=1))
    assert contents(tmp_path) == contents(prepared_imagenet[0].out)


STOPPED = """
import sys, time
from pathlib import Path
from ulx.data import cache
from ulx.data.prepare import main
_, small, where, calls, reached, *arguments = sys.argv
cache.SHARD_BYTES = int(small)
module, name = {"pack": (cache.record, "pack"), "notes": (cache, "_write_json")}[where]
original, left = getattr(module, name), int(calls)
def counted(*args):
    global left
    left -= 1
    if left == 0:
        Path(reached).touch()
        time.sleep(600)
    return original(*args)
setattr(module, name, counted)
main(arguments)
"""
"""A preparation that goes no further at one call of what packs a record or writes a shard's notes."""


@pytest.mark.parametrize(("name", "where"), [("imagenet", "pack"), ("imagenet", "notes"), ("kinetics600", "pack")])
def test_a_killed_preparation_goes_on_to_the_same_shards(
    imagenet, kinetics, prepared_imagenet, prepared_kinetics, tmp_path, name, where
):
    """Killed half-way, in the middle of a shard; or with a shard under its name and nothing known of it yet."""
    options, prepared = {"imagenet": prepared_imagenet, "kinetics600": prepared_kinetics}[name]
    whole, out, reached = contents(options.out), tmp_path / "out", tmp_path / "reached"
    arguments = [name, "--root", options.root, "--out", str(out), "--resolution", str(options.resolution)]
    if name == "kinetics600":
        arguments += ["--annotations", *options.annotations]
    examples = len(prepared.dataset.train) + len(prepared.dataset.validation)
    calls = examples // 2 if where == "pack" else 2 + len(whole) // 2
    given = [str(SMALL_SHARDS), where, str(calls), str(reached), *arguments, "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *given], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    try:
        while not reached.exists():
            assert process.poll() is None, "ended before it was killed"
            assert time.monotonic() < deadline, "never came so far"
            time.sleep(0.02)
    finally:
        process.kill()  # by SIGKILL
        process.wait()
    known = [file for file in contents(out) if (out / file).with_suffix(".json").exists()]
    assert 0 < len(known) < len(whole)
    if where == "pack":
        assert len(list(out.glob("*.arrayrecord.*.tmp"))) == 1
    else:
        assert len(contents(out)) == len(known) + 1
    with pytest.raises(FileNotFoundError, match="is not finished"):
        open_prepared(out, options.resolution)
    times = {file: (out / file).stat().st_mtime_ns for file in known}
    main([*arguments, "--workers", "2"])
    assert contents(out) == whole
    manifests = [json.loads((Path(folder) / "manifest.json").read_text()) for folder in (out, options.out)]
    assert [shard["refused"] for shard in manifests[0]["shards"]] == [
        shard["refused"] for shard in manifests[1]["shards"]
    ]
    assert manifests[0]["counts"]["left out"] == len(prepared.refused) > 0
    assert {file: (out / file).stat().st_mtime_ns for file in known} == times  # none was made twice
    if aside.where() != aside.NOWHERE:  # else they are left for an hour
        assert not list(out.glob("*.tmp"))


def test_every_clip_is_there_or_named_with_the_reason(kinetics, prepared_kinetics):
    options, broken = kinetics
    _, prepared = prepared_kinetics
    files = [path for path in Path(options.root).rglob("*_*.*") if path.suffix != ".png"]
    assert len(files) >= 200
    assert sum(reason.split()[-1] in ("empty", "input") for reason in broken.values()) >= 0.05 * len(files)
    refused = dict(prepared.refused)
    assert refused.keys() == broken.keys()
    assert all(reason in refused[name] for name, reason in broken.items())
    assert set(broken.values()) == {
        "is not there",
        "is empty",
        "has 9 frames, and at least 16 are wanted",
        "Invalid data found when processing input",
    }
    dataset = prepared.dataset
    assert dataset.class_names == LABELS
    rows = [row.split(",") for row in Path(options.annotations[0]).read_text().splitlines()[1:]]
    expected = {"train": {}, "validate": {}, "test": {}}
    for label, youtube_id, start, end, split in rows:
        name = f"{youtube_id}_{int(start):06d}_{int(end):06d}"
        if name not in broken:
            expected[split][name] = LABELS.index(label)
    assert len(expected["test"]) >= 3  # and not used
    for split, found in [("train", dataset.train), ("validate", dataset.validation)]:
        assert dict(zip(found.names, found.labels.tolist(), strict=True)) == expected[split]


def test_a_clip_holds_its_frames_and_any_of_them_are_drawn(prepared_kinetics):
    """The package's own files, portrait, odd and of a variable frame rate, against the frames that PyAV gives."""
    options, _ = prepared_kinetics
    clip = Clip(16)
    dataset = open_prepared(options.out, 32, clip=clip)
    videos = [path for path in Path(options.root).rglob("*.*") if path.suffix != ".png"]
    files = {path.stem.split("_abcDE")[0]: path for path in videos}
    for index in (3, 4, 5, 8, 10, 11, 14, 16):
        key = f"-{index:04d}"
        place = next(i for i, name in enumerate(dataset.train.names) if name.startswith(key))
        original = [center_crop(Image.fromarray(frame), 32).astype(float) for frame in frames(files[key])]
        assert len(original) >= 20
        first, last = dataset.train[place]["image"], _last(dataset.train.source, place, len(original))
        for found, wanted in [(first, original[:16]), (last, original[-16:])]:
            error = np.mean((found - np.stack(wanted)) ** 2)
            assert 10 * np.log10(255**2 / error) > 34  # 34 to 45 dB: pixels this small are all detail


def _last(source, place, count):
    """The clip that begins as late as it can."""

    class Rng(np.random.Generator):
        def integers(self, places):
            assert places == count - 15
            return places - 1

    return source.draw(place, Rng(np.random.PCG64()))["image"]


def test_what_is_said_of_it(prepared_kinetics, kinetics, capsys):
    options, prepared = prepared_kinetics
    prepare(options)
    said = capsys.readouterr().out
    count = len(prepared.dataset.train)
    assert f"{count} training and {len(prepared.dataset.validation)} held-out clips of 3 classes at 32 pixels" in said
    assert f"{len(kinetics[1])} left out" in said
    assert "is not there" in said
    manifest = json.loads((Path(options.out) / "manifest.json").read_text())
    assert manifest["counts"]["train"] == count
    reasons = Counter(name for shard in manifest["shards"] for name, _ in shard["refused"])
    assert set(reasons) == kinetics[1].keys()
    assert set(reasons.values()) == {1}


def test_training_reads_it_and_resumes_in_the_middle_of_an_epoch(prepared_kinetics):
    options, _ = prepared_kinetics
    config = DataConfig("prepared", options.out, resolution=32, clips=True, frames=8, stride=2)
    dataset = open_dataset(config)
    settings = {"batch_size": 8, "seed": 3, "flip": True}
    there = train_batches(dataset, **settings)
    seen = [next(there) for _ in range(2 * len(dataset.train) // 8)]
    assert seen[0]["image"].shape == (8, 8, 32, 32, 3)
    again = train_batches(dataset, **settings)
    again.set_state({**there.get_state(), "batches": 5})
    for batch in seen[5:9]:
        np.testing.assert_array_equal(next(again)["image"], batch["image"])
    # Twice the same video, in two epochs, is two clips: 20 frames leave 6 places for the 15 of a clip, so that one of
    # six is the same by chance; of some 140, 0.4 is over seven standard deviations away.
    first = next(iter(train_batches(dataset, batch_size=len(dataset.train), seed=3)))
    second_epoch = train_batches(dataset, batch_size=len(dataset.train), seed=3)
    next(second_epoch)
    second = next(second_epoch)
    prints = [Counter(clip.tobytes() for clip in batch["image"]) for batch in (first, second)]
    assert sum((prints[0] & prints[1]).values()) < 0.4 * len(dataset.train)


def test_pieces_of_batches_belong_to_their_process_and_workers_change_nothing(prepared_kinetics):
    options, _ = prepared_kinetics
    dataset = open_dataset(DataConfig("prepared", options.out, resolution=32, clips=True))
    whole = next(train_batches(dataset, batch_size=8, seed=0))
    parts = [next(train_batches(dataset, batch_size=8, seed=0, shard_index=i, shard_count=2)) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part["image"] for part in parts]), whole["image"])
    worked = train_batches(dataset, batch_size=8, seed=0, workers=1)
    np.testing.assert_array_equal(next(worked)["image"], whole["image"])
    worked.close()


def test_some_of_it_and_without_labels(prepared_imagenet):
    options, _ = prepared_imagenet
    config = DataConfig("prepared", options.out, resolution=64)
    whole = open_dataset(config)
    some = open_dataset(replace(config, limit=20, labels=False))
    assert len(some.train) + len(some.validation) == 20
    assert set(some.train.names) < set(whole.train.names)
    assert some.class_names == ("all",)
    assert some.fingerprint != whole.fingerprint
    place = whole.train.names.index(some.train.names[3])
    np.testing.assert_array_equal(some.train[3]["image"], whole.train[place]["image"])
    assert some.train[3]["label"] == 0
    assert not some.train.labels.any()


def test_what_does_not_fit_is_said(prepared_imagenet, prepared_kinetics, tmp_path):
    images, clips = prepared_imagenet[0].out, prepared_kinetics[0].out
    with pytest.raises(ValueError, match=r"was prepared at 64 pixels, and --data\.resolution is 32"):
        open_prepared(images, 32)
    with pytest.raises(ValueError, match="holds images, and clips are wanted"):
        open_prepared(images, 64, clip=Clip())
    with pytest.raises(ValueError, match="holds clips, and images are wanted"):
        open_prepared(clips, 32)
    with pytest.raises(
        ValueError, match=r"have at least 16 frames, and 16 with a stride of 2 need 31: .*--at-least 31"
    ):
        open_prepared(clips, 32, clip=Clip(16, 2))
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        open_prepared(tmp_path, 32)


def test_other_options_into_the_same_folder_are_refused(prepared_imagenet):
    options, _ = prepared_imagenet
    with pytest.raises(ValueError, match=r"holds another preparation \(codec 'webp' -> 'jpeg'\)"):
        prepare(replace(options, codec="jpeg"))


def test_a_changed_file_is_another_preparation(kinetics, prepared_kinetics):
    options, _ = prepared_kinetics
    with pytest.raises(ValueError, match=r"holds another preparation \(at_least 16 -> 10\)"):
        prepare(replace(options, at_least=10))
    file = next(path for path in Path(options.root).rglob("*.mp4") if path.stat().st_size)
    content = file.read_bytes()
    try:
        file.write_bytes(content + b"\0")
        with pytest.raises(ValueError, match=r"holds another preparation \(files "):
            prepare(options)
    finally:
        file.write_bytes(content)


def test_of_a_whole_video_the_clip_is_cut_out_by_its_times(tmp_path):
    """Two minutes at ten frames/s, whose grey is the second: seconds 30 to 40 and 100 to 110 of it, also of a file
    without an index; and files of the same kind of name that were cut already, one to more than was asked for."""
    levels = np.repeat(2 * np.arange(120, dtype=np.uint8), 10)
    root = tmp_path / "videos"
    kinds: dict[str, Any] = {".mp4": {}, ".mpg": {"codec": "mpeg2video", "pixels": "yuv420p", "format": "mpegts"}}
    files = {"whole.mp4": levels, "noindex.mpg": levels, "trimmed.mp4": levels[:101], "padded.mp4": levels[:140]}
    for name, of_video in (files | {"other.mp4": levels[:50]}).items():
        frames = of_video[:, None, None, None] * np.ones((16, 16, 3), np.uint8)
        write_video(root / name, frames, rate=25, **kinds[Path(name).suffix])
    rows = ["a,whole,30,40,train", "a,whole,100,110,train", "a,noindex,30,40,train", "a,trimmed,50,60,train"]
    rows += ["a,padded,50,60,train", "a,other,3,13,val", "a,whole,200,210,train"]
    (tmp_path / "a.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
    options = Kinetics(str(root), (str(tmp_path / "a.csv"),), str(tmp_path / "out"), resolution=16, crf=0)
    prepared = prepare(options)
    reason = "is 120 seconds long: over before second 200, and longer than the clip"
    assert prepared.refused == (("whole_000200_000210", reason),)
    dataset = prepared.dataset
    found = {
        name: decode_clip(example["h264"], 0, Clip(int(example["frames"])))
        for name, example in zip(dataset.train.names, dataset.train, strict=True)
    }
    wanted = {"whole_000030_000040": levels[300:400], "whole_000100_000110": levels[1000:1100]}
    wanted |= {"noindex_000030_000040": levels[300:400], "trimmed_000050_000060": levels[:101]}
    wanted["padded_000050_000060"] = levels[:140]
    assert found.keys() == wanted.keys()
    for name, of_clip in wanted.items():
        np.testing.assert_allclose(found[name].mean(axis=(1, 2, 3)), of_clip, atol=1.5, err_msg=name)  # by YUV


def test_links_to_nothing_are_not_there(tmp_path):
    root = tmp_path / "videos"
    rows = [f"a,id{i},0,10,{'val' if i == 3 else 'train'}" for i in range(4)]
    for i in range(4):
        file = root / f"id{i}_000000_000010.mp4"
        write_video(file, noise(20, 16, 16, seed=i))
        if i == 1:
            file.unlink()
            file.symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "a.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
    prepared = prepare(Kinetics(str(root), (str(tmp_path / "a.csv"),), str(tmp_path / "out"), resolution=16))
    assert prepared.refused == (("id1_000000_000010", "is not there"),)
    assert len(prepared.dataset.train) == 2


def test_one_image_that_cannot_be_read_is_left_out(imagenet, tmp_path):
    _, files, broken = imagenet
    good = {name: content for name, content in files.items() if name not in broken}
    root = tmp_path / "images"
    write_folders(root, good)
    gone, loop = sorted(good)[:2]
    (root / gone).unlink()
    (root / gone).symlink_to(tmp_path / "gone.JPEG")
    (root / loop).unlink()
    (root / loop).symlink_to(root / loop)
    prepared = prepare(ImageNet(str(root), str(tmp_path / "out"), resolution=32))
    refused = dict(prepared.refused)
    assert refused.keys() == {gone, loop}
    assert refused[gone] == "is a link to nothing"
    assert "symbolic links" in refused[loop]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "train" / "locked").mkdir(parents=True)
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"the folder .*locked cannot be listed \(Permission denied\): allow it"):
        find_files(tmp_path, (".png",))


def test_what_another_encoder_began_is_not_gone_on_with(imagenet, prepared_imagenet, tmp_path, monkeypatch):
    """The same files are to give the same bytes in all shards. What is whole is opened by any."""
    options, prepared = prepared_imagenet
    out = tmp_path / "out"
    shutil.copytree(options.out, out)
    monkeypatch.setattr("ulx.data.imagenet.image_encoder", lambda: "Pillow 0")
    options = replace(options, out=str(out))
    assert prepare(options).dataset.fingerprint == prepared.dataset.fingerprint
    (out / "manifest.json").unlink()
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        ValueError, match=r"was begun with Pillow [\d.]+, and this is Pillow 0, .* install that to go on"
    ):
        prepare(options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    recipe = json.loads((out / "recipe.json").read_text())
    del recipe["compressed_by"]  # as it was written once
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert prepare(options).dataset.fingerprint == prepared.dataset.fingerprint


def test_a_fault_of_the_machine_is_not_the_image_s(imagenet, tmp_path, monkeypatch):
    """It ends the preparation, which can be given again; nothing is put down as damaged."""
    _, files, broken = imagenet
    root = tmp_path / "images"
    write_folders(root, {name: content for name, content in files.items() if name not in broken})
    options = ImageNet(str(root), str(tmp_path / "out"), resolution=32)
    whole = Path.read_bytes
    for number in (errno.EMFILE, errno.ENOENT):

        def read_bytes(path, number=number):
            if path.suffix == ".JPEG":
                raise OSError(number, os.strerror(number), str(path))
            return whole(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", read_bytes)
            with pytest.raises(OSError, match=r"Too many open files|No such file"):
                prepare(options)
    assert prepare(options).refused == ()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["label,youtube_id,time_start,split"], "has no column time_end"),
        (["label,youtube_id,time_start,time_end,split", "a,b,2,2,train"], "line 2 ends at second 2, and begins at 2"),
        (["label,youtube_id,time_start,time_end,split", "a,b,1,inf,train"], "line 2 is no row of annotations"),
        (
            ["label,youtube_id,time_start,time_end,split", "a,b,1,2,train", "a,b,1,2,train", "a,b,1,2,val"],
            "has b_000001_000002 as 'a' in the split 'val', and another row as 'a' in 'train': keep one",
        ),
        (["label,youtube_id,time_start,time_end,split", "a,b,1,x,train"], r"line 2 is no row of annotations .*x"),
        (["label,youtube_id,time_start,time_end,split", ",b,1,2,train"], "line 2 has no label"),
        (["label,youtube_id,time_start,time_end,split", "a,b,1,2,holdout"], r"line 2 has the split 'holdout'"),
        (["label,youtube_id,time_start,time_end,split", "a,b,1,2"], "line 2 is no row of annotations"),
        (["label,youtube_id,time_start,time_end,split", "a,b,1,2,val"], "have no train clips"),
        (
            ["label,youtube_id,time_start,time_end,split", "a,b,1,2,train", "a,c,1,2,val"],
            "not one of the 1 train clips",
        ),
    ],
)
def test_annotations_that_are_none(tmp_path, lines, message):
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        prepare(Kinetics(str(tmp_path), (str(tmp_path / "a.csv"),), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_without_held_out_rows_videos_are_held_out_and_clips_of_one_stay_together(tmp_path):
    video = package_videos()["carphone_pristine"].read_bytes()
    lines = ["label,youtube_id,time_start,time_end,split"]
    for index in range(40):
        for start in (0, 20):
            (tmp_path / f"id{index}_{start:06d}_{start + 10:06d}.mp4").write_bytes(video if index < 20 else b"")
            lines.append(f"a,id{index},{start},{start + 10},train")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    options = Kinetics(str(tmp_path), (str(tmp_path / "a.csv"),), str(tmp_path / "out"), resolution=16)
    dataset = prepare(options).dataset
    ids = [{name.split("_")[0] for name in split.names} for split in (dataset.train, dataset.validation)]
    assert not ids[0] & ids[1]
    assert len(ids[1]) >= 1
    assert len(dataset.train) + len(dataset.validation) == 40


def test_a_folder_that_is_no_imagenet(tmp_path, imagenet):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        prepare(ImageNet(str(tmp_path / "nowhere"), str(tmp_path / "out")))
    (tmp_path / "cats").mkdir()
    for name in ("cats/a.png", "cats/b.png", "cats/c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"is no ImageNet: it has neither train/ and val/"):
        prepare(ImageNet(str(tmp_path), str(tmp_path / "out")))
    root, _, _ = imagenet
    train = (root / "tar" / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(train)
    with pytest.raises(FileNotFoundError, match=r"no ILSVRC2012_img_val\.tar"):
        prepare(ImageNet(str(tmp_path), str(tmp_path / "out")))
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        (tmp_path / name).write_bytes((root / "tar" / name).read_bytes())
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(train[: len(train) // 2])
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_train.tar.* damaged"):
        prepare(ImageNet(str(tmp_path), str(tmp_path / "out")))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(train)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no kit")
    with pytest.raises(ValueError, match="cannot be read as ImageNet's development kit"):
        prepare(ImageNet(str(tmp_path), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_workers_must_be_some(imagenet, tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1"):
        prepare(ImageNet(str(imagenet[0] / "folders"), str(tmp_path), workers=0))
