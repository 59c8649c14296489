"""How far a stage is, in Prefect's UI: a progress artifact of its task, and lines in its log."""

import time
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from flows.prefect.pages import artifact_key
from flows.progress_lines import ProgressLines

PERIOD = 3.0  # seconds between two updates, at least
SHARE = 0.02  # of the time may go into updates: a slow server makes them rarer


class StageProgress:
    """Hears a stage's progress (as `session.Progress`) while its task runs."""

    def __init__(self, recipe: str, stage: str) -> None:
        self._recipe = recipe
        self._stage = stage
        self._artifact: UUID | None = None
        self._next_update = 0.0
        self._lines = ProgressLines(lambda text: get_run_logger().info("%s", text))
        self._lost = False

    def __call__(self, stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        """A step of the stage, or (with `bar`) of what is within its step: not shown here."""
        if bar or TaskRunContext.get() is None:
            return
        percent = 100.0 * done / total if total else 100.0
        self._lines(self._stage, done, total, what)
        now = time.monotonic()
        if now >= self._next_update:
            self._show(percent, f"{self._stage}: {what}")
            cost = time.monotonic() - now
            self._next_update = now + max(PERIOD, cost / SHARE)

    def end(self, status: str) -> None:
        """The stage is done; one that had nothing to do shows no bar."""
        if self._artifact is not None:
            self._show(100.0, f"{self._stage}: {status}")

    def _show(self, percent: float, description: str) -> None:
        if self._lost:
            return
        try:
            if self._artifact is None:
                key = artifact_key(self._recipe, self._stage, "progress")
                made: Any = create_progress_artifact(round(percent), key, description)
                self._artifact = made
            else:
                update_progress_artifact(self._artifact, round(percent), description)
        except (httpx.HTTPError, PrefectException) as error:
            # A bar is not worth a merge.
            self._lost = True
            get_run_logger().warning("The progress bar is lost (%s); the work goes on.", error)
