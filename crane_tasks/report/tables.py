"""The tables that terminal, report and Prefect's page show: (head, rows of cells)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from artifacts.store import Artifact
from artifacts.tables import read_table
from crane_tasks.delta import read_statistics
from crane_tasks.evaluate.metrics import METRICS, Metric
from crane_tasks.evaluate.suites import numbers_of
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.numerics.edit import EditSums
from crane_tasks.numerics.scores import GainSums, pooled
from crane_tasks.scores.agreement import Agreement, Correlation
from crane_tasks.scores.reading import Scores, layer_sums
from crane_tasks.sizes import PLAIN

Cells = tuple[list[str], list[list[str]]]
NONE = "–"


def evaluation_table(evaluation: Mapping[str, Any]) -> Cells:
    """The metrics that any model has, a row each: its values with their intervals."""
    models: dict[str, dict[str, float]] = evaluation.get("models", {})
    intervals = evaluation.get("intervals", {})
    metrics = [m for m in METRICS if any(m.name in values for values in models.values())]

    def cell(metric: Metric, name: str) -> str:
        value, ends = models[name].get(metric.name), intervals.get(name, {}).get(metric.name)
        return metric.shown(value) + (f" ({metric.between(*ends)})" if ends else "")

    return ["metric", *models], [[m.title, *(cell(m, n) for n in models)] for m in metrics]


def against_base_table(evaluation: Mapping[str, Any]) -> Cells:
    """What the last model changes against the base on the same rows, a metric each."""
    compared: dict[str, dict[str, dict[str, float]]] = evaluation.get("against_base", {})
    name = list(compared)[-1] if compared else ""
    rows, found = [], compared.get(name, {})
    for metric in METRICS:
        if (one := found.get(metric.name)) is None:
            continue
        tested = "p" in one and metric.better
        counts = [f"{one['lost']}", f"{one['gained']}", f"{one['p']:.2g}"] if tested else []
        cells = [metric.changed(one["difference"]),
                 f"{metric.changed(one['low'])} to {metric.changed(one['high'])}"]  # fmt: skip
        rows.append([metric.title, *cells, *counts, *[NONE] * (3 - len(counts))])
    return ["against base", "difference", "at 95 %", "lost", "gained", "McNemar p"], rows


def suites_table(evaluation: Mapping[str, Any]) -> Cells:
    """The harness's metrics of every task, with their standard errors, by model."""
    suites: dict[str, dict[str, dict[str, dict[str, Any]]]] = evaluation.get("suites", {})
    rows = []
    first: dict[str, dict[str, Any]] = next(iter(suites.values()), {"results": {}})
    for task, metric in numbers_of(first["results"]):
        name, _, kind = metric.partition(",")
        cells = [_suite_cell(own["results"][task], name, kind) for own in suites.values()]
        rows.append([f"{task}: {name}" + (f" ({kind})" if kind != "none" else ""), *cells])
    return ["task", *suites], rows


def _suite_cell(found: Mapping[str, Any], name: str, kind: str) -> str:
    value, error = found.get(f"{name},{kind}"), found.get(f"{name}_stderr,{kind}")
    if not isinstance(value, int | float):
        return NONE
    return f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def unfinished_note(evaluation: Mapping[str, Any]) -> str:
    """Whose answers were cut, or have a cut target; empty if none."""
    cut = [
        f"{model} {count} of the {name} set"
        for model, counts in evaluation.get("unended", {}).items()
        for name, count in counts.items()
    ]
    if not cut:
        return ""
    return (
        "Answers that did not end within `evaluate.max_new_tokens`, or whose target did not, count "
        f"as wrong: {', '.join(cut)}."
    )


def prediction_table(evaluation: Mapping[str, Any]) -> Cells:
    """The change of calibration loss that the gate predicted, and the realised one."""
    gate = evaluation.get("gate", {})
    rows = [
        [name, NONE if gate["predicted"][name] is None else f"{gate['predicted'][name]:+.4f}",
         f"{realised:+.4f}"]
        for name, realised in gate.get("realised", {}).items()
    ]  # fmt: skip
    return ["set", "predicted", "realised"], rows


def score_table(scores: Scores) -> Cells:
    """S: a row per layer, and one for all of them."""
    components = list(scores.per_component)
    layers = {str(layer): row for layer, row in scores.per_layer.items()}
    layers["all"] = scores.per_component
    rows = [
        [layer, *(f"{row[c]:.4f}" if c in row else NONE for c in components)]
        for layer, row in layers.items()
    ]
    return ["layer", *components], rows


