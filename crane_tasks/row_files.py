"""Records as they lie in files: JSONL, JSON and Parquet, the first two gzipped or not.

JSON is read here and not by `datasets`, which infers a schema from the first 10 MB: a field that
appears later is an error there, and one that a row lacks becomes a null that nobody wrote.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from crane_tasks.errors import DataError

# What a record of a file is called, by the file's ending.
UNITS = {".jsonl": "line", ".json": "element", ".parquet": "row"}
ZIPPED = ".gz"
# (its number, the record)
Records = Iterator[tuple[int, dict[str, Any]]]


def kind_of(name: str) -> str | None:
    """The ending that says how a file is read, or None if it is none of ours."""
    suffixes = Path(name).suffixes[-2:]
    if suffixes[-1:] == [ZIPPED]:
        suffixes = suffixes[:-1]
        return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".json") else None
    return suffixes[-1] if suffixes and suffixes[-1] in UNITS else None


def read_records(file: Path) -> Records:
    """The records of a file with their numbers, from 1.

    Raises:
        DataError: a folder, another kind of file, or unreadable; a broken line or element is
            named by its number.
    """
    if not file.is_file():
        raise DataError(f"{file}: is a folder, not a data file")
    kind = kind_of(file.name)
    if kind is None:
        raise DataError(
            f"{file}: data is JSONL or JSON (also as .gz) or Parquet, not '{file.suffix}'"
        )
    return {".jsonl": _lines, ".json": _elements, ".parquet": _table}[kind](file)


def without_nulls(value: Any) -> Any:
    """A value of an Arrow table without its null fields.

    A column has one schema: what one row's tool has, every other row's has as null.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _opened(file: Path) -> BinaryIO:
    if file.suffix == ZIPPED:
        return cast(BinaryIO, gzip.open(file, "rb"))
    return file.open("rb")


def _lines(file: Path) -> Records:
    """One record per line; blank lines are none."""
    try:
        with _opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _object(line, f"{file} line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: not a JSON object")
    return record


def _elements(file: Path) -> Records:
    """The elements of a JSON list: rows, or prompts as mere text."""
    try:
        with _opened(file) as stream:
            elements = json.loads(stream.read().decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(elements, list):
        raise DataError(f"{file}: not a list; one row per line is for a .jsonl file")
    for number, element in enumerate(elements, start=1):
        if not isinstance(element, str | dict):
            raise DataError(f"{file} element {number}: neither text nor a JSON object")
        yield number, {"prompt": element} if isinstance(element, str) else element


def _table(file: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: cannot be read: {reason}") from error
