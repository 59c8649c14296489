"""The report's pictures, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from artifacts.store import Artifact
from crane_tasks.evaluate.choice import Choice, Metrics, Point, Requirement
from crane_tasks.evaluate.metrics import BY_NAME, SHARE, Metric
from crane_tasks.models.files.layout import layer_of_unit
from crane_tasks.numerics.edit import EditSums
from crane_tasks.numerics.projector import STEEPNESS
from crane_tasks.scores.reading import Scores

DPI = 110
# A picture with a line per layer of a 48-layer model would be a blur: this many are shown.
LINES = 8
# Points of a sweep that all have their names beside them; of more, the front's alone.
NAMED = 12
# Losses that differ by so much would lie on one another on a linear axis.
MANIFOLD = 10
PERCENT = 100.0  # shares are shown in percent


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def score_map(scores: Scores) -> bytes:
    """S per layer and component as a heat map; the colour is logarithmic around 1."""
    components = list(scores.per_component)
    layers = sorted(scores.per_layer)
    values = np.full((len(components), len(layers)), np.nan)
    for x, layer in enumerate(layers):
        for y, component in enumerate(components):
            values[y, x] = scores.per_layer[layer].get(component, np.nan)
    # A score of 0 has no logarithm: it takes the coldest colour there is.
    logs = np.log2(np.clip(values, 2.0**-6, 2.0**6))
    figure = Figure(figsize=(max(5.0, 1.5 + 0.45 * len(layers)), 1.2 + 0.42 * len(components)))
    axes = figure.subplots()
    image = axes.imshow(logs, aspect="auto", cmap="RdBu_r", vmin=-6, vmax=6)
    axes.set_yticks(range(len(components)), components)
    step = max(1, len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), [str(x) for x in layers[::step]])
    axes.set_xlabel("layer")
    if len(layers) <= 12:
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                light = abs(logs[y, x]) > 3.5
                axes.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if light else "black",
                )
    bar = figure.colorbar(image, ax=axes)
    bar.set_ticks([-6, -3, 0, 3, 6], labels=["1/64", "1/8", "1", "8", "64"])
    axes.set_title("S: score per component and layer")
    return _png(figure)


def _spectra(projector: Artifact) -> dict[str, dict[int, np.ndarray]]:
    """σ / σ₁ per site and layer; for an expert site, the expert with the most rows."""
    spectra: dict[str, dict[int, np.ndarray]] = {}
    for unit in projector.units():
        layer = layer_of_unit(unit)
        assert layer is not None, "sites lie in layers"
        for array in projector.arrays(unit):
            site, _, kind = array.rpartition(".")
            if kind != "sigma":
                continue
            sigma = projector.read(unit, array).numpy()
            if sigma.ndim == 2:
                sigma = sigma[int(projector.read(unit, f"{site}.rows").argmax())]
            sigma = sigma[sigma > 0]
            if sigma.size:
                spectra.setdefault(site, {})[layer] = sigma / sigma[0]
    return spectra


def spectrum(projector: Artifact, tau: float) -> bytes:
    """Singular values relative to the first, per site, and the sigmoid's weight at tau."""
    spectra = _spectra(projector)
    figure = Figure(figsize=(4.6 * max(1, len(spectra)), 3.6))
    panels = figure.subplots(1, max(1, len(spectra)), squeeze=False)[0]
    for axes, (site, lines) in zip(panels, sorted(spectra.items()), strict=False):
        layers = sorted(lines)
        chosen = sorted({layers[i] for i in np.linspace(0, len(layers) - 1, LINES, dtype=int)})
        for index, layer in enumerate(chosen):
            shade = colormaps["viridis"](0.9 * index / max(1, len(chosen) - 1))
            axes.plot(
                np.arange(1, lines[layer].size + 1),
                lines[layer],
                color=shade,
                lw=1,
                label=f"layer {layer}",
            )
        axes.axhline(tau, color="#c0392b", lw=1, ls="--", label=f"tau = {tau:g}")
        axes.set(xscale="log", yscale="log", title=site, xlabel="direction")
        for axis in (axes.xaxis, axes.yaxis):  # names of small ticks take most of the time
            axis.set_minor_formatter(NullFormatter())
        lowest = min(float(line.min()) for line in lines.values())
        axes.set_ylim(bottom=0.3 * min(lowest, tau), top=1.5)
        weight = axes.twiny()
        levels = np.geomspace(0.3 * min(lowest, tau), 1.0, 400)
        exponent = np.clip(STEEPNESS / tau * (levels - tau), -60, 60)
        weight.plot(1 / (1 + np.exp(-exponent)), levels, color="#c0392b", alpha=0.5)
        weight.set_xlim(0, 1.02)
        weight.set_xlabel("protection w", color="#c0392b", fontsize=8)
    panels[0].set_ylabel("singular value / largest")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    return _png(figure)


