"""Stage `scores`: gradients of both calibration sets, and the gate's sums per tensor.

What is stored does not depend on the baseline: S is aggregated when it is read.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft, Unit
from crane_tasks.calibration import read_set
from crane_tasks.context import Context
from crane_tasks.delta import read_delta
from crane_tasks.errors import BadInput, ScoreError
from crane_tasks.models.checkpoint import Checkpoint
from crane_tasks.models.gradients import Gradients, GradientWalk
from crane_tasks.models.layout import Layout, Slot, unit_name
from crane_tasks.models.states import States
from crane_tasks.models.stream import LayerStream
from crane_tasks.numerics.gate import GainSums, NoGain, gain_sums, normalised, pooled
from crane_tasks.tables import read_table, write_table
from crane_tasks.threshold import PLAIN

STAGE = "scores"
VERSION = 1
SETS = ("reasoning", "agent")
COLUMNS = [f.name for f in fields(GainSums)]
SCHEMA = Schema(
    arrays={
        "tensors": ("float64",),
        r"(reasoning|agent)\.losses": ("float64",),
        r"(reasoning|agent)\..+": ("bfloat16",),
    }
)


def scores_ref(ctx: Context, delta: Ref, reasoning: Ref, agent: Ref) -> Ref:
    """The key. The baseline is not in it: it enters when the sums are read."""
    gate = ctx.recipe.gate
    config = {"store_gradients": gate.store_gradients, "compute": ctx.compute}
    inputs = {
        "base": ctx.base_id,
        "delta": delta.key,
        "reasoning": reasoning.key,
        "agent": agent.key,
    }
    return Ref(STAGE, VERSION, config, inputs)


def build_scores(ctx: Context, ref: Ref, delta: Ref, reasoning: Ref, agent: Ref) -> Built:
    """Make or find the scores."""

    def write(draft: Draft) -> None:
        sets = {"reasoning": ctx.store.open(reasoning), "agent": ctx.store.open(agent)}
        write_scores(ctx, ctx.store.open(delta), sets, draft)

    return ctx.store.build(ref, SCHEMA, write)


def write_scores(ctx: Context, delta: Artifact, sets: Mapping[str, Artifact], draft: Draft) -> None:
    """Unit of work: a decoder layer, both sets. One layer in memory at a time."""
    base = ctx.pair().base
    stream = LayerStream(base, device=ctx.torch_device, compute=ctx.compute_dtype)
    items = {name: read_set(artifact).items() for name, artifact in sets.items()}
    places = {name: read_set(artifact).places for name, artifact in sets.items()}
    walk = GradientWalk(stream, items, States(draft.scratch))

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        if layer is None:
            _refuse_bad_losses(walk.losses, places)
        grads = {name: by_slot(base, layer, gradients[name]) for name in SETS}
        with draft.unit(unit_name(layer)) as unit:
            _write_layer(ctx, delta, unit, layer, grads)
            if layer is None:
                for name in SETS:
                    losses = torch.tensor(walk.losses[name], dtype=torch.float64)
                    unit.write(f"{name}.losses", losses)

    done = {layer for layer, _ in base.layers() if draft.done(unit_name(layer))}
    walk.run(visit, done, lambda at, of: ctx.progress(STAGE, at, of, "layer passes"))


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


def _write_layer(
    ctx: Context,
    delta: Artifact,
    unit: Unit,
    layer: int | None,
    gradients: Mapping[str, Mapping[str, Tensor]],
) -> None:
    base = ctx.pair().base
    rows: list[tuple[str, str, tuple[float, ...]]] = []
    slots = next(slots for at, slots in base.layers() if at == layer)
    for slot in slots:
        if slot.component in PLAIN:
            continue
        both = [gradients[name][slot.name] for name in SETS]
        for expert in range(len(base.pieces[slot.name])):
            g_r, g_a = ((g[expert] if slot.stacked else g).cpu() for g in both)
            weight = base.read(slot.name, expert)
            step = read_delta(delta, slot, weight, expert)
            sums = gain_sums(weight.float(), step, g_r, g_a)
            rows.append((slot.tensor_name(expert), slot.component, astuple(sums)))
        if ctx.recipe.gate.store_gradients:
            for name, gradient in zip(SETS, both, strict=True):
                kept = gradient.to(torch.bfloat16)
                unit.write(f"{name}.{slot.array_name}", kept, stacked=slot.stacked)
    write_table(unit, "tensors", COLUMNS, rows)


def read_gradient(artifact: Artifact, name: str, slot: Slot, expert: int = 0) -> Tensor | None:
    """g_R (`name` "reasoning") or g_A ("agent") of one tensor in bf16, if it was stored."""
    array = f"{name}.{slot.array_name}"
    if not artifact.has(slot.unit, array):
        return None
    return artifact.read(slot.unit, array, expert if slot.stacked else ...)


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
        found[None if unit == "outside" else int(unit.removeprefix("layer."))] = sums
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
