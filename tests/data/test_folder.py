import dataclasses
import os
import shutil
import warnings

import numpy as np
import pytest
from pictures import BLUE, DAMAGES, GREEN, RED, photo, plain, text
from PIL import Image
from video_files import noise, write_video

from ulx.data import DataConfig, open_dataset
from ulx.data.folder import open_folder
from ulx.data.image import center_crop, find_images, read_image
from ulx.data.pipeline import train_batches
from ulx.data.split import held_out
from ulx.data.video import Clip, ShortError
from ulx.data.video import frames as frames_of


@pytest.fixture
def photos(tmp_path):
    """30 photos of 40×50 in two classes."""
    root = tmp_path / "photos"
    for i in range(30):
        path = root / ("cats" if i % 3 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(40, 50, seed=i).save(path)
    return root


def test_a_folder_of_classes(photos):
    dataset = open_folder(photos, 32)
    assert dataset.class_names == ("cats", "dogs")
    names = [*dataset.train.names, *dataset.validation.names]
    assert (
        sorted(names) == find_images(photos) == sorted(f"{'cats' if i % 3 else 'dogs'}/{i:02d}.png" for i in range(30))
    )
    assert [held_out(name) for name in names] == [False] * len(dataset.train) + [True] * len(dataset.validation)
    for split in (dataset.train, dataset.validation):
        assert len(split) > 0
        for name, label, example in zip(split.names, split.labels, split, strict=True):
            assert dataset.class_names[label] == name.split("/")[0]
            assert example["label"] == label
            np.testing.assert_array_equal(example["image"], read_image(photos / name, 32)[0])


def test_images_without_classes(tmp_path):
    for i in range(12):
        photo(32, 32, seed=i).save(tmp_path / f"{i}.png")
    dataset = open_folder(tmp_path, 32)
    assert dataset.class_names == ("all",)
    assert len(dataset.train) + len(dataset.validation) == 12
    assert set(dataset.train.labels) == {0}


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_the_folders_own_splits_are_used(photos, tmp_path, name):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    shutil.copytree(photos / "dogs", root / name / "dogs")
    dataset = open_folder(root, 32)
    assert dataset.class_names == ("cats", "dogs")
    assert (len(dataset.train), len(dataset.validation)) == (30, 10)
    assert {name.split("/")[0] for name in dataset.validation.names} == {name}
    assert set(dataset.validation.labels) == {1}


def test_train_alone_is_held_out_from_and_is_no_class(photos, tmp_path):
    shutil.move(photos, tmp_path / "root" / "train")
    dataset = open_folder(tmp_path / "root", 32)
    assert dataset.class_names == ("cats", "dogs")
    assert len(dataset.train) + len(dataset.validation) == 30


def test_deeper_folders_hidden_files_and_other_files(photos):
    (photos / "cats" / "more").mkdir()
    shutil.move(photos / "cats" / "01.png", photos / "cats" / "more" / "01.PNG")
    (photos / "cats" / ".DS_Store").write_bytes(b"x")
    (photos / "cats" / "._02.png").write_bytes(b"x")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails" / "a.png").write_bytes(b"x")
    (photos / "captions.txt").write_text("none of this is an image")
    (photos / "cats" / "loop").symlink_to(photos)
    names = find_images(photos)
    assert len(names) == 30
    assert "cats/more/01.PNG" in names
    assert open_folder(photos, 32).class_names == ("cats", "dogs")


def test_a_linked_class_is_followed(photos, tmp_path):
    shutil.move(photos / "dogs", tmp_path / "elsewhere")
    (photos / "dogs").symlink_to(tmp_path / "elsewhere")
    assert open_folder(photos, 32).class_counts().keys() == {"cats", "dogs"}
    assert len(find_images(photos)) == 30
    # By another name it would be trained on and held out at once.
    before = find_images(photos)
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    assert find_images(photos) == before


def test_unreadable_files_are_named_counted_and_skipped_or_refused(photos):
    for i, damage in enumerate(DAMAGES):
        damage(photos / "cats" / f"bad{i}.png")
    with pytest.warns(UserWarning, match="left out") as caught:
        dataset = open_folder(photos, 32)
    (message,) = (str(warning.message) for warning in caught)
    assert "6 of 36 files in" in message
    assert all(f"cats/bad{i}.png" in message for i in range(6))
    assert "cats/bad1.png (is empty)" in message
    assert len(dataset.train) + len(dataset.validation) == 30
    assert not any("bad" in name for name in [*dataset.train.names, *dataset.validation.names])

    with pytest.raises(ValueError, match=r"6 of 36 files .*bad0\.png .*--data\.on-unreadable skip"):
        open_folder(photos, 32, on_unreadable="refuse")
    with pytest.warns(UserWarning, match="6 of 36"):  # said again by the run that finds them in the cache
        assert open_folder(photos, 32).fingerprint == dataset.fingerprint


def test_links_to_nothing_are_unreadable(photos):
    (photos / "cats" / "gone.png").symlink_to("nowhere.png")
    with pytest.warns(UserWarning, match=r"1 of 31 files .* cats/gone\.png \(is a link to nothing\)"):
        dataset = open_folder(photos, 32)
    assert len(dataset.train) + len(dataset.validation) == 30
    shutil.copy(photos / "cats" / "01.png", photos / "cats" / "nowhere.png")
    mended = open_folder(photos, 32)
    assert len(mended.train) + len(mended.validation) == 32


def test_of_many_unreadable_files_the_first_are_named(photos):
    for i in range(25):
        text(photos / "dogs" / f"bad{i:02d}.png")
    with pytest.warns(UserWarning, match=r"^25 of 55 .*bad09\.png .* and 15 more"):
        open_folder(photos, 32)


def test_nothing_readable_is_an_error(tmp_path):
    for i in range(4):
        text(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"4 of 4 files in .* Nothing is left for train"):
        open_folder(tmp_path, 32)


def test_small_images_are_enlarged_with_a_warning(photos):
    plain(BLUE, (20, 400)).save(photos / "dogs" / "narrow.png")
    plain(BLUE, (31, 31)).save(photos / "dogs" / "tiny.png")
    with pytest.warns(
        UserWarning, match=r"^2 of 32 images .* smaller than 32 pixels .*narrow\.png.*tiny\.png"
    ) as caught:
        dataset = open_folder(photos, 32)
    assert len(caught) == 1
    examples = dict(zip(dataset.train.names, dataset.train, strict=True))
    examples |= dict(zip(dataset.validation.names, dataset.validation, strict=True))
    assert (examples["dogs/tiny.png"]["image"] == BLUE).all()


def test_good_images_bring_no_warning(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_folder(photos, 32)


def write_nothing(root):
    (root / "notes.txt").write_text("no image here")


def write_loose(root):
    (root / "cats").mkdir()
    for name in ("cats/a.png", "cats/b.png", "loose.png"):
        plain(RED).save(root / name)


def write_one(root):
    plain(RED).save(root / "only.png")


def write_two_validations(root):
    for name in ("train", "val", "validation"):
        (root / name).mkdir()
        plain(RED).save(root / name / "a.png")


def write_train_and_test(root):
    for name in ("train", "test", "dev"):
        for which in ("cats", "dogs"):
            (root / name / which).mkdir(parents=True)
            for index in range(4):
                plain(RED).save(root / name / which / f"{index}.png")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, r"no images in .*looked for \.png \.jpg"),
        (write_loose, r"class folders \(such as cats/a\.png\) and 1 beside them \(such as loose\.png\)"),
        (write_one, "holds 1 image: at least 3 are needed, one to train on, 2 to validate"),
        (write_two_validations, r"has val/ and validation/: keep one"),
        (write_train_and_test, r"has train/ and dev/, test/ and no validation/: give what is to be measured on that"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_serve(tmp_path, write, message):
    (tmp_path / "root").mkdir()
    write(tmp_path / "root")
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / "root", 32)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing is no folder: give the one .* images \(--data\.path\)"):
        open_folder(tmp_path / "missing", 32)
    text(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"file is no folder: give the one that holds the images"):
        open_folder(tmp_path / "file", 32)


@pytest.mark.parametrize("held", [True, False])
def test_few_files_still_have_both_splits(tmp_path, held):
    """Also when the hash would hold out all of them, or none."""
    names = [name for name in (f"{i}.png" for i in range(1000)) if held_out(name) == held][:3]
    for name in names:
        plain(RED).save(tmp_path / name)
    dataset = open_folder(tmp_path, 32)
    assert (len(dataset.train), len(dataset.validation)) == (1, 2)
    assert sorted([*dataset.train.names, *dataset.validation.names]) == sorted(names)


def test_a_folder_that_moved_is_the_same_data(photos, tmp_path):
    first = open_folder(photos, 32)
    shutil.copytree(photos, tmp_path / "copied")
    assert open_folder(tmp_path / "copied", 32).fingerprint == first.fingerprint


def test_a_changed_file_is_read_again(photos):
    """Known by its size or by its time alone: a bitmap of another colour is as long as before."""
    first = open_folder(photos, 32)
    assert open_folder(photos, 32).fingerprint == first.fingerprint
    changed, fingerprints = photos / first.train.names[0], {first.fingerprint}
    for color, later in [(GREEN, 0), (BLUE, 1)]:
        before = changed.stat()
        plain(color).save(changed, "BMP")
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + later))
        assert (changed.stat().st_size == before.st_size) == bool(later)
        dataset = open_folder(photos, 32)
        assert (dataset.train[0]["image"] == color).all()
        fingerprints.add(dataset.fingerprint)
    assert len(fingerprints) == 3


