"""The report in Prefect's UI: Markdown with its pictures inside, and tables."""

import base64
import re
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from crane_tasks.report import evaluation_rows
from crane_tasks.scores import Scores
from crane_tasks.sweep_report import point_rows
from flows.merge import Merged
from flows.sweep import Sweep

LARGEST_PICTURE = 375_000  # bytes of PNG: as base64 500 KB, beyond which the UI stalls
_PICTURE = re.compile(r"!\[(?P<title>[^]]*)\]\((?P<file>[^)]+\.png)\)")


def artifact_key(*parts: str) -> str:
    """What Prefect takes as an artifact's key: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def with_pictures(text: str, folder: Path) -> str:
    """Markdown whose pictures are in the text itself: the browser cannot read our disk."""

    def inline(found: re.Match[str]) -> str:
        data = (folder / found["file"]).read_bytes()
        if len(data) > LARGEST_PICTURE:
            return f"*{found['title']}: {folder / found['file']}*"
        encoded = base64.b64encode(data).decode()
        return f"![{found['title']}](data:image/png;base64,{encoded})"

    return _PICTURE.sub(inline, text)


def publish_merge(merged: Merged) -> None:
    """The report, the evaluation and the scores of a merge."""
    name, ctx = merged.ctx.recipe.name, merged.ctx
    if merged.report is not None:
        folder = merged.report.parent
        text = with_pictures((folder / "report.md").read_text(), folder)
        place = f"Merged checkpoint: `{ctx.output}`\n\nThis report: `{merged.report}`"
        text = re.sub(r"^Merged checkpoint: .*$", lambda _: place, text, count=1, flags=re.M)
        _publish_text(artifact_key(name, "report"), text, f"What the merge into {ctx.output} did")
    publish_evaluation(name, merged.evaluation)
    if merged.scores is not None:
        _publish_table(
            artifact_key(name, "scores"), score_table(merged.scores), "S per layer and component"
        )


def publish_evaluation(name: str, evaluation: dict[str, Any]) -> None:
    """The models by their metrics."""
    head, rows = evaluation_rows(evaluation)
    if rows:
        table = [dict(zip(head, row, strict=True)) for row in rows]
        _publish_table(artifact_key(name, "evaluation"), table, "What the models do")


def publish_sweep(found: Sweep) -> None:
    """The report of a grid, and its table."""
    name = found.recipe.name
    if found.report is not None:
        folder = found.report.parent
        text = with_pictures((folder / "sweep.md").read_text(), folder)
        text = f"{text}\nThis report: `{found.report}`\n"
        if found.written is not None:
            text = f"{text}\nCheckpoint of the best point: `{found.written}`\n"
        _publish_text(artifact_key(name, "sweep-report"), text, f"{len(found.points)} points")
    (_, *head), rows = point_rows(found.points, found.choice, found.models)
    table = [dict(zip(["mark", *head], row, strict=True)) for row in rows]
    _publish_table(artifact_key(name, "sweep"), table, "The points: ● Pareto front, ★ best")


def score_table(scores: Scores) -> list[dict[str, str]]:
    """A row per layer, and one for all of them."""
    components = list(scores.per_component)
    rows = {str(layer): row for layer, row in scores.per_layer.items()}
    rows["all"] = scores.per_component
    return [
        {"layer": layer, **{c: f"{row[c]:.4f}" if c in row else "–" for c in components}}
        for layer, row in rows.items()
    ]


def _publish_text(key: str, text: str, description: str) -> None:
    try:
        create_markdown_artifact(text, key, description)
    except (httpx.HTTPError, PrefectException) as error:
        _not_shown(key, error)


def _publish_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    try:
        create_table_artifact(rows, key, description)
    except (httpx.HTTPError, PrefectException) as error:
        _not_shown(key, error)


def _not_shown(key: str, error: Exception) -> None:
    """The results are on the disk: what only shows them must not fail the run."""
    get_run_logger().warning("The server did not take the artifact %s: %s", key, error)
