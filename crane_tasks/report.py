"""The report: what a merge did, as Markdown, and the same as one HTML page with pictures.

`markdown` is a pure function of the facts; pictures are drawn by `pictures`.
"""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt

from artifacts.store import Artifact
from crane_tasks.context import Context
from crane_tasks.numerics.edit import EditSums
from crane_tasks.pictures import draw_all
from crane_tasks.scores import Scores

TITLES = {
    "reasoning_loss": "reasoning loss",
    "agent_loss": "agent loss",
    "tool_calls": "tool calls",
    "exact_tool_calls": "exact calls",
    "right_answers": "right answers",
    "answer_tokens": "answer tokens",
    "format_divergence": "format KL",
}
PERCENT = ("tool_calls", "exact_tool_calls", "right_answers")


@dataclass(frozen=True)
class Facts:
    """Everything the report tells."""

    ctx: Context
    stages: list[dict[str, Any]]
    scores: Scores
    edit: dict[str, EditSums]
    evaluation: dict[str, Any]
    projector: Artifact
    carried: list[str]
    retokenised: list[str]


def shown(metric: str, value: float | None) -> str:
    """A metric for a person: percent for rates, a dash for what was not measured."""
    if value is None or value != value:
        return "–"
    if metric in PERCENT:
        return f"{value:.1%}"
    return f"{value:.1f}" if metric == "answer_tokens" else f"{value:.4f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def evaluation_rows(evaluation: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the evaluation table: models by the metrics that any of them has."""
    models: dict[str, dict[str, float]] = evaluation.get("models", {})
    metrics = [m for m in TITLES if any(m in found for found in models.values())]
    rows = [[name, *(shown(m, found.get(m)) for m in metrics)] for name, found in models.items()]
    return ["model", *(TITLES[m] for m in metrics)], rows


def _gate_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    gate = evaluation.get("gate", {})
    rows = []
    for name, realised in gate.get("realised", {}).items():
        predicted = gate["predicted"][name]
        shown_prediction = "–" if predicted is None else f"{predicted:+.4f}"
        rows.append([name, shown_prediction, f"{realised:+.4f}"])
    return rows


def _edit_rows(edit: dict[str, EditSums]) -> list[list[str]]:
    return [
        [
            component,
            f"{(s.intended2 / s.base2) ** 0.5 if s.base2 else 0.0:.2e}",
            f"{(s.delta2 / s.base2) ** 0.5 if s.base2 else 0.0:.2e}",
            f"{s.survived:.3f}" if s.intended2 else "–",
            f"{s.cosine:.3f}" if s.intended2 else "–",
            f"{s.changed / s.numel:.1%}" if s.numel else "–",
        ]
        for component, s in edit.items()
    ]


def markdown(facts: Facts, pictures: dict[str, str]) -> str:
    """The report's text; `pictures` gives each picture's file by its title."""
    recipe = facts.ctx.recipe
    head, rows = evaluation_rows(facts.evaluation)
    stages = [
        [s["name"], s["status"], f"{s['seconds']:.2f}", f"`{s['key']}`"] for s in facts.stages
    ]
    scores = [[c, f"{s:.4f}"] for c, s in facts.scores.per_component.items()]
    shown_recipe = recipe.model_dump(mode="json", exclude={"run"}, exclude_unset=True)
    parts = [
        f"# {recipe.name}: alpha {recipe.alpha:g}, tau {recipe.tau:g}",
        f"Merged checkpoint: `{facts.ctx.output.name}`",
        "## What the models do",
        table(head, rows) if rows else "",
        _evaluation_note(facts.evaluation),
        _retokenised_note(facts.retokenised),
        "## The gate's prediction",
        "First-order change of the mean loss on the calibration sets, and the realised one.",
        table(["set", "predicted", "realised"], _gate_rows(facts.evaluation)),
        "## Scores",
        "S(c) over all layers; the baseline has 1.",
        table(["component", "S"], scores),
        *(f"![{title}]({file})" for title, file in pictures.items()),
        "## The edit",
        "Norm relative to the base's weights; how much of it is left after rounding.",
        table(
            ["component", "edit / base", "delta / base", "survived", "cosine", "changed"],
            _edit_rows(facts.edit),
        ),
        _carried_note(facts.carried),
        "## Stages",
        table(["stage", "status", "seconds", "key"], stages),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(shown_recipe, sort_keys=False)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluation_note(evaluation: dict[str, Any]) -> str:
    rows = evaluation.get("rows", {})
    if not rows:
        return "No held-out rows: name `evaluate.reasoning` and `evaluate.agent` in the recipe."
    counted = ", ".join(f"{count} held-out {name} rows" for name, count in rows.items())
    answers = evaluation.get("generated", 0)
    return f"{counted}; {answers} answers of each kind were generated." if answers else counted


def _retokenised_note(sets: list[str]) -> str:
    if not sets:
        return ""
    return (
        f"Targets of {', '.join(f'`{name}`' for name in sets)}: the server gave text without "
        "token ids, which was cut into tokens anew. These need not be those that the model emitted."
    )


def _carried_note(carried: list[str]) -> str:
    if not carried:
        return ""
    return (
        f"{len(carried)} tensors are no weights that can be merged and were carried over from "
        f"the base: `{carried[0]}`" + (" and others." if len(carried) > 1 else ".")
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
        padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #d0d7de; padding: .3rem .8rem; text-align: left; }}
th {{ border-bottom: 2px solid #8c959f; }}
img {{ max-width: 100%; }}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""


def page(title: str, text: str, pictures: dict[str, bytes]) -> str:
    """The Markdown as one HTML file, its pictures (by file name) inside it."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for file, data in pictures.items():
        encoded = base64.b64encode(data).decode()
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{encoded}"')
    return PAGE.format(title=html.escape(title), body=body)


def write_report(facts: Facts, folder: Path) -> Path:
    """Write report.md, report.html and the pictures; returns the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_all(facts.scores, facts.edit, facts.projector, facts.ctx.recipe.tau)
    files: dict[str, str] = {}
    data: dict[str, bytes] = {}
    for name, (title, png) in drawn.items():
        files[title], data[f"{name}.png"] = f"{name}.png", png
        (folder / f"{name}.png").write_bytes(png)
    text = markdown(facts, files)
    (folder / "report.md").write_text(text)
    target = folder / "report.html"
    target.write_text(page(facts.ctx.recipe.name, text, data))
    return target