def test_a_limit(photos):
    dataset = open_folder(photos, 32, limit=10)
    assert len(dataset.train) + len(dataset.validation) == 10
    assert dataset.class_names == ("cats", "dogs")
    assert open_folder(photos, 32, limit=10).train.names == dataset.train.names


@pytest.fixture
def videos(tmp_path):
    """12 videos of two classes, in several formats, of 9 frames; one is too short and one is torn."""
    root = tmp_path / "videos"
    for index in range(12):
        suffix = (".mp4", ".webm", ".mkv", ".gif")[index % 4]
        coarse = noise(5 if index == 5 else 9, 6, 10, seed=index) // 2 + np.uint8(10 * index)
        frames = coarse.repeat(4, axis=1).repeat(4, axis=2)
        path = root / ("cats" if index % 3 else "dogs") / f"{index:02d}{suffix}"
        if suffix == ".gif":
            path.parent.mkdir(parents=True, exist_ok=True)
            first, *rest = map(Image.fromarray, frames)
            first.save(path, save_all=True, append_images=rest)
        else:
            write_video(path, frames)
    torn = root / "cats" / "08.mp4"
    torn.write_bytes(torn.read_bytes()[:300])
    return root


def test_a_folder_of_videos_is_one_of_clips(videos):
    (videos / "cats" / "bad.gif").write_bytes(b"GIF")
    (videos / "dogs" / "gone.mp4").symlink_to("nowhere.mp4")
    config = DataConfig("folder", str(videos), resolution=16, clips=True, frames=4, stride=2)
    with pytest.warns(UserWarning, match="4 of 14 files in .* cannot be read as videos") as warned:
        dataset = open_dataset(config)
    message = str(warned[0].message)
    assert "cats/05.webm (has 5 frames, and at least 7 are wanted)" in message
    assert "cats/08.mp4 (" in message
    assert "cats/bad.gif (is no image that Pillow knows)" in message
    assert "dogs/gone.mp4 (is a link to nothing)" in message
    assert dataset.class_names == ("cats", "dogs")
    assert len(dataset.train) + len(dataset.validation) == 10
    assert len(dataset.validation) >= 1
    for split in (dataset.train, dataset.validation):
        for name, example in zip(split.names, split, strict=True):
            assert dataset.class_names[example["label"]] == name.split("/")[0]
            whole = np.stack([center_crop(Image.fromarray(frame), 16) for frame in frames_of(videos / name)])
            # H.264 of noise: 30 dB and more; frames of other times or videos are 20 levels and more away.
            error = np.mean((example["image"].astype(float) - whole[:7:2]) ** 2)
            assert 10 * np.log10(255**2 / error) > 28
    batch = next(train_batches(dataset, batch_size=4, seed=0, flip=True))
    assert batch["image"].shape == (4, 4, 16, 16, 3)
    longer = open_dataset(config, frames=5)
    assert longer.fingerprint == dataset.fingerprint
    np.testing.assert_array_equal(longer.train[0]["image"][:4], dataset.train[0]["image"])
    assert longer.train[0]["image"].shape == (5, 16, 16, 3)
    with pytest.raises(ShortError, match="has 9 frames, and 11 are wanted"):
        open_dataset(config, frames=6).train[0]
    with pytest.raises(ValueError, match=r"cannot be read as videos: .*--data\.on-unreadable skip"):
        open_dataset(dataclasses.replace(config, on_unreadable="refuse"))


def test_a_folder_without_videos(photos):
    with pytest.raises(ValueError, match=r"no videos in .* \(looked for \.mp4"):
        open_folder(photos, 32, clip=Clip())
