"""What a sweep did and found, as a report and as JSON."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crane_tasks.evaluate.choice import (
    Choice,
    Metrics,
    Point,
    Requirement,
    choose,
    shortfall,
)
from crane_tasks.recipe import Recipe
from crane_tasks.report.finite import finite
from crane_tasks.report.sweep import SweepReport, write_sweep_report

REDRAWN = 20.0  # seconds after which a growing sweep's picture is drawn anew


@dataclass
class Sweep:
    """What a sweep did and found.

    Attributes:
        points: the finished ones, in the order of the grid.
        models: metrics of base and donor.
        planned: how many points the grid has.
        written: the folder of the best point's checkpoint, if it was materialised.
        report: the HTML page.
    """

    recipe: Recipe
    output: Path
    requirements: list[Requirement]
    planned: int
    points: list[Point] = field(default_factory=list)
    models: dict[str, Metrics] = field(default_factory=dict)
    written: Path | None = None
    report: Path | None = None
    _drawn: float | None = field(default=None, repr=False)

    @property
    def choice(self) -> Choice:
        return choose(self.points, self.requirements)

    @property
    def problem(self) -> str | None:
        """Why the sweep is no success although it came to its end, or None."""
        if len(self.points) < self.planned:
            return None
        if not any(self.choice.meets):
            return shortfall(self.points, self.requirements)
        failed = [p for p in self.points if p.error is not None]
        if failed:
            return f"{len(failed)} of {self.planned} points failed. {failed[0]}: {failed[0].error}"
        return None

    def as_json(self) -> dict[str, Any]:
        """The object that `crane sweep --json` prints."""
        choice = self.choice
        record: dict[str, Any] = {
            "name": self.recipe.name,
            "output": str(self.output),
            "report": str(self.report) if self.report else None,
            "require": [str(r) for r in self.requirements],
            "models": self.models,
            "points": [_point_json(p, i, choice) for i, p in enumerate(self.points)],
            "pareto": choice.front,
            "best": choice.best,
            "alike": choice.alike,
            "written": str(self.written) if self.written else None,
        }
        return dict(finite(record))

    def write(self) -> None:
        """Write the report of what there is; to draw it takes a second, which not every point is
        worth."""
        report, now = self._report(), time.monotonic()
        complete = len(self.points) >= self.planned
        draw = complete or self._drawn is None or now - self._drawn > REDRAWN
        self.report = write_sweep_report(report, self.output, draw=draw)
        if draw and report.choice.front:
            self._drawn = now

    def _report(self) -> SweepReport:
        return SweepReport(
            recipe=self.recipe,
            points=self.points,
            choice=self.choice,
            requirements=self.requirements,
            models=self.models,
            planned=self.planned,
            problem=self.problem,
            record=self.as_json(),
        )


def _point_json(point: Point, place: int, choice: Choice) -> dict[str, Any]:
    error = {} if point.error is None else {"error": point.error}
    return {
        "name": point.name,
        "alpha": point.alpha,
        "tau": point.tau,
        "set": dict(point.changes),
        "status": point.status,
        "seconds": round(point.seconds, 3),
        "key": point.key,
        "metrics": dict(point.metrics),
        "intervals": {
            name: [point.ends[f"{name}.low"], point.ends[f"{name}.high"]]
            for name in point.metrics
            if f"{name}.low" in point.ends
        },
        "pareto": place in choice.front,
        "meets": choice.meets[place],
        **error,
    }
