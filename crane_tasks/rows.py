"""Rows of conversations, from files or the hub; the same rows are the same wherever they lie."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from artifacts.ref import digest_of
from crane_tasks.conversation import characters, messages_of, template_options, tools_of
from crane_tasks.errors import DataError
from crane_tasks.grades import check_answer, check_calls
from crane_tasks.recipe import Recipe, data_sources
from crane_tasks.row_files import UNITS, kind_of, read_records, without_nulls
from crane_tasks.section import Data, Rows, rows_of


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        place: where it came from, for messages: "reasoning.jsonl line 7".
        messages: role and content each, and what else the row says of a turn.
        tools: function schemas, or None.
        completion: the target given by the data, or None.
        options: what the row hands to the chat template besides.
        answer, calls: what a right answer is, where the row says it (`grades.py`).
    """

    place: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    completion: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None
    calls: Sequence[Mapping[str, Any]] | None = None

    def content(self) -> dict[str, Any]:
        """All that models see of it: another grade of the same answers decodes nothing anew."""
        content: dict[str, Any] = {
            "messages": list(self.messages),
            "tools": self.tools,
            "completion": self.completion,
        }
        calls = [m["tool_calls"] for m in self.messages if "tool_calls" in m]
        if self.tools or calls:
            # A digest does not see the order of keys, the template writes them in it.
            content["order"] = json.dumps([self.tools, calls])
        return content | ({"options": dict(self.options)} if self.options else {})


@dataclass(frozen=True)
class RowSet:
    """The rows of one source, and the digest of their content (not of their path)."""

    source: str
    rows: tuple[Row, ...]
    digest: str

    @property
    def grades(self) -> list[Any]:
        """What the rows say of right answers; empty if none says anything."""
        given = [[row.answer, row.calls] for row in self.rows]
        return given if any(a is not None or c is not None for a, c in given) else []


# More sources than a recipe names: a run reads each of its files once.
SOURCES_KEPT = 8
# Characters of a row, at most: about half a million tokens, beyond what a model reads at once. To
# cut 30 MB into tokens takes minutes, only to find that they are too many.
LONGEST_ROW = 2_000_000


def load_rows(recipe: Recipe, data: Data) -> RowSet:
    """The rows of a file or of a hub dataset that are asked for; by default all, or all to train.

    An unchanged file is read once per process; a hub dataset, which `datasets` keeps on
    disk, each time.

    Raises:
        DataError: absent, unreadable, empty, or a row that is no conversation; a broken
            line or element is named by its number.
    """
    asked = rows_of(data)
    value, file = asked.path, recipe.locate(asked.path)
    if file is not None:
        if asked.model_dump(include={"subset", "split"}, exclude_defaults=True):
            raise DataError(f"{asked}: a file has neither subset nor split, a hub dataset has")
        stat = file.stat()
        return _chosen(_rows_of_file(file, value, stat.st_size, stat.st_mtime_ns), asked)
    if value.partition("@")[0].count("/") != 1 or kind_of(value) is not None:
        raise DataError(f"{value}: no such data file beside the recipe or in this folder")
    return _chosen(_rows(enumerate(_read_hub(asked), start=1), value, f"{value} row"), asked)


def _chosen(found: RowSet, asked: Rows) -> RowSet:
    """The first `limit` rows, or those that its seed draws, in their order."""
    if asked.limit is None or asked.limit >= len(found.rows):
        return found
    places = list(range(len(found.rows)))
    if asked.seed is not None:
        places = sorted(random.Random(asked.seed).sample(places, asked.limit))
    rows = tuple(found.rows[place] for place in places[: asked.limit])
    return RowSet(str(asked), rows, digest_of_rows(rows))


def digest_of_rows(rows: Iterable[Row]) -> str:
    """Who rows are: by their content."""
    return digest_of([row.content() for row in rows])


@lru_cache(maxsize=SOURCES_KEPT)
def _rows_of_file(file: Path, value: str, size: int, mtime_ns: int) -> RowSet:
    """The rows of a file as it was at a size and modification time."""
    return _rows(read_records(file), value, f"{file.name} {UNITS.get(kind_of(file.name) or '')}")


def _rows(records: Iterable[tuple[int, Mapping[str, Any]]], value: str, place: str) -> RowSet:
    rows = tuple(_row(record, f"{place} {number}") for number, record in records)
    if not rows:
        raise DataError(f"{value}: holds no rows")
    return RowSet(value, rows, digest_of_rows(rows))


def _read_hub(asked: Rows) -> list[dict[str, Any]]:
    import datasets

    name, _, revision = asked.path.partition("@")

    datasets.disable_progress_bars()
    try:
        records = datasets.load_dataset(
            name, asked.subset, split=asked.split, revision=revision or None
        )
        return [without_nulls(dict(record)) for record in records]
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{asked}: no such data file, and the hub did not give it as a dataset: {reason}"
        ) from error


def _row(record: Mapping[str, Any], place: str) -> Row:
    messages, tools = messages_of(record, place), tools_of(record, place)
    completion = record.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{place}: `completion` is text")
    length = characters([messages, tools, completion])
    if length > LONGEST_ROW:
        raise DataError(
            f"{place}: has {length:,} characters, a row may have {LONGEST_ROW:,}. Split or drop it."
        )
    answer, calls = record.get("answer"), record.get("calls")
    return Row(
        place,
        messages,
        tools,
        completion,
        template_options(record, place),
        None if answer is None else check_answer(answer, place),
        None if calls is None else check_calls(calls, place),
    )


def check_sources(recipe: Recipe) -> None:
    """Read every set of rows that a recipe names.

    Raises:
        DataError: with all that is wrong, a line for each file.
    """
    problems: list[str] = []
    for data in data_sources(recipe):
        try:
            load_rows(recipe, data)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
