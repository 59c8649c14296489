"""The report of a merge: what it did, as Markdown and as one HTML page with pictures."""

import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from artifacts.ref import digest_of
from artifacts.store import Artifact
from crane_tasks.apply.folder import device_name
from crane_tasks.apply.results import Place, per_component, per_layer
from crane_tasks.apply.rows import unlike_words
from crane_tasks.calibration.sets import TokenSet
from crane_tasks.edit import edit_of
from crane_tasks.evaluate.rows import Row
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.numerics.edit import EditSums
from crane_tasks.pairing import pair_notes
from crane_tasks.report.answers import FILE, answers_page
from crane_tasks.report.glossary import glossary
from crane_tasks.report.page import page, table
from crane_tasks.report.pictures import draw_all
from crane_tasks.report.samples import chosen, samples
from crane_tasks.report.tables import (
    against_base_table,
    delta_table,
    edit_table,
    evaluation_table,
    gain_table,
    layer_table,
    prediction_table,
    suites_table,
    unfinished_note,
)
from crane_tasks.report.targets import target_table, unended_note
from crane_tasks.scores.reading import Scores
from crane_tasks.session import Context

LARGE = 10.0  # a score that deserves a second look
PICTURES = 3  # version of how they are drawn
DRAWN = ".pictures.json"  # what the pictures in a folder show


@dataclass(frozen=True)
class MergeReport:
    """Everything the report tells.

    Attributes:
        key: of the merge.
        scores, gains, projector, threshold: None where the edit has no such part.
        carried: tensors that are copied from the base.
        targets: the target sets, by what people call them.
        retokenised: those of them, by the names of the measurements, whose targets a server gave
            as text alone.
        answered: held-out rows with the answers of base, donor and "merged".
    """

    ctx: Context
    key: str
    stages: list[dict[str, Any]]
    scores: Scores | None
    edit: dict[Place, EditSums]
    evaluation: dict[str, Any]
    delta: Artifact
    threshold: Artifact | None
    gains: Artifact | None
    projector: Artifact | None
    carried: list[str]
    targets: dict[str, TokenSet]
    retokenised: list[str]
    answered: list[Row]


