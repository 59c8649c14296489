"""Some held-out rows with every model's answer, side by side."""

import re
from collections.abc import Callable, Iterable, Sequence

from crane_tasks.evaluate.rows import Answered, Row
from crane_tasks.report.page import table

OF_EACH_SET = 3
SHOWN = 600  # characters of an answer; a longer one loses its middle
_MARKUP = re.compile(r"[&<>|`*_\[\]\\~#!]")


def cell(text: str) -> str:
    """Any text as the content of a Markdown table's cell, with nothing of it read as markup."""
    if len(text) > SHOWN:
        half = SHOWN // 2
        text = f"{text[:half]} … {len(text) - SHOWN:,} characters … {text[-half:]}"
    plain = "".join(map(_printable, re.sub(r"\r\n?", "\n", text)))
    shown = _MARKUP.sub(lambda found: f"&#{ord(found[0])};", plain)
    return shown.replace("\n", "<br>") or "–"


def _printable(letter: str) -> str:
    """A character as it is, or by its escape: some of the others end a line."""
    return letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]


def chosen(rows: Iterable[Row], model: str) -> list[Row]:
    """A few of each set: first what the model lost against the base, then what it gained."""
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        by_set.setdefault(row.set, []).append(row)
    order = {1: 0, -1: 1, 0: 2}
    return [
        row
        for own in by_set.values()
        for row in sorted(own, key=lambda row: order[row.lost(model)])[:OF_EACH_SET]
    ]


def samples(rows: Sequence[Row]) -> list[str]:
    """The paragraphs of a Markdown report: a row's target and answers, a column per model."""
    return [part for row in rows for part in _sample(row)]


def _sample(row: Row) -> list[str]:
    told: dict[str, Callable[[Answered], str]] = {
        "answer": lambda a: cell(a.text),
        "tokens": lambda a: f"{a.tokens}" if a.ended else f"{a.tokens}, no end",
        "right": lambda a: "yes" if a.right else "no",
    }

    def line(name: str) -> list[str]:
        return [told[name](answer) for answer in row.answers.values()]

    targets = {"answer": cell(row.target)}
    head = [row.set, "target", *row.answers]
    lines = [[name, targets.get(name, ""), *line(name)] for name in told]
    return [f"`{row.place}`, asked: {cell(row.prompt)}", table(head, lines, text=True)]
