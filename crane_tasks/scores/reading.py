"""S(c, l), aggregated from the sums that the stage `scores` has stored."""

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from artifacts.store import Artifact
from artifacts.tables import read_table
from crane_tasks.errors import ScoreError
from crane_tasks.models.files.layout import Layout, Slot, layer_of_unit
from crane_tasks.numerics.scores import GainSums, NoGain, normalised, pooled, refined


@dataclass(frozen=True)
class Scores:
    """S(c, l) per layer and S(c) over all layers, with the baselines that divided them.

    A layer without any delta has S = 0, and no baseline.
    """

    per_layer: dict[int, dict[str, float]]
    per_component: dict[str, float]
    baseline: dict[int, str]

    def of(self, slot: Slot) -> float:
        """The factor of a slot: its layer's score, or S(c) outside the layers."""
        return self.at(slot.layer, slot.component)

    def at(self, layer: int | None, component: str) -> float:
        """The factor of a component in a layer, or outside the layers."""
        return (self.per_component if layer is None else self.per_layer[layer])[component]

    def as_json(self) -> dict[str, Any]:
        """The scores as JSON values."""
        return {
            "per_layer": {str(layer): row for layer, row in self.per_layer.items()},
            "per_component": self.per_component,
        }


def alpha_by_rule(artifact: Artifact, scores: Scores) -> float:
    """Σ S p / Σ S² (s_R² + s_A²) over layers and components: a step of Newton's method along the
    scored delta, with the squared slopes in place of the curvature. It is what one of the
    method's scripts prints; its scale is that of the losses, and nothing uses it.
    """
    gain, curvature = 0.0, 0.0
    for layer, parts in layer_sums(artifact).items():
        for component, sums in parts.items():
            score = scores.at(layer, component)
            gain += score * sums.p
            curvature += score**2 * (sums.s_r2 + sums.s_a2)
    return gain / curvature if curvature > 0 else math.nan


def layer_sums(artifact: Artifact) -> dict[int | None, dict[str, GainSums]]:
    """The gate's sums per layer (None: outside) and component."""
    layers: dict[int | None, dict[str, GainSums]] = {}
    for unit in artifact.units():
        sums: dict[str, GainSums] = {}
        for _, component, row in read_table(artifact, unit, "tensors").rows(GainSums):
            sums[component] = sums.get(component, GainSums()) + row
        layers[layer_of_unit(unit)] = sums
    return layers


def read_scores(
    artifact: Artifact, layout: Layout, baseline: str, *, unify: bool = False
) -> Scores:
    """S of an artifact of the scores, as `scores_from`."""
    sums = layer_sums(artifact)
    frozen = {k for k, parts in sums.items() if not any(s.delta2 for s in parts.values())}
    return scores_from(sums, layout, baseline, unify=unify, frozen=frozen)


def scores_from(
    sums: Mapping[int | None, Mapping[str, GainSums]],
    layout: Layout,
    baseline: str,
    *,
    unify: bool,
    frozen: Collection[int | None] = (),
) -> Scores:
    """Aggregate and normalise (docs/method.md, "S").

    Baseline "auto" is, layer by layer, the first of the layout's candidates that the layer has:
    a dense layer of a sparse model is measured by its ffn. In `frozen` layers donor and base are
    equal: they have S = 0, and no part in S(c).

    Raises:
        ScoreError: another layer's baseline has no positive gain.
    """
    parts_of = {layer: set(parts) for layer, parts in sums.items()}
    if unify:
        sums = {layer: unified(parts) for layer, parts in sums.items()}
    candidates = layout.baseline if baseline == "auto" else (baseline,)

    def chosen(parts: Mapping[str, GainSums]) -> str:
        return next((c for c in candidates if c in parts), candidates[0])

    layers = {layer: sums[layer] for layer in sorted(k for k in sums if k is not None)}
    moved = {layer: parts for layer, parts in layers.items() if layer not in frozen}
    per_layer = {layer: dict.fromkeys(parts, 0.0) for layer, parts in layers.items()}
    # The layers alone: the final norm takes S(norm), it does not enter it.
    total = pooled(moved.values())
    per_component = dict.fromkeys(pooled(layers.values()), 0.0)
    if moved:
        for layer, parts in moved.items():
            per_layer[layer] = _normalised(parts, chosen(parts), f"layer {layer}")
        per_component |= _normalised(total, chosen(total), "all layers")
    if unify:
        per_layer = {i: _shared(row, parts_of[i]) for i, row in per_layer.items()}
        per_component = _shared(per_component, set().union(*parts_of.values()))
    return Scores(per_layer, per_component, {k: chosen(v) for k, v in moved.items()})


def _normalised(parts: Mapping[str, GainSums], baseline: str, place: str) -> dict[str, float]:
    """S(c) of one layer or of all.

    Raises:
        ScoreError: the baseline has no positive gain; with what would give one.
    """
    try:
        return normalised(parts, baseline, place)
    except NoGain as error:
        moved = [c for c, sums in parts.items() if sums.delta2 > 0]
        cure = "Add calibration prompts, or choose another gate.baseline."
        if moved and baseline in parts and baseline not in moved:
            cure = (
                "Base and donor have the same weights there: choose a gate.baseline that differs "
                f"({', '.join(moved)})."
            )
        raise ScoreError(f"{error}, so the scores cannot be normalised. {cure}") from error


def part_scores(
    artifact: Artifact, scores: Scores, part_of: Callable[[str], Hashable]
) -> dict[str, float]:
    """S of every tensor by name, where the parts of a component have scores of their own.

    Args:
        part_of: which part of its component a tensor belongs to.
    """
    found: dict[str, float] = {}
    for unit in artifact.units():
        layer = layer_of_unit(unit)
        sums: dict[str, dict[Hashable, GainSums]] = {}
        places: list[tuple[str, str, Hashable]] = []
        for name, component, row in read_table(artifact, unit, "tensors").rows(GainSums):
            parts, part = sums.setdefault(component, {}), part_of(name)
            parts[part] = parts.get(part, GainSums()) + row
            places.append((name, component, part))
        of_part = {
            component: dict(
                zip(parts, refined(scores.at(layer, component), list(parts.values())), strict=True)
            )
            for component, parts in sums.items()
        }
        found |= {name: of_part[component][part] for name, component, part in places}
    return found


# What the official script scores as one where it is asked to: a component, and whose score
# it takes.
SCORED_WITH = {"shared_expert": "expert", "linear_attn": "attention"}


def unified(parts: Mapping[str, GainSums]) -> dict[str, GainSums]:
    """A layer's sums with those of shared experts in the experts', linear in attention's."""
    sums: dict[str, GainSums] = {}
    for component, part in parts.items():
        name = SCORED_WITH.get(component, component)
        sums[name] = sums.get(name, GainSums()) + part
    return sums


def _shared(scores: Mapping[str, float], components: Collection[str]) -> dict[str, float]:
    """The scores of all components; one that was scored with another has that one's."""
    return {c: scores[SCORED_WITH.get(c, c)] for c in components if SCORED_WITH.get(c, c) in scores}