def markdown(report: MergeReport, pictures: dict[str, str]) -> str:
    """The report's text; `pictures` gives each picture's file by its title."""
    recipe, edit = report.ctx.recipe, edit_of(report.ctx.recipe)
    stages = [
        [s["name"], s["status"], f"{s['seconds']:.2f}", f"`{s['key']}`"] for s in report.stages
    ]
    shown_recipe = recipe.model_dump(mode="json", exclude={"run"}, exclude_unset=True)
    head, rows = evaluation_table(report.evaluation)
    tau = f", tau {recipe.tau:g}" if "tau" in edit.fields else ""
    tables = _Tables()
    parts = [
        f"# {recipe.name}: alpha {recipe.alpha:g}{tau}",
        f"Merged checkpoint: `{report.ctx.output.name}`",
        f"By {edit.title}: `{edit.formula}`",
        _made_note(report.ctx),
        "## What the models do",
        tables.of(head, rows) if rows else "",
        _evaluation_note(report.evaluation),
        *_difference_parts(report.evaluation, tables),
        *_target_parts(report, tables),
        *_gate_parts(report, tables),
        *(f"![{title}]({file})" for title, file in pictures.items()),
        "## The delta",
        "Norms relative to the base's weights; the largest single difference; what T keeps.",
        tables.of(*delta_table(report.ctx.pair().base, report.delta, report.threshold)),
        *pair_notes(report.ctx),
        "## The edit",
        "Norm relative to the base's weights; how much of it is left after rounding.",
        tables.of(*edit_table(per_component(report.edit), report.scores)),
        "The same per layer:",
        tables.of(*layer_table(per_layer(report.edit))),
        _carried_note(report.carried),
        unlike_words(report.ctx.unlike()),
        *_sample_parts(report),
        "## Stages",
        table(["stage", "status", "seconds", "key"], stages),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(shown_recipe, sort_keys=False)}```",
        "## What the columns mean",
        "\n".join(f"- {line}" for line in glossary(tables.heads)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Tables:
    """Markdown tables, and the columns that they have had."""

    def __init__(self) -> None:
        self.heads: list[str] = []

    def of(self, head: list[str], rows: list[list[str]]) -> str:
        """One of them."""
        self.heads += head
        return table(head, rows)


def _difference_parts(evaluation: dict[str, Any], tables: _Tables) -> list[str]:
    head, rows = against_base_table(evaluation)
    suites = suites_table(evaluation)
    shown = ["Suites of the lm-evaluation-harness:", tables.of(*suites)] if suites[1] else []
    if not rows:
        return shown
    told = (
        "Row by row against the base, on the same rows: intervals by a paired bootstrap, lost and "
        "gained rows with McNemar's exact test."
    )
    return [told, tables.of(head, rows), *shown]


def _sample_parts(report: MergeReport) -> list[str]:
    if not report.answered:
        return []
    told = (
        "Of each set some answers: first where the base is right and the merge is not. All of "
        f"them, to be filtered: [{FILE}]({FILE})."
    )
    return ["## Answers side by side", told, *samples(chosen(report.answered, "merged"))]


def _target_parts(report: MergeReport, tables: _Tables) -> list[str]:
    if not report.targets:
        return []
    return [
        "## Targets",
        tables.of(*target_table(report.targets, load_tokenizer(report.ctx.base))),
        unended_note(report.targets),
        _retokenised_note(report.retokenised),
    ]


def _gate_parts(report: MergeReport, tables: _Tables) -> list[str]:
    if report.scores is None or report.gains is None:
        return []
    return [
        "## The gate's prediction",
        "First-order change of the mean loss on the calibration sets, and the realised one.",
        tables.of(*prediction_table(report.evaluation)),
        "## Scores",
        "S(c) over all layers (the baseline has 1) and the sums it is made of, in nats: what both "
        "sets agree on, each set's slope along the whole delta, and the norm of its coordinates.",
        _large_note(report.scores),
        tables.of(*gain_table(report.scores, report.gains)),
    ]


def _large_note(scores: Scores) -> str:
    """Where S makes an edit that is out of all proportion, in words."""
    large = {
        f"{component} in layer {layer}: {value:.1f}": value
        for layer, row in scores.per_layer.items()
        for component, value in row.items()
        if value > LARGE
    }
    if not large:
        return ""
    told = sorted(large, key=lambda name: -large[name])
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    places = "; ".join(told[:3]) + more
    return (
        f"**Large scores** ({places}): there the edit is so many times as strong as in the "
        "baseline. Look at what `crane stability` says of S, and at the evaluation, before you "
        "trust it."
    )


def _made_note(ctx: Context) -> str:
    """When, where and with what."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("crane-merge", "torch", "transformers")
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Written {now} on `{socket.gethostname()}` ({device_name(ctx)}), {versions}."


def _evaluation_note(evaluation: dict[str, Any]) -> str:
    rows = evaluation.get("rows", {})
    if not rows:
        return "No held-out rows: name `evaluate.reasoning` and `evaluate.agent` in the recipe."
    counted = ", ".join(f"{count} held-out {name} rows" for name, count in rows.items())
    answers = evaluation.get("generated", 0)
    if not answers:
        return counted
    said = f"{counted}; {answers} answers of each kind were generated."
    return " ".join(filter(None, (said, unfinished_note(evaluation))))


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


def write_report(report: MergeReport, folder: Path) -> Path:
    """Write report.md, report.html and the pictures; returns the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = report.ctx.recipe
    pictures = _pictures(report, folder)
    files = {title: f"{name}.png" for name, title in pictures.items()}
    data = {file: (folder / file).read_bytes() for file in files.values()}
    text = markdown(report, files)
    (folder / "report.md").write_text(text)
    if report.answered:
        told = answers_page(recipe.name, report.answered, "merged")
        (folder / FILE).write_text(told)
    else:
        (folder / FILE).unlink(missing_ok=True)  # of an earlier merge
    target = folder / "report.html"
    target.write_text(page(recipe.name, text, data))
    return target


def _pictures(report: MergeReport, folder: Path) -> dict[str, str]:
    """Draw what has changed since the folder was written last; titles by the files' stems.

    To draw takes seconds, which a rerun that changes nothing should not.
    """
    stamp = digest_of([PICTURES, report.key, report.ctx.recipe.tau])
    note = folder / DRAWN
    try:
        known: dict[str, Any] = json.loads(note.read_text())
        titles: dict[str, str] = known["titles"]
        if known["stamp"] == stamp and all((folder / f"{n}.png").is_file() for n in titles):
            return titles
    except (OSError, ValueError, KeyError, TypeError):
        pass  # drawn for the first time, or the note is torn
    drawn = draw_all(report.scores, report.edit, report.projector, report.ctx.recipe.tau)
    for name, (_, png) in drawn.items():
        (folder / f"{name}.png").write_bytes(png)
    titles = {name: title for name, (title, _) in drawn.items()}
    note.write_text(json.dumps({"stamp": stamp, "titles": titles}) + "\n")
    return titles
