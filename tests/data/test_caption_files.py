"""Captions of images in folders and of prepared ones, by text files and by tables.

Every picture is of one colour, told by its number, and so is every caption: which belongs to which is seen in pixels.
"""

import csv
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from pictures import plain, text

from ulx.data import DataConfig, open_dataset
from ulx.data.caption_table import read_table
from ulx.data.captions import captioned, kinds
from ulx.data.extras import optional
from ulx.data.pipeline import train_batches
from ulx.data.prepare import ImageNet, prepare
from ulx.data.source import InMemory, Split, one_class
from ulx.text.encoders import MiniLM
from ulx.text.wordpiece import INSTALL, PACKAGE

COUNT = 30
ODD = {  # captions that come through as they are
    3: "赤い風船を持つ子供",
    4: "👩🏽‍🔬 a woman scientist 🏳️‍🌈",
    5: "a very long caption " * 10_000 + "ends",  # 200,004 characters, more than csv takes by itself
    6: 'she said "no", and left; 5" tall',
    7: "قطة سوداء",
}


def color(number):
    return (7 * number, 255 - 7 * number, 50 + number)


def caption(number):
    return ODD.get(number, f"colour {number}")


def name_of(number):
    return f"{'cats' if number % 3 else 'dogs'}/{number:02d}.png"


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for number in range(COUNT):
        save(root / name_of(number), number)
    return root


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    plain(color(number), (20, 16)).save(path)


def write_texts(root):
    for number in range(COUNT):
        (root / name_of(number)).with_suffix(".txt").write_text(caption(number), encoding="utf-8")


def rows_of(*left_out):
    """Rows in no order, as a table has them."""
    return [[name_of(number), caption(number)] for number in reversed(range(COUNT)) if number not in left_out]


def write_csv(path, rows, header=("path", "caption")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",").writerows([header, *rows])
    return path


def write_parquet(path, rows, header=("path", "caption"), kind=None):
    """`kind` is the type of both columns, or "dictionary" of texts."""
    arrow, parquet = (optional(module, extra="parquet") for module in ("pyarrow", "pyarrow.parquet"))
    columns = [arrow.array(column) for column in zip(*rows, strict=True)]
    if kind == "dictionary":
        columns = [column.dictionary_encode() for column in columns]
    elif kind is not None:
        columns = [column.cast(kind) for column in columns]
    parquet.write_table(arrow.table(columns, list(header)), path, row_group_size=7)
    return path


WRITERS = [("captions.csv", write_csv), ("captions.TSV", write_csv), ("captions.parquet", write_parquet)]


def opened(root, captions, **options):
    config = {"source": "folder", "path": str(root), "resolution": 16, "captions": str(captions)}
    return open_dataset(DataConfig(**config | options))


def check_pairs(dataset, numbers):
    """That just those pictures are there, in order, and each with its own name, label and caption, by its pixels."""
    seen = []
    for split in (dataset.train, dataset.validation):
        assert len(split) == len(split.captions) == len(split.labels) > 0
        for name, label, words, example in zip(split.names, split.labels, split.captions, split, strict=True):
            (number,) = (number for number in range(COUNT) if (example["image"] == color(number)).all())
            assert words == caption(number)
            assert Path(name).stem == f"{number:02d}"
            assert label == example["label"]
            seen.append(number)
        assert list(split.names) == sorted(split.names)
    assert sorted(seen) == sorted(numbers)


def one_warning(open_it):
    with pytest.warns(UserWarning, match="left out") as caught:
        dataset = open_it()
    (warning,) = caught
    return dataset, str(warning.message)


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


