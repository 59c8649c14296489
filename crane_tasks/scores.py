"""Stage `scores`: gradients of both calibration sets, and the gate's sums per tensor.

What is stored does not depend on the baseline: S is aggregated when it is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft
from crane_tasks.calibration import read_set
from crane_tasks.context import Context
from crane_tasks.delta import read_stacked_delta
from crane_tasks.errors import BadInput, ScoreError
from crane_tasks.gradients import (
    KEPT,
    SETS,
    open_gradients,
    read_gradient,
    write_gradients,
)
from crane_tasks.gradients import SCHEMA as GRADIENTS
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Layout, Slot, layer_of_unit, unit_name
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.numerics.scores import GainSums, NoGain, normalised, pooled, stacked_gain_sums
from crane_tasks.tables import read_table, write_table
from crane_tasks.threshold import gated

STAGE = "scores"
VERSION = 2
COLUMNS = [f.name for f in fields(GainSums)]
SCHEMA = Schema(
    arrays={"tensors": ("float64",), r"(reasoning|agent)\.losses": ("float64",)},
)
# Weights of a stack of experts that are scored at once: some float32 copies of them are
# small beside a layer's gradients, and enough to fill a GPU.
AT_ONCE = 32 * 2**20


@dataclass(frozen=True)
class Sources:
    """What the scores are made from."""

    delta: Ref
    reasoning: Ref
    agent: Ref
    gradients: Ref


def scores_ref(ctx: Context, delta: Ref, reasoning: Ref, agent: Ref) -> Ref:
    """The key. The baseline is not in it: it enters when the sums are read.

    Nor is `store_gradients`: kept or not, the scores are the same.
    """
    inputs = {
        "base": ctx.base_id,
        "delta": delta.key,
        "reasoning": reasoning.key,
        "agent": agent.key,
    }
    return Ref(STAGE, VERSION, {"compute": ctx.compute}, inputs)


def build_scores(ctx: Context, ref: Ref, sources: Sources) -> Built:
    """Make or find the scores; gradients that were kept are used again."""
    store = ctx.store

    def walk(draft: Draft, keep: Draft | None) -> None:
        sets = {"reasoning": store.open(sources.reasoning), "agent": store.open(sources.agent)}
        walk_scores(ctx, store.open(sources.delta), sets, draft, keep)

    def write(draft: Draft) -> None:
        if ctx.recipe.gate.store_gradients:
            store.build(sources.gradients, GRADIENTS, lambda keep: walk(draft, keep))
        if kept := open_gradients(store, sources.gradients):
            rescore(ctx, store.open(sources.delta), kept, draft)
        else:
            walk(draft, None)

    return store.build(ref, SCHEMA, write)


def walk_scores(
    ctx: Context, delta: Artifact, sets: Mapping[str, Artifact], draft: Draft, keep: Draft | None
) -> None:
    """Take the gradients and score them; one layer in memory at a time.

    Unit of work: a decoder layer, both sets. The gradients go to `keep` first, if given.
    """
    base = ctx.pair().base
    stream = LayerStream(base, device=ctx.torch_device, compute=ctx.compute_dtype)
    tokens = {name: read_set(artifact) for name, artifact in sets.items()}
    states = States(draft.scratch, ctx.state_memory)
    items = {name: found.items() for name, found in tokens.items()}
    walk = GradientWalk(stream, items, states, kept=KEPT)
    slots = dict(base.layers())

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        if layer is None:
            _refuse_bad_losses(walk.losses, {n: found.places for n, found in tokens.items()})
        unit = unit_name(layer)
        mine = gated(slots[layer])
        found = {name: by_slot(base, layer, gradients[name]) for name in SETS}
        losses = _losses(walk) if layer is None else {}
        if keep is not None:
            write_gradients(keep, mine, unit, found, losses)

        def gradient(name: str, slot: Slot, experts: slice | None) -> Tensor:
            whole = found[name][slot.name]
            return whole if experts is None else whole[experts]

        _write_unit(ctx, delta, draft, unit, mine, gradient, losses)

    done = {
        layer
        for layer in slots
        if draft.done(unit_name(layer)) and (keep is None or keep.done(unit_name(layer)))
    }
    walk.run(visit, done, lambda step: ctx.show_step(STAGE, step))


def rescore(ctx: Context, delta: Artifact, kept: Artifact, draft: Draft) -> None:
    """Score gradients that were kept, for another delta or after a kill. No pass is made."""

    def gradient(name: str, slot: Slot, experts: slice | None) -> Tensor:
        return read_gradient(kept, name, slot, experts)

    groups = list(ctx.pair().base.layers())
    for number, (layer, slots) in enumerate(groups):
        unit = unit_name(layer)
        if not draft.done(unit):
            losses = {n: kept.read(unit, f"{n}.losses") for n in SETS} if layer is None else {}
            _write_unit(ctx, delta, draft, unit, gated(slots), gradient, losses)
            ctx.progress(STAGE, number + 1, len(groups), "layers from kept gradients")


def _losses(walk: GradientWalk) -> dict[str, Tensor]:
    return {name: torch.tensor(walk.losses[name], dtype=torch.float64) for name in SETS}


def _refuse_bad_losses(losses: Mapping[str, list[float]], places: Mapping[str, list[str]]) -> None:
    bad = [
        place
        for name in losses
        for place, loss in zip(places[name], losses[name], strict=True)
        if not torch.isfinite(torch.tensor(loss))
    ]
    if bad:
        raise BadInput(f"{', '.join(bad)}: the base's loss on this row is not finite")


def by_slot(base: Checkpoint, layer: int | None, gradients: Gradients) -> dict[str, Tensor]:
    """A module's parameter gradients under the checkpoint's slots; stacks are [E, out, in]."""
    prefix = "" if layer is None else f"model.layers.{layer}."
    found: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        templates = base.layout.fused_match(prefix + name)
        if templates is None:
            found[prefix + name] = gradient
        else:
            parts = gradient.chunk(len(templates), dim=1)
            found |= dict(zip(templates, parts, strict=True))
    return found


class GradientOf(Protocol):
    """A set's gradient of a slot: a tensor, or some experts of a stack."""

    def __call__(self, name: str, slot: Slot, experts: slice | None) -> Tensor:
        """In the dtype in which gradients are kept, on any device."""


