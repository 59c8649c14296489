"""The report's pictures, as PNG bytes."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from artifacts.store import Artifact
from crane_tasks.apply.results import Place, per_component
from crane_tasks.models.files.layout import layer_of_unit
from crane_tasks.numerics.edit import EditSums
from crane_tasks.numerics.projector import STEEPNESS
from crane_tasks.report.png import png
from crane_tasks.scores.reading import Scores

# A picture with a line per layer of a 48-layer model would be a blur: this many are shown.
LINES = 8
# S beyond this either way has the last colour there is.
FARTHEST = 6  # powers of two


def score_map(scores: Scores) -> bytes:
    """S per layer and component as a heat map; the colour is logarithmic around 1."""
    components = list(scores.per_component)
    layers = sorted(scores.per_layer)
    values = np.full((len(components), len(layers)), np.nan)
    for x, layer in enumerate(layers):
        for y, component in enumerate(components):
            values[y, x] = scores.per_layer[layer].get(component, np.nan)
    # A score of 0 has no logarithm: it takes the coldest colour there is.
    with np.errstate(divide="ignore"):
        whole = np.log2(values)
    logs = np.clip(whole, -FARTHEST, FARTHEST)
    figure = Figure(figsize=(max(5.0, 1.5 + 0.45 * len(layers)), 1.2 + 0.42 * len(components)))
    axes = figure.subplots()
    axes.set_facecolor("#d5d8dc")  # a component that a layer lacks is no score near 1
    image = axes.imshow(logs, aspect="auto", cmap="RdBu_r", vmin=-FARTHEST, vmax=FARTHEST)
    axes.set_yticks(range(len(components)), components)
    step = max(1, len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), [str(x) for x in layers[::step]])
    axes.set_xlabel("layer; grey: no such component; < and >: beyond the colours")
    for (y, x), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        text = f"{value:.2f}" if len(layers) <= 12 else ""
        if abs(whole[y, x]) > FARTHEST:
            text = f"{'<' if whole[y, x] < 0 else '>'}{text}"
        light = "white" if abs(logs[y, x]) > 3.5 else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color=light)
    bar = figure.colorbar(image, ax=axes)
    bar.set_ticks([-6, -3, 0, 3, 6], labels=["1/64", "1/8", "1", "8", "64"])
    axes.set_title("S: score per component and layer")
    return png(figure)


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
    rows = -(-max(1, len(spectra)) // 2)
    figure = Figure(figsize=(9.2, 3.6 * rows))
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for spare in panels[len(spectra) :]:
        spare.set_axis_off()
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
    for axes in panels[: 2 * rows : 2]:
        axes.set_ylabel("singular value / largest")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    return png(figure)


def edit_bars(edit: dict[str, EditSums]) -> bytes:
    """Per edited component: size of delta and edit relative to the base, and what survived."""
    components = [c for c, s in edit.items() if s.base2 > 0 and s.intended2 > 0]
    sums = [edit[c] for c in components]
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    at = np.arange(len(components))
    norms = {"delta": ("#b0bec5", "delta2"), "edit": ("#1f5fa8", "intended2")}
    for offset, (label, (colour, name)) in zip((-0.2, 0.2), norms.items(), strict=True):
        heights = [(getattr(s, name) / s.base2) ** 0.5 for s in sums]
        upper.bar(at + offset, heights, 0.4, label=label, color=colour)
    upper.set_title("norm relative to the base")
    survived: Mapping[str, list[float]] = {
        "norm ratio": [s.survived for s in sums],
        "cosine": [s.cosine for s in sums],
    }
    for offset, (label, values) in zip((-0.2, 0.2), survived.items(), strict=True):
        lower.bar(at + offset, values, 0.4, label=label)
    lower.axhline(1.0, color="grey", lw=0.7)
    lower.set_title("edit that survived rounding")
    for axes in (upper, lower):
        axes.set_xticks(at, components, fontsize=8)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return png(figure)


def edit_by_layer(edit: Mapping[Place, EditSums]) -> bytes:
    """Per layer and component: size of the edit relative to the base, and what survived."""
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    components = dict.fromkeys(c for layer, c in edit if layer is not None)
    for component in components:
        own = {
            layer: sums
            for (layer, c), sums in edit.items()
            if layer is not None and c == component and sums.intended2 > 0
        }
        layers = sorted(own)
        sizes = [(own[n].intended2 / own[n].base2) ** 0.5 for n in layers]
        upper.plot(layers, sizes, marker=".", lw=1, label=component)
        lower.plot(layers, [own[n].survived for n in layers], marker=".", lw=1)
    upper.set_title("norm of the edit relative to the base")
    upper.set_yscale("log")
    lower.set_title("norm that survived rounding")
    lower.axhline(1.0, color="grey", lw=0.7)
    lower.set_xlabel("layer")
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return png(figure)


def draw_all(
    scores: Scores | None, edit: Mapping[Place, EditSums], projector: Artifact | None, tau: float
) -> dict[str, tuple[str, bytes]]:
    """The pictures of what the edit has: file stem -> (title, PNG)."""
    drawn = {}
    if scores is not None:
        drawn["scores"] = ("S per component and layer", score_map(scores))
    if projector is not None:
        title = "Singular spectrum and protection per site"
        drawn["spectrum"] = (title, spectrum(projector, tau))
    drawn["edit"] = ("Edit size and survival per component", edit_bars(per_component(edit)))
    drawn["layers"] = ("Edit size and survival per layer", edit_by_layer(edit))
    return drawn
