"""Choosing among the points of a sweep: what is required, the Pareto front, the best."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.metrics import BY_NAME, GUARDS, OBJECTIVE, metric_named
from crane_tasks.numerics.intervals import bootstrap_mean
from crane_tasks.places import point_name

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
REQUIREMENT = re.compile(r"\s*(\w+)(\.low|\.high)?\s*(>=|<=|>|<)\s*(\S+)\s*")
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Requirement:
    """A bound that a metric of the merged model must keep, or an end of its interval."""

    metric: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.bound:g}"

    def met(self, metrics: Metrics) -> bool:
        """Whether it is kept; what could not be measured keeps nothing."""
        value = metrics.get(self.metric, math.nan)
        return bool(OPERATORS[self.comparison](value, self.bound))

    def gap(self, metrics: Metrics) -> float:
        """How much is missing: 0 if it is met, infinite if nothing was measured."""
        if self.met(metrics):
            return 0.0
        gap = abs(metrics.get(self.metric, math.nan) - self.bound)
        return gap if math.isfinite(gap) else math.inf


def read_requirement(text: str) -> Requirement:
    """`tool_calls>=0.99`, say; or of its interval at 95 % the lower end: `tool_calls.low>=0.97`.

    Raises:
        RecipeError: it is not METRIC, an operator and a number, or there is no such metric.
    """
    match = REQUIREMENT.fullmatch(text)
    try:
        bound = float(match[4]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise RecipeError(
            f"--require {text}: write METRIC>=NUMBER, with one of {' '.join(OPERATORS)}, or "
            "METRIC.low>=NUMBER of its interval"
        )
    metric = metric_named(match[1], f"--require {text}")
    if match[2] and not metric.sampled:
        raise RecipeError(f"--require {text}: {metric.name} has no interval")
    return Requirement(f"{metric.name}{match[2] or ''}", match[3], bound)


@dataclass(frozen=True)
class Point:
    """A point of the grid and what was found there.

    Attributes:
        changes: other recipe fields than alpha and tau, by dotted path.
        status: computed, resumed or reused; failed if it has no metrics but an `error`.
        key: of its comparison in the store.
        metrics: of the merged model.
        ends: `METRIC.low` and `METRIC.high` of their intervals.
        losses: its reasoning loss on every row.
    """

    alpha: float
    tau: float
    status: str
    seconds: float
    key: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    ends: Metrics = field(default_factory=dict)
    losses: Sequence[float] = ()

    @property
    def known(self) -> Metrics:
        """What a requirement may be of: metrics, and the ends of their intervals."""
        return {**self.metrics, **self.ends}

    @property
    def name(self) -> str:
        return point_name(self.alpha, self.tau, self.changes)

    def __str__(self) -> str:
        fields = {"alpha": self.alpha, "tau": self.tau, **self.changes}
        return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                         for k, v in fields.items())  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What the points come to; places count through the points.

    Attributes:
        axes: the metrics of the front: the objective, then what is traded against it.
        front: the points that no other one beats, by falling objective.
        meets: whether each point keeps every requirement.
        best: of those that do, the one with the lowest reasoning loss; then the most tool
            calls, then the smallest alpha. None if there is none.
        alike: the others of those whose reasoning loss cannot be told from the best one's by the
            rows: the interval of the paired difference, at 95 %, holds 0.
    """

    axes: tuple[str, ...]
    front: list[int]
    meets: list[bool]
    best: int | None
    alike: list[int] = field(default_factory=list)


def choose(points: Sequence[Point], requirements: Sequence[Requirement]) -> Choice:
    """Front and best of the points."""
    axes = axes_of(points)
    front = _front([_goodness(p.metrics, axes) for p in points]) if axes else []
    front.sort(key=lambda i: -points[i].metrics[axes[0]])
    meets = [p.error is None and all(r.met(p.known) for r in requirements) for p in points]
    best = next((i for i in ranked(points) if meets[i]), None)
    return Choice(axes, front, meets, best, _alike(points, meets, best))


def _alike(points: Sequence[Point], meets: Sequence[bool], best: int | None) -> list[int]:
    if best is None:
        return []
    own = points[best].losses
    found = []
    for place, point in enumerate(points):
        if place == best or not meets[place] or len(point.losses) != len(own):
            continue
        low, _ = bootstrap_mean([b - a for a, b in zip(own, point.losses, strict=True)])
        if low <= 0.0:
            found.append(place)
    return found


def ranked(points: Sequence[Point]) -> list[int]:
    """The places of the points whose reasoning loss is known, the best first."""
    known = [i for i, p in enumerate(points) if math.isfinite(_value(p, OBJECTIVE.name))]
    return sorted(known, key=lambda i: _rank(points[i]))


def axes_of(points: Sequence[Point]) -> tuple[str, ...]:
    """The metrics that a front is made of: those that any point has."""
    measured = {name for p in points for name in p.metrics}
    others = [m.name for m in GUARDS if m.name in measured][:1]
    return tuple(name for name in (OBJECTIVE.name, *others) if name in measured)


def _value(point: Point, metric: str) -> float:
    return point.metrics.get(metric, math.nan)


def _rank(point: Point) -> tuple[float, float, float]:
    guard = GUARDS[0].sign * _value(point, GUARDS[0].name)
    return _value(point, OBJECTIVE.name), -guard if guard == guard else 0.0, point.alpha


def _goodness(metrics: Metrics, axes: Sequence[str]) -> tuple[float, ...]:
    """The point's place, more being better on every axis; NaN where nothing was measured."""
    return tuple(BY_NAME[name].sign * metrics.get(name, math.nan) for name in axes)


def _front(places: Sequence[tuple[float, ...]]) -> list[int]:
    """The places that no other one beats: nowhere worse, somewhere better."""
    known = [i for i, place in enumerate(places) if all(map(math.isfinite, place))]
    return [
        i
        for i in known
        if not any(
            places[j] != places[i] and all(map(operator.ge, places[j], places[i])) for j in known
        )
    ]


def shortfall(points: Sequence[Point], requirements: Sequence[Requirement]) -> str:
    """That no point keeps every requirement, and how near the best came."""
    wanted = ", ".join(map(str, requirements))
    sound = [p for p in points if p.error is None]
    if not sound:
        return f"No point could be measured: {points[0].error}"
    near = min(sound, key=lambda p: (_distance(p, requirements), _rank(p)))
    lacking = [
        f"{r.metric} {near.known.get(r.metric, math.nan):.4g}"
        + (f" ({r.gap(near.known):.2g} short)" if math.isfinite(r.gap(near.known)) else "")
        for r in requirements
        if not r.met(near.known)
    ]
    return f"No point meets {wanted}. Nearest: {near} with {', '.join(lacking)}."


def _distance(point: Point, requirements: Sequence[Requirement]) -> float:
    """How far a point is from what is required: the gaps, each relative to its bound."""
    gaps = [(r.gap(point.known), abs(r.bound)) for r in requirements]
    return sum(gap / bound if bound else gap for gap, bound in gaps)