def _write_unit(
    ctx: Context,
    delta: Artifact,
    draft: Draft,
    name: str,
    slots: list[Slot],
    gradient: GradientOf,
    losses: Mapping[str, Tensor],
) -> None:
    """The gate's sums of every tensor of a unit, computed on the device."""
    base, device = ctx.pair().base, ctx.torch_device
    found: list[Tensor] = []
    names: list[tuple[str, str]] = []
    for slot in slots:
        for experts in portions(base, slot):
            weight = base.read_stack(slot.name, experts).to(device)
            step = read_stacked_delta(delta, slot, weight, experts)
            grads = [gradient(k, slot, experts if slot.stacked else None) for k in SETS]
            g_r, g_a = (g.to(device).reshape(weight.shape) for g in grads)
            found.append(stacked_gain_sums(weight, step, g_r, g_a))
            numbers = range(experts.start, experts.stop)
            names += [(slot.tensor_name(e), slot.component) for e in numbers]
    # Once per unit: a device is not to wait in between.
    sums = torch.cat(found).tolist() if found else []
    rows = [(*name, row) for name, row in zip(names, sums, strict=True)]
    with draft.unit(name) as unit:
        write_table(unit, "tensors", COLUMNS, rows)
        for key, values in losses.items():
            unit.write(f"{key}.losses", values)


def portions(base: Checkpoint, slot: Slot) -> Iterator[slice]:
    """The experts of a slot in runs of about `AT_ONCE` weights (of a plain tensor, the one)."""
    pieces = base.pieces[slot.name]
    step = max(1, AT_ONCE // max(1, math.prod(pieces[0].shape)))
    for first in range(0, len(pieces), step):
        yield slice(first, min(first + step, len(pieces)))


@dataclass(frozen=True)
class Scores:
    """S(c, l) per layer and S(c) over all layers, with the baselines that divided them."""

    per_layer: dict[int, dict[str, float]]
    per_component: dict[str, float]
    baseline: dict[int, str]

    def of(self, slot: Slot) -> float:
        """The factor of a slot: its layer's score, or S(c) outside the layers."""
        if slot.layer is None:
            return self.per_component[slot.component]
        return self.per_layer[slot.layer][slot.component]


def layer_sums(artifact: Artifact) -> dict[int | None, dict[str, GainSums]]:
    """The gate's sums per layer (None: outside) and component."""
    found: dict[int | None, dict[str, GainSums]] = {}
    for unit in artifact.units():
        sums: dict[str, GainSums] = {}
        for _, component, row in read_table(artifact, unit, "tensors").rows(GainSums):
            sums[component] = sums.get(component, GainSums()) + row
        found[layer_of_unit(unit)] = sums
    return found


def read_scores(artifact: Artifact, layout: Layout, baseline: str) -> Scores:
    """Aggregate and normalise (DESIGN 1, "S").

    `baseline` "auto" is the layout's: in every layer the first of its candidates that the
    layer has, so that a dense layer of a sparse model is measured by its ffn.

    Raises:
        ScoreError: a layer's baseline has no positive gain.
    """
    sums = layer_sums(artifact)
    candidates = layout.baseline if baseline == "auto" else (baseline,)

    def chosen(parts: Mapping[str, GainSums]) -> str:
        return next((c for c in candidates if c in parts), candidates[0])

    layers = {layer: sums[layer] for layer in sorted(k for k in sums if k is not None)}
    # The layers alone: the final norm takes S(norm), it does not enter it.
    total = pooled(layers.values())
    try:
        per_layer = {
            layer: normalised(parts, chosen(parts), f"layer {layer}")
            for layer, parts in layers.items()
        }
        per_component = normalised(total, chosen(total), "all layers")
    except NoGain as error:
        raise ScoreError(
            f"{error}, so the scores cannot be normalised. Add calibration prompts, or "
            "choose another gate.baseline."
        ) from error
    return Scores(per_layer, per_component, {k: chosen(v) for k, v in layers.items()})