def edit_bars(edit: dict[str, EditSums]) -> bytes:
    """Per edited component: size of delta and edit relative to the base, and what survived."""
    components = [c for c, s in edit.items() if s.base2 > 0 and s.intended2 > 0]
    sums = [edit[c] for c in components]
    figure = Figure(figsize=(9.5, 3.4))
    left, right = figure.subplots(1, 2)
    at = np.arange(len(components))
    left.bar(
        at - 0.2, [(s.delta2 / s.base2) ** 0.5 for s in sums], 0.4, label="delta", color="#b0bec5"
    )
    left.bar(
        at + 0.2, [(s.intended2 / s.base2) ** 0.5 for s in sums], 0.4, label="edit", color="#1f5fa8"
    )
    left.set_title("norm relative to the base")
    left.legend(fontsize=8)
    survived: Mapping[str, list[float]] = {
        "norm ratio": [s.survived for s in sums],
        "cosine": [s.cosine for s in sums],
    }
    for offset, (label, values) in zip((-0.2, 0.2), survived.items(), strict=True):
        right.bar(at + offset, values, 0.4, label=label)
    right.axhline(1.0, color="grey", lw=0.7)
    right.set_title("edit that survived rounding")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xticks(at, components, rotation=30, ha="right", fontsize=8)
    figure.tight_layout()
    return _png(figure)


def draw_all(
    scores: Scores | None, edit: dict[str, EditSums], projector: Artifact | None, tau: float
) -> dict[str, tuple[str, bytes]]:
    """The pictures of what the edit has: file stem -> (title, PNG)."""
    drawn = {}
    if scores is not None:
        drawn["scores"] = ("S per component and layer", score_map(scores))
    if projector is not None:
        title = "Singular spectrum and protection per site"
        drawn["spectrum"] = (title, spectrum(projector, tau))
    drawn["edit"] = ("Edit size and survival per component", edit_bars(edit))
    return drawn


def trade_off(
    points: Sequence[Point],
    choice: Choice,
    requirements: Sequence[Requirement],
    models: Mapping[str, Metrics],
) -> bytes:
    """The points of a sweep by the two metrics of its front, which is drawn as a line.

    Base and donor are shown where they lie, bounds that are required as dotted lines.
    """
    objective, other = choice.axes
    figure = Figure(figsize=(8.0, 5.2))
    axes = figure.subplots()

    def place(metrics: Metrics) -> tuple[float, float]:
        return _scale(other) * metrics.get(other, np.nan), metrics.get(objective, np.nan)

    spots = np.array([place(p.metrics) for p in points], dtype=float)
    alphas = [p.alpha for p in points]
    x, y = spots.T
    front = spots[choice.front].T
    axes.plot(front[0], front[1], color="#c0392b", lw=1.2, zorder=1, label="Pareto front")
    axes.scatter(front[0], front[1], 110, "none", edgecolor="#c0392b", lw=1.4, zorder=4)
    dots = axes.scatter(x, y, 46, alphas, cmap="viridis", zorder=3, edgecolor="white")
    if choice.best is not None:
        label, (bx, by) = f"best: {points[choice.best]}", spots[choice.best]
        axes.scatter(bx, by, 330, "#f1c40f", marker="*", zorder=2.5, edgecolor="black", label=label)
    for name, marker in (("base", "s"), ("donor", "D")):
        if name in models:
            mx, my = place(models[name])
            axes.scatter(mx, my, 40, "none", marker=marker, edgecolor="grey", label=name)
    for bound in requirements:
        _bound_line(axes, bound, choice.axes)
    losses = y[np.isfinite(y)]
    if losses.min() > 0 and losses.max() > MANIFOLD * losses.min():
        axes.set_yscale("log")
    axes.margins(0.16, 0.08)
    _name_points(axes, points, choice, spots)
    if len(set(alphas)) > 1:
        figure.colorbar(dots, ax=axes, label="alpha")
    _name_axes(axes, points, BY_NAME[other], BY_NAME[objective])
    return _png(figure)


def _name_axes(axes: Any, points: Sequence[Point], across: Metric, up: Metric) -> None:
    percent = " (%)" if across.unit == SHARE else ""
    axes.set(xlabel=f"{across.title}{percent}", ylabel=up.title)
    axes.legend(fontsize=8)
    named = " / ".join(["alpha", "tau", *points[0].changes])
    axes.set_title(f"{up.title} against {across.title}; labels: {named}", fontsize=10)


def _scale(metric: str) -> float:
    return PERCENT if BY_NAME[metric].unit == SHARE else 1.0


def _bound_line(axes: Any, bound: Requirement, metrics: Sequence[str]) -> None:
    objective, other = metrics
    style: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": ":", "label": str(bound)}
    if bound.metric == objective:
        axes.axhline(bound.bound, **style)
    elif bound.metric == other:
        axes.axvline(_scale(other) * bound.bound, **style)


def _name_points(axes: Any, points: Sequence[Point], choice: Choice, spots: np.ndarray) -> None:
    """Names beside the points; those that lie in one place share one text."""
    chosen = range(len(points)) if len(points) <= NAMED else choice.front
    texts: dict[tuple[float, ...], list[str]] = {}
    for i in chosen:
        if np.isfinite(spots[i]).all():
            values = (points[i].alpha, points[i].tau, *points[i].changes.values())
            text = " / ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
            texts.setdefault(tuple(spots[i]), []).append(text)
    # By turns on either side: rates crowd at 100 %, one above the other.
    for number, (spot, names) in enumerate(sorted(texts.items(), key=lambda item: item[0][1])):
        side, align = ((-9, "right"), (9, "left"))[number % 2]
        axes.annotate("\n".join(names), spot, xytext=(side, 0), textcoords="offset points",
                      ha=align, va="center", fontsize=7)  # fmt: skip
