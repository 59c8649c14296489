"""Held-out rows in two parts: the ones a search sees, and the ones it never saw."""

import json
from dataclasses import dataclass
from pathlib import Path

from artifacts.store import write_atomically
from crane_tasks.errors import DataError
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import changed
from crane_tasks.rows import Row, load_rows

FOLDER = "rows"
SETS = ("reasoning", "agent")
# Ten on either side: below that a share moves by more than ten points with a single answer.
FEWEST = 20


@dataclass(frozen=True)
class Split:
    """A recipe on the first part of its held-out rows, and the same one on the rest.

    Attributes:
        counts: rows by part and held-out set.
    """

    seen: Recipe
    unseen: Recipe
    counts: dict[str, dict[str, int]]


def split_rows(rows: tuple[Row, ...], source: str) -> tuple[list[Row], list[Row]]:
    """The first half of the rows, and what comes after it; no row is in both.

    A row that is a copy of one in the first half is left out of the second.

    Raises:
        DataError: there are too few rows.
    """
    half = (len(rows) + 1) // 2
    seen = {_line(row) for row in rows[:half]}
    rest = [row for row in rows[half:] if _line(row) not in seen]
    if len(rows) < FEWEST or not rest:
        what = f"{len(rows)} rows" if rest else "no rows that its first half does not have"
        raise DataError(
            f"{source}: {what}. A search sees one half of the held-out rows and is judged by the "
            f"other: it takes {FEWEST} different ones at least"
        )
    return list(rows[:half]), rest


def halves_of(recipe: Recipe) -> dict[str, tuple[list[Row], list[Row]]]:
    """Both parts of every held-out set that the recipe has; writes nothing.

    Raises:
        DataError: a set is absent, broken or too small.
    """
    sources = {name: getattr(recipe.evaluate, name) for name in SETS}
    return {
        name: split_rows(load_rows(recipe, source).rows, str(source))
        for name, source in sources.items()
        if source is not None
    }


def split_heldout(
    recipe: Recipe, halves: dict[str, tuple[list[Row], list[Row]]], folder: Path
) -> Split:
    """Write both parts of every held-out set below `folder`, and point the recipe at them."""
    recipes, counts = [], {}
    for number, part in enumerate(("seen", "unseen")):
        files = {name: folder / FOLDER / f"{part}_{name}.jsonl" for name in halves}
        for name, file in files.items():
            _write(file, halves[name][number])
        data = {f"evaluate.{name}": str(file) for name, file in files.items()}
        recipes.append(changed(recipe, data, f"{recipe.name} on its {part} rows"))
        counts[part] = {name: len(parts[number]) for name, parts in halves.items()}
    return Split(recipes[0], recipes[1], counts)


def _write(file: Path, rows: list[Row]) -> None:
    """The rows as JSONL; a file that is so already keeps its time, which caches go by."""
    text = "".join(f"{_line(row)}\n" for row in rows)
    if not (file.is_file() and file.read_text() == text):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)


def _line(row: Row) -> str:
    said = {
        "messages": list(row.messages),
        "tools": row.tools,
        "completion": row.completion,
        "chat_template_kwargs": dict(row.options) or None,
        "answer": row.answer,
        "calls": row.calls,
    }
    # Keys stay in their order, in which the template writes those of tools and calls.
    return json.dumps({k: v for k, v in said.items() if v is not None}, ensure_ascii=False)
