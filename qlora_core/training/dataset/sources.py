"""Where data lies: a file, a folder of files or a dataset on disk, as records that each say where they stand."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from clusters.errors import request_error
from qlora_core.training.dataset.report import BadRecord

Place = str
"""A file and a line or row of it, counted from 1."""
Records = Iterator[tuple[Place, dict[str, Any] | BadRecord]]
"""Records, and what is wrong with those that are none."""
STATE = "state.json"
"""What `datasets` writes beside the Arrow files of a split (datasets 5.2, arrow_dataset.py, save_to_disk)."""
BATCH = 1000
"""Rows that are held as Python objects at a time."""


@dataclass(frozen=True, slots=True)
class Source:
    """Data that can be read more than once.

    Attributes:
        name: the path that was given.
        files: what is read of it, in that order.
    """

    name: str
    files: tuple[Path, ...]

    def records(self) -> Records:
        """All records, a file at a time, few in memory at once (but all of a JSON array)."""
        for path in self.files:
            yield from reader_of(path)(path)

    def digest(self) -> str:
        """SHA-256 over the file, or over the digests of several, as hexadecimal digits."""
        digests = [file_digest(path) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def find_source(path: Path, split: str = "train") -> Source:
    """The data at a path.

    Args:
        split: of a folder whose files are named by splits, or of a dataset on disk.

    Raises:
        RequestError: there is none, or it may not be read.
    """
    if path.is_dir():
        files = dataset_on_disk(path, split) or folder_files(path, split)
    elif path.is_file():
        files = [path]
    else:
        raise request_error("data.path", path, "there is no such file", "Give the path of a file or a folder of them")
    for file in files:
        if not os.access(file, os.R_OK):
            raise request_error("data.path", file, "it may not be read", "Change its permissions")
    return Source(str(path), tuple(files))


def folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder and those below it; of the split, where any is named by it: train-00000-of-00002."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())
    if not files:
        rule = f"no file in it ends in {', '.join(sorted(READERS))}"
        raise request_error("data.path", folder, rule, "Give a folder of such files, or one file")
    of_split = [path for path in files if path.name.split(".")[0].split("-")[0] == split]
    return of_split or files


def dataset_on_disk(folder: Path, split: str) -> list[Path]:
    """The Arrow files of what `datasets` saved with save_to_disk; none where the folder is no such thing."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise request_error("data.split", split, f"{folder} has the splits {', '.join(splits)}", "Name one of them")
        folder = folder / split
    if not (folder / STATE).is_file():
        return []
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        rule = "it is a selection of rows that was saved without its rows"
        raise request_error("data.path", folder, rule, "Save it after Dataset.flatten_indices()")
    # a name, never a path: the folder may come from somebody else
    return [folder / Path(each["filename"]).name for each in state["_data_files"]]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- kinds of files ---------------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Records:
    """A JSON object a line; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", json_object(line, "utf-8-sig" if number == 1 else "utf-8")


def json_object(line: bytes, encoding: str) -> dict[str, Any] | BadRecord:
    """The object of a line, or what is wrong with it."""
    try:
        record = json.loads(line.decode(encoding))
    except UnicodeDecodeError:
        return BadRecord("it is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRecord(f"it is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRecord("it is nested too deeply")
    return record if isinstance(record, dict) else BadRecord(f"it is a JSON {type(record).__name__}, not an object")


def json_document(path: Path) -> Records:
    """A JSON array of objects, or an object with one such array; an object a line is taken for what it is, too."""
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from json_lines(path)
        return
    if isinstance(document, dict):
        arrays = [value for value in document.values() if isinstance(value, list) and value]
        document = arrays[0] if len(arrays) == 1 and isinstance(arrays[0][0], dict) else [document]
    for number, record in enumerate(document if isinstance(document, list) else [document], start=1):
        wrong = BadRecord(f"it is a JSON {type(record).__name__}, not an object")
        yield f"{path}, item {number}", record if isinstance(record, dict) else wrong


def separated(path: Path, separator: str) -> Records:
    """A table as text, whose first row names the columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=separator, strict=True), start=1):
                wrong = None in row or None in row.values()
                record = BadRecord("it has another number of fields than there are columns") if wrong else row
                yield f"{path}, row {number}", record
    except UnicodeDecodeError:
        raise request_error("data.path", path, "it is not UTF-8", "Save it as UTF-8") from None
    except csv.Error as error:
        raise request_error("data.path", path, f"it is no table: {error}", "Check its quotes") from None


def parquet_rows(path: Path) -> Records:
    """The rows of a Parquet file."""
    try:
        with parquet.ParquetFile(path) as file:
            yield from rows_of(path, file.iter_batches(BATCH))
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def arrow_rows(path: Path) -> Records:
    """The rows of an Arrow stream, as `datasets` writes it."""
    try:
        with pyarrow.memory_map(os.fspath(path)) as file, ipc.open_stream(file) as stream:
            yield from rows_of(path, (part for batch in stream for part in sliced(batch)))
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def sliced(batch: Any) -> Iterator[Any]:
    """A batch in parts of at most BATCH rows."""
    return (batch.slice(first, BATCH) for first in range(0, batch.num_rows, BATCH))


def rows_of(path: Path, batches: Iterator[Any]) -> Records:
    """The rows of record batches."""
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record


def unreadable(path: Path, error: Exception) -> Exception:
    """The error of a file that is not what its name says."""
    reason = str(error).splitlines()[0]
    return request_error("data.path", path, f"it cannot be read: {reason}", "Write it again, or leave it out")


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_document,
    ".csv": partial(separated, separator=","),
    ".tsv": partial(separated, separator="\t"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}


def reader_of(path: Path) -> Callable[[Path], Records]:
    """What reads a file: by the end of its name, and JSON lines where that says nothing."""
    return READERS.get(path.suffix.lower(), json_lines)
