"""Stage `scores`: gradients of both calibration sets, and the gate's sums per tensor.

What is stored does not depend on the baseline: S is aggregated when it is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from artifacts.tables import write_table
from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import AGENT, REASONING
from crane_tasks.delta import DELTA, read_stacks
from crane_tasks.errors import BadInput, RecipeError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Slot, unit_name
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.states import States
from crane_tasks.numerics.scores import GainSums, stacked_gain_sums
from crane_tasks.scores.gradients import GRADIENTS, KEPT, SETS, read_gradient, write_gradients
from crane_tasks.scores.reading import Scores, part_scores, read_scores
from crane_tasks.session import Context
from crane_tasks.sizes import gated, sizes_of
from crane_tasks.stage import BASE, Keys, Needs, Stage

COLUMNS = [f.name for f in fields(GainSums)]
# Weights of a stack of experts that are scored at once: some float32 copies of them are
# small beside a layer's gradients, and enough to fill a GPU.
AT_ONCE = 32 * 2**20


def write_scores(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Score the pair; gradients that were kept are used again, or kept if the recipe says so."""
    store, delta = ctx.store, ctx.store.open(keys[DELTA])

    def walk(keep: Draft | None) -> None:
        sets = {"reasoning": store.open(keys[REASONING]), "agent": store.open(keys[AGENT])}
        walk_scores(ctx, delta, sets, draft, keep)

    if ctx.recipe.gate.store_gradients:
        assert GRADIENTS.schema is not None
        store.build(keys[GRADIENTS], GRADIENTS.schema, walk, waiting=ctx.notice)
    if store.has(keys[GRADIENTS]):
        rescore(ctx, delta, store.open(keys[GRADIENTS]), draft)
    else:
        walk(None)


def scores_of(ctx: Context, keys: Keys) -> Scores:
    """The normalised scores of a run whose score stage is done.

    Raises:
        ScoreError: the recipe's baseline has no positive gain in some layer.
    """
    layout, gate = ctx.pair().base.layout, ctx.recipe.gate
    scores = ctx.store.open(keys[SCORES])
    return read_scores(scores, layout, gate.baseline, unify=gate.unify)


def tensor_scores(ctx: Context, keys: Keys) -> dict[str, float]:
    """S of every tensor by name, for a recipe whose scores are finer than its components.

    Raises:
        ScoreError: as `scores_of`.
    """
    base, by_expert = ctx.pair().base, ctx.recipe.gate.per == "expert"
    parts: dict[str, int | str] = {}
    for slot in base.slots.values():
        for expert in range(len(base.pieces[slot.name])):
            whole = "" if not slot.stacked else expert
            parts[slot.tensor_name(expert)] = whole if by_expert else slot.name
    return part_scores(ctx.store.open(keys[SCORES]), scores_of(ctx, keys), parts.__getitem__)


def _confirm(ctx: Context, keys: Keys) -> None:
    """A baseline without gain shows here, not when the edit is made."""
    scores_of(ctx, keys)


def check_baseline(ctx: Context, keys: Keys) -> None:
    """The baseline that the recipe names is there in every layer.

    Raises:
        RecipeError: it is not, so nothing could be divided by it.
    """
    baseline = ctx.recipe.gate.baseline
    if baseline == "auto":
        return
    layers = [(layer, slots) for layer, slots in ctx.pair().base.layers() if layer is not None]
    lacking = [
        layer for layer, slots in layers if baseline not in {slot.component for slot in slots}
    ]
    if lacking:
        components = sorted({slot.component for _, slots in layers for slot in slots})
        raise RecipeError(
            f"gate.baseline: layer {lacking[0]} has no '{baseline}'. Components of this model: "
            f"{', '.join(components)}."
        )


