"""The picture of a sweep: loss against alpha, the trade-off, and each further axis of the grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from crane_tasks.evaluate.choice import Choice, Metrics, Point, Requirement
from crane_tasks.evaluate.metrics import BY_NAME, GUARDS, SHARE
from crane_tasks.report.png import png

# Points that have their names beside them; more of them would hide one another.
NAMED = 12
# Lines that have a colour and a legend of their own.
LINES = 10
LONGEST = 40  # characters of a line's name
FURTHER = 4  # panels of further axes, at most
# Losses that differ by so much would lie on one another on a linear axis.
MANIFOLD = 10
PERCENT = 100.0  # shares are shown in percent
RED, GOLD = "#c0392b", "#f1c40f"
MARKS = {"base": "s", "donor": "D"}


def sweep_picture(
    points: Sequence[Point],
    choice: Choice,
    requirements: Sequence[Requirement],
    models: Mapping[str, Metrics],
) -> bytes:
    """Panels, one above the other: the objective against alpha, with a line for each tau and other
    change; against a metric that differs, with the front; and against each further axis.

    Points that miss a requirement are hollow; the best one is a star.
    """
    whole = _Sweep(points, choice, requirements, models)
    panels = [whole.along_alpha]
    if (across := whole.across()) is not None:
        panels.append(lambda axes: whole.traded(axes, across))
    for path in whole.further():
        panels.append(lambda axes, path=path: whole.along(axes, path))  # type: ignore[misc]
    figure = Figure(figsize=(7.6, 4.2 * len(panels)))
    figure.subplots_adjust(hspace=0.35)  # legends stand beside, whatever their width
    for axes, draw in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        draw(axes)
    return png(figure)


class _Sweep:
    def __init__(
        self,
        points: Sequence[Point],
        choice: Choice,
        requirements: Sequence[Requirement],
        models: Mapping[str, Metrics],
    ) -> None:
        self.points, self.choice = points, choice
        self.requirements, self.models = requirements, models
        self.objective = choice.axes[0]
        self.heights = [self._value(p.metrics, self.objective) for p in points]

    def _value(self, metrics: Metrics, name: str) -> float:
        scale = PERCENT if BY_NAME[name].unit == SHARE else 1.0
        return scale * float(metrics.get(name, np.nan))

    def across(self) -> str | None:
        """The metric of the front, or the next guard, that is not the same at all points."""
        for name in (*self.choice.axes[1:], *(m.name for m in GUARDS)):
            values = {p.metrics[name] for p in self.points if name in p.metrics}
            if len(values) > 1:
                return name
        return None

    def further(self) -> list[str]:
        """Axes of the grid besides alpha and tau; of a search's many those with few values."""
        values: dict[str, set[str]] = {path: set() for p in self.points for path in p.changes}
        for path, known in values.items():
            known |= {str(p.changes.get(path)) for p in self.points}
        return [path for path, known in values.items() if 1 < len(known) <= LINES][:FURTHER]

    def along_alpha(self, axes: Any) -> None:
        """The objective against alpha, a line for all that is alike but alpha."""
        groups: dict[str, list[int]] = {}
        for i, point in enumerate(self.points):
            more = [str(v) for v in point.changes.values()]
            groups.setdefault(" / ".join([f"tau {point.tau:g}", *more]), []).append(i)
        for number, (name, own) in enumerate(groups.items()):
            own.sort(key=lambda i: self.points[i].alpha)
            colour = colormaps["viridis"](0.9 * number / max(1, len(groups) - 1))
            label = name[:LONGEST] if len(groups) <= LINES else None
            places = [self.points[i].alpha for i in own]
            axes.plot(places, [self.heights[i] for i in own], color=colour, lw=1.2, label=label)
            self._dots(axes, own, places, [colour] * len(own))
        for name, style in zip(MARKS, (":", "--"), strict=True):
            height = self._value(self.models.get(name, {}), self.objective)
            if np.isfinite(height):
                axes.axhline(height, color="grey", lw=0.9, ls=style, label=name)
        self._finish(axes, "alpha", f"{BY_NAME[self.objective].title} against alpha")

    def traded(self, axes: Any, other: str) -> None:
        """The objective against another metric; the front as a line where it is the front's."""
        places = [self._value(p.metrics, other) for p in self.points]
        alphas = np.array([p.alpha for p in self.points])
        spread = np.ptp(alphas) or 1.0
        colours = [colormaps["viridis"](0.9 * (a - alphas.min()) / spread) for a in alphas]
        if other in self.choice.axes:
            front = self.choice.front
            axes.plot([places[i] for i in front], [self.heights[i] for i in front],
                      color=RED, lw=1.2, zorder=1, label="Pareto front")  # fmt: skip
        self._dots(axes, range(len(places)), places, colours)
        for name, marker in MARKS.items():
            if name in self.models:
                place = self._value(self.models[name], other)
                height = self._value(self.models[name], self.objective)
                axes.scatter(place, height, 40, "none", marker=marker, edgecolor="grey", label=name)
        self._bounds(axes, other)
        self._names(axes, places)
        metric = BY_NAME[other]
        label = f"{metric.title} (%)" if metric.unit == SHARE else metric.title
        axes.margins(0.14, 0.08)
        self._finish(axes, label, f"{BY_NAME[self.objective].title} against {metric.title}")

    def along(self, axes: Any, path: str) -> None:
        """The objective against another field of the recipe, whose values stand side by side."""
        values = sorted({str(p.changes.get(path)) for p in self.points})
        places = [values.index(str(p.changes.get(path))) for p in self.points]
        colours = [colormaps["viridis"](0.4)] * len(places)
        self._dots(axes, range(len(places)), places, colours)
        axes.set_xticks(range(len(values)), values)
        axes.margins(0.2, 0.08)
        self._finish(axes, path, f"{BY_NAME[self.objective].title} against {path}")

    def _dots(self, axes: Any, own: Any, places: Sequence[float], colours: Sequence[Any]) -> None:
        for i, place, colour in zip(own, places, colours, strict=True):
            face = colour if self.choice.meets[i] else "none"
            axes.scatter(place, self.heights[i], 42, [face], edgecolor=colour, zorder=3)
            if i == self.choice.best:
                axes.scatter(place, self.heights[i], 260, GOLD, marker="*", edgecolor="black",
                             zorder=2.5, label="best")  # fmt: skip

    def _bounds(self, axes: Any, other: str) -> None:
        for bound in self.requirements:
            style: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": ":", "label": str(bound)}
            if bound.metric == self.objective:
                axes.axhline(bound.bound, **style)
            elif bound.metric == other:
                scale = PERCENT if BY_NAME[other].unit == SHARE else 1.0
                axes.axvline(scale * bound.bound, **style)

    def _names(self, axes: Any, places: Sequence[float]) -> None:
        """Names beside the points where they are few; those in one place share one text."""
        if len(self.points) > NAMED:
            return
        texts: dict[tuple[float, float], list[str]] = {}
        for i, point in enumerate(self.points):
            spot = (places[i], self.heights[i])
            if np.isfinite(spot).all():
                values = (point.alpha, point.tau, *point.changes.values())
                text = " / ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
                texts.setdefault(spot, []).append(text)
        middle = np.mean([place for place, _ in texts]) if texts else 0.0
        for spot, names in texts.items():
            side, align = (-9, "right") if spot[0] > middle else (9, "left")
            axes.annotate("\n".join(names), spot, xytext=(side, 0), textcoords="offset points",
                          ha=align, va="center", fontsize=7)  # fmt: skip

    def _finish(self, axes: Any, across: str, title: str) -> None:
        known = [h for h in self.heights if np.isfinite(h)]
        if known and min(known) > 0 and max(known) > MANIFOLD * min(known):
            axes.set_yscale("log")
        axes.set(xlabel=across, ylabel=BY_NAME[self.objective].title)
        axes.set_title(title, fontsize=10)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
