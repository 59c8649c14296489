"""What a merge's report says: every column explained, answers side by side, the edit per layer."""

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from conftest import TinyPair
from markdown_it import MarkdownIt
from tiny_merge import asked, reported

from crane_tasks.apply.results import per_component, per_layer, read_edit
from crane_tasks.apply.stage import APPLY
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.rows import Answered, Row
from crane_tasks.report.samples import OF_EACH_SET, SHOWN, cell, chosen
from flows.evaluate import evaluate
from flows.merge import Merged

Pairs = Callable[[str], TinyPair]
ANSWERS = ("evaluate.generate=2", "evaluate.max_new_tokens=6")
# First columns name the row; of a stage nothing needs to be explained.
PLAIN = {"model", "component", "set", "layer", "rows"} | {"stage", "status", "seconds", "key"}


@pytest.fixture(scope="module")
def result(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("report")
    return reported(pairs("qwen3_moe"), folder / "store", folder / "out", *ANSWERS)


def text_of(result: Merged) -> str:
    assert result.report is not None
    return result.report.with_name("report.md").read_text()


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, the head first."""
    found: list[list[list[str]]] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def test_every_column_is_explained(result: Merged) -> None:
    text = text_of(result)
    explained = set(re.findall(r"^- \*\*(.+?)\*\*: ", text, re.MULTILINE))
    samples = {"target", "reasoning", "agent", "base", "donor", "merged"}
    heads = {head for table in tables(text) for head in table[0]}
    assert heads - samples - PLAIN == explained


def cell_text(text: str) -> str:
    """An answer of these bytes as the page shows it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).strip()


def test_answers_stand_side_by_side_as_they_were_graded(result: Merged, tmp_path: Path) -> None:
    """The same that `crane evaluate --rows` writes, of the written merge."""
    ctx, file = result.ctx, tmp_path / "rows.jsonl"
    evaluate(ctx.session, ctx.output, rows=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["set"] for row in rows] == ["reasoning"] * 2 + ["agent"] * 2
    shares = result.evaluation["models"]["merged"]
    graded = [row["answers"]["checkpoint"]["right"] for row in rows]
    assert sum(graded[:2]) / 2 == shares["right_answers"]
    assert sum(graded[2:]) / 2 == shares["exact_tool_calls"]
    shown = [t for t in tables(text_of(result)) if t[0][1:2] == ["target"]]
    assert [t[0] for t in shown] == [
        [row["set"], "target", "base", "donor", "merged"] for row in rows
    ]
    for row in rows:
        own = row["answers"]["checkpoint"]
        assert any(
            t[0][0] == row["set"]
            and unescape(t[1][4]) == cell_text(own["text"])
            and t[2][4] == (f"{own['tokens']}" if own["ended"] else f"{own['tokens']}, no end")
            for t in shown
        ), row["place"]


def test_no_answer_becomes_markup() -> None:
    evil = "\x1f\x85\u2028 | a | `b` <script>x</script>\n**c** [d](e) _f_ &amp;"
    html = MarkdownIt("commonmark").enable("table").render(f"| x |\n| --- |\n| {cell(evil)} |")
    assert "<script>" not in html and "<a " not in html and "<strong>" not in html
    body = re.findall(r"<td>(.*)</td>", html)
    shown = evil.replace("\x1f\x85\u2028", r"\x1f\x85\u2028")
    assert [unescape(b).replace("<br>", "\n") for b in body] == [shown]
    assert len(cell("x" * 10_000)) < SHOWN + 50


def test_what_was_lost_comes_first() -> None:
    def row(n: int, base: bool, merged: bool) -> Row:
        answers = {m: Answered("", 0, True, r, "") for m, r in (("base", base), ("merged", merged))}
        return Row("agent", str(n), 0, "", "", answers)

    rows = [row(0, True, True), row(1, False, True), row(2, True, False), row(3, True, False)]
    assert [r.place for r in chosen(rows, "merged")] == ["2", "3", "1"] and OF_EACH_SET == 3


def test_the_edit_per_layer_adds_up(result: Merged) -> None:
    edit = read_edit(result.ctx.store.open(result.keys[APPLY]))
    layers = per_layer(edit)
    assert list(layers) == list(range(result.ctx.pair().base.num_layers))
    outside = sum(sums.intended2 for (layer, _), sums in edit.items() if layer is None)
    whole = sum(sums.intended2 for sums in per_component(edit).values())
    assert sum(sums.intended2 for sums in layers.values()) + outside == pytest.approx(whole)
    assert all(sums.intended2 > 0 for sums in layers.values())


def test_rows_are_refused_before_anything_is_measured(pairs: Pairs, tmp_path: Path) -> None:
    session = asked(pairs("qwen3"), tmp_path / "store", "evaluate.generate=0")
    with pytest.raises(RecipeError, match="generate is 0"):
        evaluate(session, pairs("qwen3").base, rows=tmp_path / "rows.jsonl")
    more = asked(pairs("qwen3"), tmp_path / "store", *ANSWERS)
    with pytest.raises(RecipeError, match="no file in a folder"):
        evaluate(more, pairs("qwen3").base, rows=tmp_path / "none" / "rows.jsonl")
    assert not (tmp_path / "store").exists()