@pytest.mark.parametrize(("file", "write"), WRITERS)
def test_tables(photos, tmp_path, file, write):
    table = write(tmp_path / file, rows_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = opened(photos, table)
    check_pairs(dataset, range(COUNT))
    # Wherever the captions stand, they are the same.
    write_texts(photos)
    assert opened(photos, "txt").fingerprint == dataset.fingerprint


def test_other_columns_a_bom_and_the_order_of_columns(photos, tmp_path):
    rows = [[words, f"{i}", path, "x, y"] for i, (path, words) in enumerate(rows_of())]
    table = write_csv(tmp_path / "a.csv", rows, header=("caption", "", " path ", "note"))
    # Blank lines are no rows.
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\n\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pairs(opened(photos, table), range(COUNT))
        table = write_parquet(tmp_path / "a.parquet", rows, header=("caption", "", "path", "note"))
        check_pairs(opened(photos, table), range(COUNT))


BAD = [
    # path, caption, the reason
    ("", "a cat", "has no path"),
    ("  ", "a cat", "has no path"),
    ("cats/01.png", "", "has no caption"),
    ("cats/02.png", " \n ", "has no caption"),
    ("cats/04.png", "colour 4 again", "names 'cats/04.png' again"),
    ("./cats//04.png", "and again", "names 'cats/04.png' again"),
    ("cats/99.png", "a cat", "names 'cats/99.png', which is not there"),
    ("notes.txt", "a text", "names 'notes.txt', which is no image of the data set"),
    ("cats/broken.png", "broken", "names 'cats/broken.png', which is no image of the data set"),
    ("cats", "cats", "names 'cats', which is not there"),
]


@pytest.mark.parametrize(("file", "write"), WRITERS)
def test_bad_rows_are_named_and_counted_or_refused(photos, tmp_path, file, write):
    text(photos / "notes.txt")
    text(photos / "cats" / "broken.png")
    good = rows_of(1, 2, 8)
    table = write(tmp_path / file, [*good, *([path, words] for path, words, _ in BAD)])
    with pytest.warns(UserWarning, match="left out") as caught:
        dataset = opened(photos, table)
    of_images, of_captions = (str(warning.message) for warning in caught)
    assert of_images.startswith("1 of 31 files in")
    bad = ", ".join(f"row {number} ({reason})" for number, (_, _, reason) in enumerate(BAD, len(good) + 1))
    assert of_captions == (
        f"10 of 37 rows of {table} cannot be used: {bad}. 3 of 30 images have no caption in {table}. They are left out"
    )
    check_pairs(dataset, set(range(COUNT)) - {1, 2, 8})
    (photos / "cats" / "broken.png").unlink()
    with pytest.raises(ValueError, match=r"^10 of 37 rows of .* --data\.on-unreadable skip"):
        opened(photos, table, on_unreadable="refuse")


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_in_a_parquet_column(photos, tmp_path, value):
    rows = [*rows_of(1, 2), [name_of(1), value], [value, "a cat"]]
    dataset, message = one_warning(lambda: opened(photos, write_parquet(tmp_path / "a.parquet", rows)))
    assert message.startswith("2 of 30 rows")
    assert "cannot be used: row 29 (has no caption), row 30 (has no path). 2 of 30 images have no caption" in message
    check_pairs(dataset, set(range(COUNT)) - {1, 2})


def damaged_csv(path):
    """Of its 31 rows the third, sixth to eighth, and last are bad."""
    lines = [f"{name_of(number)},colour {number}".encode() for number in range(8, COUNT)]
    lines[2] += b", and green"
    lines[5:5] = [
        "cats/01.png,gr\u00fcn".encode("latin-1"),
        b"cats/02.png",
        b'cats/04.png,"a "cat" sleeps"',
    ]
    quoted = {number: caption(number).replace('"', '""') for number in (0, 3, 5, 6, 7)}
    lines += [f'{name_of(number)},"{words}"'.encode() for number, words in quoted.items()]
    lines += [b'dogs/12.png,"colour 12 to the end of the file']
    path.write_bytes(b"\n".join([b"path,caption", *lines, b""]))
    return path


def test_damaged_rows_of_a_csv_cost_no_other_row(photos, tmp_path):
    table = damaged_csv(tmp_path / "a.csv")
    limit_before = csv.field_size_limit(12_345)
    try:
        dataset, message = one_warning(lambda: opened(photos, table))
        assert csv.field_size_limit() == 12_345  # it is the whole process's
    finally:
        csv.field_size_limit(limit_before)
    assert message == (
        f"5 of 31 rows of {table} cannot be used: row 3 (has 3 fields, not 2), row 6 (is not UTF-8), "
        "row 7 (has 1 field, not 2), row 8 (is no row (',' expected after '\"')), "
        f"row 31 (is no row (unexpected end of data)). 4 of 30 images have no caption in {table}. They are left out"
    )
    check_pairs(dataset, set(range(COUNT)) - {1, 2, 4, 10})


def test_bytes_in_parquet_that_are_no_utf8(photos, tmp_path):
    rows = [[path.encode(), words.encode()] for path, words in rows_of(9)]
    rows.insert(5, [b"dogs/09.png", "gr\u00fcn".encode("latin-1")])
    table = write_parquet(tmp_path / "a.parquet", rows)
    dataset, message = one_warning(lambda: opened(photos, table))
    assert f"1 of 30 rows of {table} cannot be used: row 6 (is not UTF-8). 1 of 30 images" in message
    check_pairs(dataset, set(range(COUNT)) - {9})


@pytest.mark.parametrize("kind", ["large_string", "binary", "dictionary"])
def test_other_text_of_parquet(photos, tmp_path, kind):
    check_pairs(opened(photos, write_parquet(tmp_path / "a.parquet", rows_of(), kind=kind)), range(COUNT))


def test_a_path_too_long_for_a_file_is_one_that_is_not_there(photos, tmp_path):
    """As where the columns are named the wrong way round."""
    table = write_csv(tmp_path / "a.csv", [*rows_of(1), [ODD[5], name_of(1)], ["a\0b", "null"]])
    _, message = one_warning(lambda: opened(photos, table))
    assert message.startswith(f"2 of 31 rows of {table} cannot be used: row 30 (names 'a very long caption")
    assert message.count("which is not there") == 2
    assert len(message) < 600


@pytest.mark.parametrize(
    ("file", "write", "header", "message"),
    [
        (*WRITERS[0], ("file", "caption"), r"has no column 'path': its columns are 'file', 'caption'$"),
        (*WRITERS[1], ("path", "text"), r"has no column 'caption': its columns are 'path', 'text'$"),
        (*WRITERS[2], ("a", "b"), r"has no column 'path' and no 'caption': its columns are 'a', 'b'$"),
    ],
)
def test_missing_columns(photos, tmp_path, file, write, header, message):
    table = write(tmp_path / file, rows_of(), header=header)
    with pytest.raises(ValueError, match=message):
        opened(photos, table)
    assert not (tmp_path / "cache").exists()  # before any image was read


def write_semicolons(path):
    path.write_text("path;caption\na.png;a cat\n")


def write_nothing(path):
    path.write_bytes(b"")


def write_utf16(path):
    path.write_text("path,caption\n", encoding="utf-16")


def write_open_quote(path):
    path.write_text('"path,caption\n')


def write_numbers(path):
    write_parquet(path, [[name_of(1), 1], [name_of(2), 2]])


def write_text(path):
    path.write_text("path,caption\na.png,a cat\n" * 10)


@pytest.mark.parametrize(
    ("file", "write", "message"),
    [
        ("a.csv", write_semicolons, r"its columns are 'path;caption'$"),
        ("a.csv", write_nothing, "its columns are none$"),
        ("a.csv", write_utf16, r"has no column 'path' and no 'caption'"),
        ("a.csv", write_open_quote, r"the first line of .*a\.csv is no header \(unexpected end of data\)"),
        ("a.parquet", write_numbers, r"the column caption of .*a\.parquet holds int64, and text is wanted"),
        ("a.parquet", write_text, r"a\.parquet cannot be read as Parquet \("),
        ("a.parquet", write_nothing, r"a\.parquet cannot be read as Parquet \("),
        ("a.json", write_text, r"a\.json is no table of captions: it ends in none of \.csv \.tsv \.parquet"),
    ],
)
def test_files_that_are_no_tables(tmp_path, file, write, message):
    write(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / file)


def test_a_table_that_is_not_there(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.csv is no file: --data\.captions wants a table"):
        opened(photos, tmp_path / "a.csv")
    assert not (tmp_path / "cache").exists()


def test_images_without_a_row_are_counted_and_never_refused(photos, tmp_path):
    table = write_csv(tmp_path / "a.csv", rows_of(1, 2, 3, 4))
    dataset, message = one_warning(lambda: opened(photos, table, on_unreadable="refuse"))
    assert message == f"4 of 30 images have no caption in {table}. They are left out"
    check_pairs(dataset, set(range(COUNT)) - {1, 2, 3, 4})


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


def test_odd_captions_come_through_to_the_text_encoder(photos, tmp_path):
    if find_spec(PACKAGE) is None:
        pytest.skip(f"pip install {INSTALL}")
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
