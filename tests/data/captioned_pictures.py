"""Pictures with captions, in text files or in tables.

Every picture is of one colour, told by its number, and so is every caption: which belongs to which is seen in pixels.
"""

import csv
from pathlib import Path

import pytest
from pictures import plain

from ulx.data import DataConfig, open_dataset
from ulx.data.extras import optional

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
