"""The report of a sweep: its points as JSON, CSV, Markdown and one HTML page with a picture."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from artifacts.store import write_atomically
from crane_tasks.apply.output import check_place, check_writable
from crane_tasks.errors import OutputError
from crane_tasks.evaluate.choice import Choice, Metrics, Point, Requirement
from crane_tasks.evaluate.metrics import BY_NAME, METRICS
from crane_tasks.recipe import Recipe
from crane_tasks.report.finite import finite
from crane_tasks.report.page import page, table
from crane_tasks.report.sweep_picture import sweep_picture

STEM = "sweep"
PICTURE = f"{STEM}.png"
FILES = (f"{STEM}.json", f"{STEM}.csv", f"{STEM}.md", f"{STEM}.html", PICTURE)


@dataclass(frozen=True)
class SweepReport:
    """Everything the report tells.

    Attributes:
        models: metrics of base and donor.
        planned: how many points the grid has, finished or not.
        problem: why there is no best point, if there should be one.
        record: the whole as JSON values.
    """

    recipe: Recipe
    points: Sequence[Point]
    choice: Choice
    requirements: Sequence[Requirement]
    models: Mapping[str, Metrics]
    planned: int
    problem: str | None
    record: Mapping[str, Any]


def check_sweep_folder(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse a folder where the report would destroy something; an older report may go.

    Args:
        inputs: the folders that no output may touch, by role.

    Raises:
        OutputError: it is, holds or lies in an input, is a checkpoint, or has files of the
            report's names that are no report.
    """
    check_place(folder, inputs)
    check_writable(folder)
    if (folder / "config.json").exists():
        raise OutputError(f"{folder}: is a checkpoint. Choose another --output for the sweep.")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not _is_report(folder):
        raise OutputError(
            f"{folder}: holds a {there[0]} that is of no sweep. Choose another --output."
        )


def _is_report(folder: Path) -> bool:
    try:
        record = json.loads((folder / FILES[0]).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"points", "pareto", "best"} <= record.keys()


def point_rows(
    points: Sequence[Point], choice: Choice, models: Mapping[str, Metrics]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: base and donor, then the points.

    The first column marks the front with a dot and the best point with a star.
    """
    measured = [*models.values(), *(p.metrics for p in points)]
    metrics = [m for m in METRICS if any(m.name in one for one in measured)]
    paths = _paths(points)

    def cells(one: Metrics) -> list[str]:
        return [m.shown(one.get(m.name)) for m in metrics]

    rows = [["", name, "", *("" for _ in paths), *cells(one)] for name, one in models.items()]
    for place, point in enumerate(points):
        mark = "★" if place == choice.best else "●" if place in choice.front else ""
        values = [_changed(point, path) for path in paths]
        rows.append([mark, f"{point.alpha:g}", f"{point.tau:g}", *values, *cells(point.metrics)])
    return ["", "alpha", "tau", *paths, *(m.title for m in metrics)], rows


def _paths(points: Sequence[Point]) -> list[str]:
    """The fields besides alpha and tau that the grid has."""
    return list(dict.fromkeys(path for p in points for path in p.changes))


def _changed(point: Point, path: str) -> str:
    """A field's value at a point; nothing where it is the recipe's own."""
    value = point.changes.get(path, "")
    return value if isinstance(value, str) else json.dumps(value)


def sweep_csv(points: Sequence[Point], choice: Choice) -> str:
    """A line per point; an empty cell is what was not measured."""
    paths, out = _paths(points), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    own = ["pareto", "meets", "best", "status", "seconds", "key"]
    writer.writerow(["alpha", "tau", *paths, *BY_NAME, *own])
    for place, p in enumerate(points):
        measured = [finite(p.metrics.get(name)) for name in BY_NAME]
        flags = [place in choice.front, choice.meets[place], place == choice.best]
        values = [_changed(p, path) for path in paths]
        last = [*(str(f).lower() for f in flags), p.status, round(p.seconds, 3), p.key]
        writer.writerow([p.alpha, p.tau, *values, *measured, *last])
    return out.getvalue()


def sweep_markdown(report: SweepReport, picture: str | None) -> str:
    """The report's text; `picture` is the file of the picture, if there is one."""
    points, choice = report.points, report.choice
    head, rows = point_rows(points, choice, report.models)
    failed = [p for p in points if p.error is not None]
    written = report.record.get("written")
    recipe = report.recipe.published()
    parts = [
        f"# {report.recipe.name}: sweep of {report.planned} points",
        f"{len(points)} of {report.planned} points so far: the sweep is under way, or the same "
        "command goes on." if len(points) < report.planned else "",
        table(head, rows),
        "● Pareto front: no other point is better in one of "
        f"{' and '.join(BY_NAME[a].title for a in choice.axes)} and as good in the other. ★ best."
        if len(choice.axes) > 1 else "",
        f"Required: {', '.join(f'`{r}`' for r in report.requirements)}."
        if report.requirements else "",
        f"Best: **{points[choice.best]}**, the lowest reasoning loss of the points that may be "
        "chosen." if choice.best is not None else report.problem or "",
        alike_note(points, choice),
        f"Written: `{Path(written).name}`" if written else "",
        *(f"**Failed: {p}.** {p.error}" for p in failed),
        f"![Reasoning loss against alpha, and what is traded for it]({picture})" if picture else "",
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def alike_note(points: Sequence[Point], choice: Choice) -> str:
    """Which points the rows cannot tell from the best."""
    if not choice.alike:
        return ""
    said = "; ".join(str(points[place]) for place in choice.alike)
    return (
        f"Not told apart from it by the held-out rows (the paired difference of the reasoning loss "
        f"at 95 % holds 0): {said}."
    )


def write_sweep_report(report: SweepReport, folder: Path, *, draw: bool = True) -> Path:
    """Write all FILES, each whole or not at all; returns the path of the HTML page.

    Args:
        draw: make the picture anew; if not, the folder's own is that of a few points ago.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILES[0], json.dumps(finite(report.record), indent=2) + "\n")
    write_atomically(folder / FILES[1], sweep_csv(report.points, report.choice))
    pictures: dict[str, bytes] = {}
    if report.choice.front and not draw:
        pictures[PICTURE] = (folder / PICTURE).read_bytes()
    elif report.choice.front:
        pictures[PICTURE] = sweep_picture(
            report.points, report.choice, report.requirements, report.models
        )
        part = folder / f".{PICTURE}.part"
        part.write_bytes(pictures[PICTURE])
        part.replace(folder / PICTURE)
    else:
        (folder / PICTURE).unlink(missing_ok=True)  # of an earlier sweep
    text = sweep_markdown(report, PICTURE if pictures else None)
    write_atomically(folder / FILES[2], text)
    write_atomically(folder / FILES[3], page(f"{report.recipe.name}: sweep", text, pictures))
    return folder / FILES[3]