def _needs(ctx: Context, keys: Keys) -> Needs:
    """The next layer is read while one runs; the head is held only between the directions."""
    sizes = sizes_of(ctx)
    if ctx.store.has(keys[GRADIENTS]):  # no pass is made
        return Needs(memory=sizes.buffer, device_memory=sizes.buffer, seconds=4 * sizes.reading)
    # Of a layer: one set's sums in float32, the other's rounded, and one on its way.
    walk = sizes.one_layer + max(4 * sizes.layer, sizes.ends)
    states = min(ctx.state_memory, sizes.kept_states)
    kept = 2 * sizes.gated if ctx.recipe.gate.store_gradients else 0
    return Needs(
        store=kept + sizes.kept_states,
        memory=sizes.on_host + states + (walk if ctx.device == "cpu" else 0),
        device_memory=walk,
        seconds=3 * sizes.passes + 3 * sizes.reading,
    )


# The baseline is not in the key: it enters when the sums are read. Nor is `store_gradients`:
# kept or not, the scores are the same.
SCORES = Stage(
    name="scores",
    version=2,
    schema=Schema(
        arrays={"tensors": ("float64",), r"(reasoning|agent)\.losses": ("float64",)},
    ),
    inputs={"base": BASE, "delta": DELTA, "reasoning": REASONING, "agent": AGENT},
    fields=("gate.compute",),
    companions=(GRADIENTS,),
    check=check_baseline,
    confirm=_confirm,
    write=write_scores,
    needs=_needs,
)


def walk_scores(
    ctx: Context, delta: Artifact, sets: Mapping[str, Artifact], draft: Draft, keep: Draft | None
) -> None:
    """Take the gradients and score them; one layer in memory at a time.

    Unit of work: a decoder layer, both sets. The gradients go to `keep` first, if given.
    """
    base = ctx.pair().base
    stream = ctx.walk_of(base)
    tokens = {name: read_set(artifact) for name, artifact in sets.items()}
    states = States(draft.scratch, ctx.state_memory)
    items = {name: one.items() for name, one in tokens.items()}
    walk = GradientWalk(stream, items, states, kept=KEPT)
    slots = dict(base.layers())

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        if layer is None:
            refuse_bad_losses(walk.losses, {n: one.places for n, one in tokens.items()})
        unit = unit_name(layer)
        scored = gated(slots[layer])
        of_set = {name: by_slot(base, layer, gradients[name]) for name in SETS}
        losses = _losses(walk) if layer is None else {}
        if keep is not None:
            write_gradients(keep, scored, unit, of_set, losses)

        def gradient(name: str, slot: Slot, experts: slice | None) -> Tensor:
            whole = of_set[name][slot.name]
            return whole if experts is None else whole[experts]

        _write_unit(ctx, delta, draft, unit, scored, gradient, losses)

    done = {
        layer
        for layer in slots
        if draft.done(unit_name(layer)) and (keep is None or keep.done(unit_name(layer)))
    }
    walk.run(visit, done, lambda step: ctx.show_step(SCORES.name, step))


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
            ctx.progress(SCORES.name, number + 1, len(groups), "layers from kept gradients")


def _losses(walk: GradientWalk) -> dict[str, Tensor]:
    return {name: torch.tensor(walk.losses[name], dtype=torch.float64) for name in SETS}


def refuse_bad_losses(losses: Mapping[str, list[float]], places: Mapping[str, list[str]]) -> None:
    """Per set the items' losses, and where the items come from.

    Raises:
        BadInput: a loss is not finite; names every such row.
    """
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
    slots: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        templates = base.layout.fused_match(prefix + name)
        if templates is None:
            slots[prefix + name] = gradient
        else:
            parts = gradient.chunk(len(templates), dim=1)
            slots |= dict(zip(templates, parts, strict=True))
    return slots


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
    parts: list[Tensor] = []
    names: list[tuple[str, str]] = []
    wanted = ((slot, experts) for slot in slots for experts in portions(base, slot))
    for slot, experts, weight, step in read_stacks(delta, base, wanted, device):
        grads = [gradient(k, slot, experts if slot.stacked else None) for k in SETS]
        g_r, g_a = (g.to(device).reshape(weight.shape) for g in grads)
        parts.append(stacked_gain_sums(weight, step, g_r, g_a))
        numbers = range(experts.start, experts.stop)
        names += [(slot.tensor_name(e), slot.component) for e in numbers]
    # Once per unit: a device is not to wait in between.
    sums = torch.cat(parts).tolist() if parts else []
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
