"""Captions of images in folders and of prepared ones."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from captioned_pictures import (
    COUNT,
    ODD,
    WRITERS,
    caption,
    check_pairs,
    color,
    name_of,
    one_warning,
    opened,
    rows_of,
    save,
    write_csv,
    write_texts,
)
from pictures import text

from ulx.data import DataConfig, open_dataset
from ulx.data.captions import captioned, kinds
from ulx.data.pipeline import train_batches
from ulx.data.prepare import ImageNet, prepare
from ulx.data.source import InMemory, Split, one_class
from ulx.text.encoders import MiniLM


def test_text_files_beside_the_images(photos):
    write_texts(photos)
    (photos / "captions.txt").write_text("of no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = opened(photos, "txt")
    check_pairs(dataset, range(COUNT))
    assert dataset.class_names == ("cats", "dogs")
    plain_dataset = open_dataset(DataConfig("folder", str(photos), resolution=16))
    assert plain_dataset.train.names == dataset.train.names
    assert plain_dataset.train.captions is None
    assert plain_dataset.fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa red balloon", "a red balloon"),
        (b"  a red\nballoon\r\n", "a red balloon"),
        ("\n a red \r\n\r\n\tballoon\u2028 on a string  \n".encode(), "a red balloon on a string"),
        ("ein  Ballon, gr\u00fcn".encode(), "ein  Ballon, gr\u00fcn"),
    ],
    ids=["BOM", "line breaks", "many line breaks", "spaces inside"],
)
def test_a_text_file_is_one_line(photos, content, expected):
    write_texts(photos)
    (photos / "cats" / "01.txt").write_bytes(content)
    dataset = opened(photos, "txt")
    captions = {
        name: words
        for split in (dataset.train, dataset.validation)
        for name, words in zip(split.names, split.captions or (), strict=True)
    }
    assert captions["cats/01.png"] == expected


def test_bad_text_files_are_named_and_counted_or_refused(photos):
    write_texts(photos)
    (photos / "cats" / "01.txt").unlink()
    (photos / "cats" / "02.txt").write_bytes(b"")
    (photos / "cats" / "04.txt").write_bytes(b"\xef\xbb\xbf \n\t\n")
    (photos / "dogs" / "09.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    (photos / "dogs" / "12.txt").unlink()
    (photos / "dogs" / "12.txt").mkdir()
    dataset, message = one_warning(lambda: opened(photos, "txt"))
    assert f"5 of 30 text files in {photos} cannot be used: " in message
    bad = ["cats/01.txt (is not there)", "cats/02.txt (is empty)", "cats/04.txt (is empty)"]
    bad += ["dogs/09.txt (is not UTF-8)", "dogs/12.txt (Is a directory)"]
    assert all(each in message for each in bad)
    assert message.count(".txt (") == 5
    assert message.endswith("They are left out")
    check_pairs(dataset, set(range(COUNT)) - {1, 2, 4, 9, 12})
    with pytest.raises(ValueError, match=r"^5 of 30 text files in .* --data\.on-unreadable skip"):
        opened(photos, "txt", on_unreadable="refuse")


def test_of_many_bad_text_files_the_first_are_named(photos):
    write_texts(photos)
    dataset = opened(photos, "txt")
    for name in [*dataset.train.names[1:], *dataset.validation.names[1:]][:25]:
        (photos / name).with_suffix(".txt").unlink()
    _, message = one_warning(lambda: opened(photos, "txt"))
    assert message.startswith("25 of 30 text files")
    assert message.count("is not there") == 10
    assert " and 15 more. They are left out" in message


def test_more_text_files_than_a_thread_reads_at_once(photos, monkeypatch):
    write_texts(photos)
    monkeypatch.setattr("ulx.data.captions.FILES_AT_ONCE", 4)
    check_pairs(opened(photos, "txt"), range(COUNT))


def test_nothing_left_of_a_split_is_an_error_that_says_why(photos, tmp_path):
    held_out = set(open_dataset(DataConfig("folder", str(photos), resolution=16)).validation.names)
    rows = [[path if path not in held_out else f"photos/{path}", words] for path, words in rows_of()]
    with pytest.raises(
        ValueError, match=rf"^of {len(held_out)} validation examples not one has a caption: .*which is not there"
    ):
        opened(photos, write_csv(tmp_path / "a.csv", rows))
    with pytest.raises(ValueError, match=r"^of \d+ train examples not one has a caption: 30 of 30 text files"):
        opened(photos, "txt")


def test_a_limit_makes_no_row_bad(photos, tmp_path):
    """Rows of images that are left out by it are not those of no image."""
    rows = [*rows_of(), ["cats/99.png", "a cat"], ["notes.txt", "a text"]]
    text(photos / "notes.txt")
    table = write_csv(tmp_path / "a.csv", rows)
    chosen = open_dataset(DataConfig("folder", str(photos), resolution=16, limit=12))
    numbers = {int(Path(name).stem) for name in (*chosen.train.names, *chosen.validation.names)}
    assert len(numbers) == 12
    dataset, message = one_warning(lambda: opened(photos, table, limit=12))
    check_pairs(dataset, numbers)
    assert message == (
        f"2 of 32 rows of {table} cannot be used: row 31 (names 'cats/99.png', which is not there), "
        "row 32 (names 'notes.txt', which is no image of the data set). They are left out"
    )
    write_texts(photos)
    check_pairs(opened(photos, "txt", limit=12), numbers)


@pytest.mark.parametrize("captions", ["txt", "table"])
def test_folders_of_splits(tmp_path, captions):
    root, rows = tmp_path / "split", []
    for number in range(COUNT):
        name = f"{'train' if number % 5 else 'validation'}/{name_of(number)}"
        save(root / name, number)
        (root / name).with_suffix(".txt").write_text(caption(number), encoding="utf-8")
        if number not in (5, 6):
            rows.append([name, caption(number)])
    if captions == "txt":
        dataset, missing = opened(root, "txt"), set()
    else:
        dataset, _ = one_warning(lambda: opened(root, write_csv(tmp_path / "a.csv", rows)))
        missing = {5, 6}
    check_pairs(dataset, set(range(COUNT)) - missing)
    assert {name.split("/")[0] for name in dataset.validation.names} == {"validation"}
    assert len(dataset.validation) == 6 - len(missing & {5})


def test_without_labels(photos):
    write_texts(photos)
    with_labels, without = (opened(photos, "txt", labels=labels) for labels in (True, False))
    assert without.class_names == ("all",)
    assert not without.train.labels.any()
    assert without.train.captions == with_labels.train.captions
    assert without.fingerprint != with_labels.fingerprint
    assert without.train[0]["label"] == 0
    assert with_labels.train.labels.any()


def test_the_same_captions_elsewhere_are_the_same_data_and_others_are_not(photos, tmp_path):
    write_texts(photos)
    first = opened(photos, "txt")
    shutil.copytree(photos, tmp_path / "copied")
    assert opened(tmp_path / "copied", "txt", cache_dir=str(tmp_path / "other")).fingerprint == first.fingerprint
    for split in (first.train, first.validation):
        file = (photos / split.names[-1]).with_suffix(".txt")
        before = file.read_text()
        file.write_text(f"{before}!")
        assert opened(photos, "txt").fingerprint != first.fingerprint
        file.write_text(f"{before}\n")
        assert opened(photos, "txt").fingerprint == first.fingerprint


def test_other_pictures_with_the_same_captions_are_other_data(photos):
    write_texts(photos)
    first = opened(photos, "txt")
    save(photos / name_of(8), COUNT)
    assert opened(photos, "txt").fingerprint != first.fingerprint


def test_two_captions_exchanged_are_other_data(photos, tmp_path):
    rows = rows_of()
    first = opened(photos, write_csv(tmp_path / "a.csv", rows))
    rows[0][1], rows[1][1] = rows[1][1], rows[0][1]
    assert opened(photos, write_csv(tmp_path / "b.csv", rows)).fingerprint != first.fingerprint


@pytest.mark.parametrize(("file", "write"), WRITERS)
def test_prepared_images(tmp_path, file, write):
    root = tmp_path / "imagenet"
    names = {number: f"{'train' if number % 5 else 'val'}/{name_of(number)}" for number in range(COUNT)}
    for number, name in names.items():
        save(root / name, number)
    prepare(ImageNet(str(root), str(tmp_path / "out"), resolution=16))
    shutil.rmtree(root)
    rows = [[names[number], caption(number)] for number in range(COUNT) if number not in (5, 6)]
    table = write(tmp_path / file, [*rows, ["train/cats/99.png", "a cat"], [names[5], ""]])
    dataset, message = one_warning(lambda: opened(tmp_path / "out", table, source="prepared"))
    check_pairs(dataset, set(range(COUNT)) - {5, 6})
    assert message.startswith(
        f"2 of 30 rows of {table} cannot be used: row 29 (names 'train/cats/99.png', which is no image of the data "
        "set), row 30 (has no caption). 2 of 30 images have no caption in "
    )
    limited = open_dataset(DataConfig("prepared", str(tmp_path / "out"), resolution=16, limit=15))
    numbers = {int(Path(name).stem) for name in (*limited.train.names, *limited.validation.names)} - {5, 6}
    dataset, message = one_warning(lambda: opened(tmp_path / "out", table, source="prepared", limit=15))
    check_pairs(dataset, numbers)
    assert message.startswith(f"1 of 30 rows of {table} cannot be used: row 30 (has no caption)")


def test_training_batches_of_what_is_left(photos, tmp_path):
    table = write_csv(tmp_path / "a.csv", rows_of(*range(10)))
    dataset, _ = one_warning(lambda: opened(photos, table))
    batch = next(train_batches(dataset, batch_size=len(dataset.train), seed=0, flip=True))
    seen = {tuple(image[0, 0].tolist()) for image in batch["image"]}
    assert seen == {color(int(Path(name).stem)) for name in dataset.train.names}


def test_kinds_are_the_captions(photos):
    write_texts(photos)
    dataset = opened(photos, "txt")
    assert kinds("folder", dataset.train) == dataset.train.captions
    with pytest.raises(ValueError, match=r"--data\.source folder has no captions: add --data\.captions"):
        kinds("folder", open_dataset(DataConfig("folder", str(photos), resolution=16)).train)


def test_odd_captions_come_through_to_the_text_encoder(photos, tmp_path, minilm_package):
    dataset = opened(photos, write_csv(tmp_path / "a.csv", rows_of()))
    captions = [*(dataset.train.captions or ()), *(dataset.validation.captions or ())]
    assert set(ODD.values()) < set(captions)
    tokens, mask = MiniLM(length=32)(captions)
    assert np.isfinite(tokens).all()
    lengths = dict(zip(captions, mask.sum(axis=1).tolist(), strict=True))
    assert lengths[ODD[5]] == 32  # cut
    assert all(4 <= lengths[ODD[number]] < 32 for number in (3, 4, 6, 7))
    assert len({tokens[row].tobytes() for row in range(COUNT)}) == COUNT


def some_split(captions):
    source = InMemory({"image": np.arange(3, dtype=np.uint8)[:, None]})
    return Split(source, ("a", "b", "c"), np.arange(3, dtype=np.int32), captions)


def test_a_split_has_a_caption_for_each_example():
    with pytest.raises(ValueError, match="needs one for each of its 3 examples, got 2"):
        some_split(("x", "y"))
    chosen = some_split(("x", "y", "z")).chosen([2, 0])
    assert (chosen.names, chosen.captions) == (("c", "a"), ("z", "x"))
    assert [example["image"].tolist() for example in chosen] == [[2], [0]]
    assert chosen.labels.tolist() == [2, 0]
    assert some_split(None).chosen([1]).captions is None


def test_captions_survive_changes_of_the_data_set(small_dataset):
    captions = {name: f"caption of {name}" for name in small_dataset.train.names[2:]}
    dataset = captioned(small_dataset, captions)
    assert dataset.train.captions == tuple(captions.values())
    assert dataset.validation.names == tuple(name for name in small_dataset.validation.names if name in captions)
    for changed in (one_class(dataset), dataset.mapped(lambda source: source)):
        assert changed.train.captions == dataset.train.captions
        assert changed.validation.captions == dataset.validation.captions
    with pytest.raises(ValueError, match=r"^of 12 train examples not one has a caption$"):
        captioned(small_dataset, {})
