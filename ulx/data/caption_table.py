"""Tables of captions: CSV and TSV, in UTF-8, or Parquet (extra `parquet`), with the columns `path` and `caption`.

Other columns do no harm. A row that cannot be read costs no other one.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ulx.data.extras import optional

__all__ = ["COLUMNS", "SUFFIXES", "Row", "read_table"]

SUFFIXES = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "caption")
NOT_UTF8 = "is not UTF-8"

Row = tuple[str, str] | str
"""Path and caption as they are written, "" where there is none; or why the row cannot be read."""


def read_table(file: Path) -> list[Row]:
    """Its rows in their order, without the header; blank lines are none.

    Raises `FileNotFoundError`; `ValueError` for a file that is no such table, naming the columns that it has;
    `ModuleNotFoundError` for a Parquet file without pyarrow.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: --data.captions wants a table ({' '.join(SUFFIXES)})")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{file} is no table of captions: it ends in none of {' '.join(SUFFIXES)}")
    return _of_parquet(file) if suffix == ".parquet" else _of_csv(file, "\t" if suffix == ".tsv" else ",")


def _of_csv(file: Path, delimiter: str) -> list[Row]:
    # Bytes that are no UTF-8 become lone surrogates, which are none either: the row that has them can be told.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened, _long_fields():
        # Strict: else a quotation mark that is not closed takes in all rows up to the next one, unnoticed.
        reader = csv.reader(opened, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise ValueError(f"the first line of {file} is no header ({error})") from error
        _check_columns(file, header)
        places = [header.index(column) for column in COLUMNS]
        rows: list[Row] = []
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return rows
            except csv.Error as error:
                rows.append(f"is no row ({error})")
                continue
            if fields:
                rows.append(_row(fields, len(header), places))


def _row(fields: Sequence[str], count: int, places: Sequence[int]) -> Row:
    if len(fields) != count:
        return f"has {len(fields)} field{'s' * (len(fields) != 1)}, not {count}"
    path, caption = (fields[place] for place in places)
    try:
        f"{path}{caption}".encode()
    except UnicodeEncodeError:
        return NOT_UTF8
    return path, caption


@contextmanager
def _long_fields() -> Iterator[None]:
    """Without the limit of 131,072 characters that a field has, which is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _of_parquet(file: Path) -> list[Row]:
    arrow, parquet = (optional(name, extra="parquet") for name in ("pyarrow", "pyarrow.parquet"))
    rows: list[Row] = []
    try:
        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            _check_columns(file, schema.names)
            for column in COLUMNS:
                if not _is_text(arrow, kind := schema.field(column).type):
                    raise ValueError(f"the column {column} of {file} holds {kind}, and text is wanted")
            for batch in table.iter_batches(columns=list(COLUMNS)):
                paths, captions = (_bytes(arrow, batch.column(column)) for column in COLUMNS)
                rows += map(_decoded, paths, captions)
    except (arrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} cannot be read as Parquet ({reason})") from error
    return rows


def _is_text(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    if types.is_dictionary(kind):
        return _is_text(arrow, kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    return any(test(kind) for test in tests)


def _bytes(arrow: Any, column: Any) -> list[bytes | None]:
    """As bytes, since one text that is no UTF-8 would keep all others of its batch from being read."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(arrow.large_binary()).to_pylist()


def _decoded(path: bytes | None, caption: bytes | None) -> Row:
    try:
        return (path or b"").decode(), (caption or b"").decode()
    except UnicodeDecodeError:
        return NOT_UTF8


def _check_columns(file: Path, found: Sequence[str]) -> None:
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        has = ", ".join(map(repr, found)) or "none"
        raise ValueError(f"{file} has no column {' and no '.join(map(repr, missing))}: its columns are {has}")