def agreement_table(found: Agreement) -> Cells:
    """Rank correlation of S between halves: a row per component, per layer, and for all pairs."""

    def row(place: str, told: Correlation, *more: float) -> list[str]:
        numbers = (told.mean, told.low, *more)
        cells = [NONE if math.isnan(x) else f"{x:.4f}" for x in numbers]
        return [place, *cells, *[NONE] * (4 - len(cells))]

    rows = [
        row(c, told, found.scores.per_component[c], found.variation[c])
        for c, told in found.per_component.items()
    ]
    rows += [row(f"layer {layer}", told) for layer, told in found.per_layer.items()]
    rows.append(row("all", found.overall))
    return ["over", "rank correlation", "5th percentile", "S", "variation of S"], rows


def gain_table(scores: Scores, artifact: Artifact) -> Cells:
    """What S is made of, over all layers.

    The slopes are minus the first-order change of each set's loss along the whole delta; a
    norm far above its slope means that coordinates pull against one another.
    """
    total: dict[str, GainSums] = pooled(layer_sums(artifact).values())
    rows = [
        [component, f"{scores.per_component.get(component, float('nan')):.4f}", f"{s.p:.4g}",
         f"{s.s_r:+.4g}", f"{s.s_a:+.4g}", f"{s.s_r2**0.5:.4g}", f"{s.s_a2**0.5:.4g}",
         _ratio(s.delta2, s.base2)]
        for component, s in total.items()
    ]  # fmt: skip
    head = ["component", "S", "agreed gain", "slope R", "slope A", "norm R", "norm A",
            "delta / base"]  # fmt: skip
    return head, rows


def delta_table(base: Checkpoint, delta: Artifact, threshold: Artifact | None) -> Cells:
    """How far the donor is from the base, and what T keeps of it, per component."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for slot in base.slots.values():
        row = sums[slot.component]
        for values in read_statistics(delta, slot):
            for name in ("delta2", "base2", "donor2", "numel"):
                row[name] += values[name]
            row["max_abs"] = max(row["max_abs"], values["max_abs"])
    for component, kept in _kept(threshold).items():
        for name, value in kept.items():
            sums[component][name] += value
    rows = [
        [component, _ratio(s["delta2"], s["base2"]), _ratio(s["donor2"], s["base2"]),
         f"{s['max_abs']:.3g}",
         f"{s['kept'] / s['counted']:.1%}" if s["counted"] else NONE,
         f"{(s['kept2'] / s['whole2']) ** 0.5:.3f}" if s["whole2"] else NONE]
        for component, s in sums.items()
    ]  # fmt: skip
    head = ["component", "delta / base", "donor / base", "largest", "kept by T",
            "norm of T / delta"]  # fmt: skip
    return head, rows


def _kept(threshold: Artifact | None) -> dict[str, dict[str, float]]:
    """Per component what T keeps: entries, and the squared norms of T(δ) and δ."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    if threshold is None:
        return sums
    for unit in threshold.units():
        table = read_table(threshold, unit, "tensors")
        for component, values in zip(table.components, table.values, strict=True):
            row = dict(zip(table.columns, values, strict=True))
            sums[component]["kept"] += row["kept"]
            sums[component]["counted"] += row["numel"]
            sums[component]["kept2"] += row["norm"] ** 2
            sums[component]["whole2"] += row["delta_norm"] ** 2
    return sums


def edit_table(edit: Mapping[str, EditSums], scores: Scores | None) -> Cells:
    """Size of the edit per component, and what rounding left of it."""
    rows = [
        [component, _score(scores, component), *_edit_cells(s)] for component, s in edit.items()
    ]
    return ["component", "S", *EDIT_HEAD], rows


def layer_table(edit: Mapping[int, EditSums]) -> Cells:
    """The same per layer, over its components."""
    rows = [[str(layer), *_edit_cells(s)] for layer, s in edit.items()]
    return ["layer", *EDIT_HEAD], rows


EDIT_HEAD = ["edit / base", "delta / base", "survived", "cosine", "changed"]


def _edit_cells(s: EditSums) -> list[str]:
    return [
        _ratio(s.intended2, s.base2),
        _ratio(s.delta2, s.base2),
        f"{s.survived:.3f}" if s.intended2 else NONE,
        f"{s.cosine:.3f}" if s.intended2 else NONE,
        f"{s.changed / s.numel:.1%}" if s.numel else NONE,
    ]


def _score(scores: Scores | None, component: str) -> str:
    known = scores is not None and component not in PLAIN and component in scores.per_component
    return f"{scores.per_component[component]:.4f}" if scores and known else NONE


def _ratio(part2: float, whole2: float) -> str:
    """Of two squared norms the ratio of the norms."""
    return f"{(part2 / whole2) ** 0.5:.2e}" if whole2 else NONE


def records(table: Cells) -> Iterable[dict[str, str]]:
    """A table as a mapping per row."""
    head, rows = table
    return (dict(zip(head, row, strict=True)) for row in rows)
