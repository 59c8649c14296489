"""The report in Prefect's UI: Markdown with its pictures inside, and tables."""

import base64
import re
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from crane_tasks.report.sweep import point_rows
from crane_tasks.report.tables import Cells, evaluation_table, records, score_table
from flows.merge import Merged
from flows.sweep_result import Sweep

LARGEST_PICTURE = 375_000  # bytes of PNG: as base64 500 KB, beyond which the UI stalls
_PICTURE = re.compile(r"!\[(?P<title>[^]]*)\]\((?P<file>[^)]+\.png)\)")


def artifact_key(*parts: str) -> str:
    """What Prefect takes as an artifact's key: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def with_pictures(text: str, folder: Path) -> str:
    """Markdown whose pictures are in the text itself: the browser cannot read our disk."""

    def inline(picture: re.Match[str]) -> str:
        data = (folder / picture["file"]).read_bytes()
        if len(data) > LARGEST_PICTURE:
            return f"*{picture['title']}: {folder / picture['file']}*"
        encoded = base64.b64encode(data).decode()
        return f"![{picture['title']}](data:image/png;base64,{encoded})"

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
        table = score_table(merged.scores)
        _publish_table(artifact_key(name, "scores"), table, "S per layer and component")


def publish_evaluation(name: str, evaluation: dict[str, Any]) -> None:
    """The models by their metrics."""
    table = evaluation_table(evaluation)
    if table[1]:
        _publish_table(artifact_key(name, "evaluation"), table, "What the models do")


def publish_sweep(swept: Sweep) -> None:
    """The report of a grid, and its table."""
    name = swept.recipe.name
    if swept.report is not None:
        folder = swept.report.parent
        text = with_pictures((folder / "sweep.md").read_text(), folder)
        text = f"{text}\nThis report: `{swept.report}`\n"
        if swept.written is not None:
            text = f"{text}\nCheckpoint of the best point: `{swept.written}`\n"
        _publish_text(artifact_key(name, "sweep-report"), text, f"{len(swept.points)} points")
    (_, *head), rows = point_rows(swept.points, swept.choice, swept.models)
    table = (["mark", *head], rows)
    _publish_table(artifact_key(name, "sweep"), table, "The points: ● Pareto front, ★ best")


def _publish_text(key: str, text: str, description: str) -> None:
    try:
        create_markdown_artifact(text, key, description)
    except (httpx.HTTPError, PrefectException) as error:
        _not_shown(key, error)


def _publish_table(key: str, table: Cells, description: str) -> None:
    try:
        create_table_artifact(list(records(table)), key, description)
    except (httpx.HTTPError, PrefectException) as error:
        _not_shown(key, error)


def _not_shown(key: str, error: Exception) -> None:
    """The results are on the disk: what only shows them must not fail the run."""
    get_run_logger().warning("The server did not take the artifact %s: %s", key, error)
