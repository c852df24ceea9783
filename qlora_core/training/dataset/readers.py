"""Records of one file, one after the other, each with its place; what is no record says why."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from clusters.errors import RequestError, first_line, request_error
from qlora_core.training.dataset.report import BadRecord

Records = Iterator[tuple[str, dict[str, Any] | BadRecord]]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = ".gz"
ROWS_AT_ONCE = 256
"""Of a Parquet file that are in memory as Python objects."""


def kind_of(name: str) -> str:
    """The suffix by which a file is read; nothing where it is none of SUFFIXES, packed with gzip or not."""
    lower = name.lower().removesuffix(PACKED)
    kind = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")
    return "" if kind == ".parquet" and name.lower().endswith(PACKED) else kind


def read_file(path: Path, shown: str) -> Records:
    """The (place, record) pairs of a file; `shown` is what the person calls it.

    A file of no known suffix is read as JSON lines.

    Raises:
        RequestError: the file cannot be read at all.
    """
    kind = kind_of(path.name)
    try:
        if kind == ".parquet":
            yield from parquet(path, shown)
            return
        with open_bytes(path) as file:
            if kind == ".json":
                yield from json_document(file, shown)
            elif kind in (".csv", ".tsv"):
                yield from csv_rows(file, shown, "\t" if kind == ".tsv" else ",")
            else:
                yield from json_lines(file, shown)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise request_error("data.path", shown, f"it cannot be read: {reason}", "Check the file") from error


def open_bytes(path: Path) -> BinaryIO:
    """The file's content, unpacked where it is gzip."""
    return cast(BinaryIO, gzip.open(path) if path.name.lower().endswith(PACKED) else path.open("rb"))


def json_lines(file: BinaryIO, shown: str) -> Records:
    """One object a line; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{shown}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield place, BadRecord("it is not UTF-8")
        except json.JSONDecodeError as error:
            yield place, BadRecord(f"it is not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:  # a number of thousands of digits
            yield place, BadRecord(f"it is not JSON that Python reads: {first_line(error)}")
        except RecursionError:
            yield place, BadRecord("it is nested too deeply")
        else:
            yield place, as_object(record)


def as_object(record: object) -> dict[str, Any] | BadRecord:
    """A record that is a JSON object, or what it is instead."""
    return record if isinstance(record, dict) else BadRecord(f"it is a JSON {type(record).__name__}, not an object")


def json_document(file: BinaryIO, shown: str) -> Records:
    """An array of objects, or an object that holds one such array; it is read whole."""
    try:
        document = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise unreadable(shown, "it is not UTF-8") from None
    except RecursionError:
        raise unreadable(shown, "it is nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            file.seek(0)  # JSON lines under another name, as many published files are
            yield from json_lines(file, shown)
            return
        reason = f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise unreadable(shown, reason) from None
    except ValueError as error:  # a number of thousands of digits
        raise unreadable(shown, f"it is not JSON that Python reads: {first_line(error)}") from None
    if isinstance(document, dict):
        arrays = [name for name, value in document.items() if isinstance(value, list)]
        if len(arrays) != 1:
            found = f"{len(arrays)} arrays" if arrays else "no array"
            raise unreadable(shown, f"it is an object with {found}, so its records cannot be told")
        document = document[arrays[0]]
    if not isinstance(document, list):
        raise unreadable(shown, f"it is a JSON {type(document).__name__}, not an array of objects")
    for number, record in enumerate(document, start=1):
        yield f"{shown}, record {number}", as_object(record)


def csv_rows(file: BinaryIO, shown: str, separator: str) -> Records:
    """Rows under a header; every field is a text. A row's place is the line on which it ends."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of C's long, which has 32 bits on Windows
    rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=separator, strict=True)
    try:
        for row in rows:
            place = f"{shown}, line {rows.line_num}"
            if None in row or None in row.values():
                yield (
                    place,
                    BadRecord(f"it has another number of fields than the header's {len(rows.fieldnames or ())}"),
                )
            else:
                yield place, cast(dict[str, Any], row)
    except csv.Error as error:
        raise unreadable(shown, f"line {rows.line_num} is no CSV: {error}") from None
    except UnicodeDecodeError:
        raise unreadable(shown, f"it is not UTF-8 after line {rows.line_num}") from None


def parquet(path: Path, shown: str) -> Records:
    """Rows, a few hundred at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{shown}, row {number}", record
    except pa.ArrowException as error:
        raise unreadable(shown, f"it cannot be read as Parquet: {first_line(error)}") from None


def unreadable(shown: str, rule: str) -> RequestError:
    """The error of a file that is not what its name says."""
    return request_error("data.path", shown, rule, "Give JSON lines, a JSON array, CSV or Parquet")
