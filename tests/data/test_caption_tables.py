"""Captions by tables: csv, tsv and parquet."""

import csv
import warnings

import pytest
from captioned_pictures import (
    COUNT,
    ODD,
    WRITERS,
    caption,
    check_pairs,
    name_of,
    one_warning,
    opened,
    rows_of,
    write_csv,
    write_parquet,
    write_texts,
)
from pictures import text

from ulx.data.caption_table import read_table


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
