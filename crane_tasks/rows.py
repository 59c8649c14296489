"""Rows of conversations, read through `datasets` from JSONL, Parquet or the hub, or from JSON.

A JSON file is a list of prompts, as the method's official data has them.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from artifacts.ref import digest_of
from crane_tasks.errors import DataError
from crane_tasks.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        place: where it came from, for messages: "reasoning.jsonl line 7".
        messages: role and content each.
        tools: function schemas, or None.
        completion: the target given by the data, or None.
    """

    place: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    completion: str | None

    def content(self) -> dict[str, Any]:
        return {
            "messages": list(self.messages),
            "tools": self.tools,
            "completion": self.completion,
        }


@dataclass(frozen=True)
class RowSet:
    """The rows of one source, and the digest of their content (not of their path)."""

    source: str
    rows: tuple[Row, ...]
    digest: str


# What a row of a file is called, by the file's ending.
UNITS = {".jsonl": "line", ".json": "element", ".parquet": "row"}
# More sources than a recipe names: a run reads each of its files once.
SOURCES_KEPT = 8


def load_rows(recipe: Recipe, value: str) -> RowSet:
    """All rows of a file, or of the train split of a hub dataset.

    An unchanged file is read once per process; a hub dataset, which `datasets` keeps on
    disk, each time.

    Raises:
        DataError: absent, unreadable, empty, or a row that is no conversation; a broken
            line or element is named by its number.
    """
    file = recipe.locate(value)
    if file is not None:
        stat = file.stat()
        return _rows_of_file(file, value, stat.st_size, stat.st_mtime_ns)
    if value.count("/") != 1 or Path(value).suffix in UNITS:
        raise DataError(f"{value}: no such data file beside the recipe or in this folder")
    return _rows(_read_hub(value), value, f"{value} row")


@lru_cache(maxsize=SOURCES_KEPT)
def _rows_of_file(file: Path, value: str, size: int, mtime_ns: int) -> RowSet:
    """The rows of a file as it was at a size and modification time."""
    return _rows(_read_file(file), value, f"{file.name} {UNITS.get(file.suffix)}")


def _rows(raw: Sequence[Mapping[str, Any]], value: str, place: str) -> RowSet:
    rows = tuple(_row(record, f"{place} {number}") for number, record in enumerate(raw, start=1))
    if not rows:
        raise DataError(f"{value}: holds no rows")
    return RowSet(value, rows, digest_of([row.content() for row in rows]))


def _read_file(file: Path) -> list[dict[str, Any]]:
    import datasets

    if not file.is_file():
        raise DataError(f"{file}: is a folder, not a data file")
    if file.suffix not in UNITS:
        raise DataError(f"{file}: data is JSONL, JSON or Parquet, not '{file.suffix}'")
    if file.suffix == ".json":
        return _read_list(file)
    kind = "parquet" if file.suffix == ".parquet" else "json"
    if kind == "json":
        _check_lines(file)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # A cache of its own: the shared one would answer with an older version of the file.
    with tempfile.TemporaryDirectory() as cache:
        try:
            records = datasets.load_dataset(
                kind, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
            )
            return [dict(record) for record in records]
        except (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise DataError(f"{file}: cannot be read: {reason}") from error


def _read_list(file: Path) -> list[dict[str, Any]]:
    """The elements of a JSON list: rows, or prompts as mere text."""
    try:
        elements = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(elements, list):
        raise DataError(f"{file}: not a list; one row per line is for a .jsonl file")
    records = []
    for number, element in enumerate(elements, start=1):
        if not isinstance(element, str | dict):
            raise DataError(f"{file} element {number}: neither text nor a JSON object")
        records.append({"prompt": element} if isinstance(element, str) else element)
    return records


def _check_lines(file: Path) -> None:
    """Name the line that is no JSON object: the loader's own message does not."""
    if file.stat().st_size == 0:
        raise DataError(f"{file}: holds no rows")
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file} line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{file} line {number}: not a JSON object")


def _read_hub(name: str) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return [dict(record) for record in datasets.load_dataset(name, split="train")]
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name}: no such data file, and the hub did not give it as a dataset: {reason}"
        ) from error


def _row(record: Mapping[str, Any], place: str) -> Row:
    messages = record.get("messages")
    if messages is None and record.get("prompt") is not None:
        messages = _turns(record, place)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: needs `messages`, a list of {{role, content}}, or a `prompt`")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{place}: every message needs a role")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            # Templates of text models render a list of parts as nothing at all.
            raise DataError(f"{place}: the content of a message is text")
    completion = record.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{place}: `completion` is text")
    return Row(place, messages, record.get("tools") or None, completion)


def _turns(record: Mapping[str, Any], place: str) -> list[dict[str, str]]:
    """The messages of a row that is a `prompt`, a user's turn, perhaps behind a `system` one."""
    turns = []
    for key, role in (("system", "system"), ("prompt", "user")):
        text = record.get(key)
        if text is None:
            continue
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: `{key}` is text, and not empty")
        turns.append({"role": role, "content": text})
    return turns
