"""Stage `threshold`: the median magnitude m of every tensor's delta, and what T keeps."""

import math
from collections.abc import Iterable

import torch

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft, Unit
from crane_tasks.ahead import in_order
from crane_tasks.context import Context
from crane_tasks.delta import BLOCK, IN_FLIGHT, read_delta
from crane_tasks.models.files.layout import Slot, unit_name
from crane_tasks.numerics.threshold import keep_above, median_magnitude
from crane_tasks.spread import spread_units
from crane_tasks.tables import read_table, write_table

STAGE = "threshold"
VERSION = 2
COLUMNS = ["threshold", "kept", "numel", "norm", "delta_norm"]
SCHEMA = Schema(arrays={"tensors": ("float64",)})
# Moved by a plain fraction of the delta, so they have no threshold (DESIGN 1).
PLAIN = ("embedding", "lm_head")


def gated(slots: Iterable[Slot]) -> list[Slot]:
    """Those that the threshold and the gate are for."""
    return [slot for slot in slots if slot.component not in PLAIN]


def threshold_ref(ctx: Context, delta: Ref) -> Ref:
    """The key: the delta alone."""
    return Ref(STAGE, VERSION, {}, {"delta": delta.key})


def build_threshold(ctx: Context, ref: Ref, delta: Ref) -> Built:
    """Make or find the thresholds."""

    return ctx.store.build(ref, SCHEMA, lambda draft: write_threshold(ctx, delta, draft))


def write_threshold(ctx: Context, delta: Ref, draft: Draft) -> None:
    """Unit of work: a decoder layer. A few tensors in memory at a time."""
    units = {unit_name(layer): (delta, layer) for layer, _ in ctx.pair().base.layers()}
    for number, _ in enumerate(spread_units(ctx, draft, STAGE, _write_layer, units), start=1):
        ctx.progress(STAGE, number, len(units), "layers")


def _write_layer(ctx: Context, unit: Unit, delta: Ref, layer: int | None) -> None:
    slots = dict(ctx.pair().base.layers())[layer]
    write_table(unit, "tensors", COLUMNS, _rows(ctx, ctx.store.open(delta), gated(slots)))


def _rows(
    ctx: Context, delta: Artifact, slots: Iterable[Slot]
) -> list[tuple[str, str, list[float]]]:
    base = ctx.pair().base

    def row(item: tuple[Slot, int]) -> tuple[str, str, list[float]]:
        slot, expert = item
        found = read_delta(delta, slot, base.read(slot.name, expert), expert)
        median = float(median_magnitude(found))
        kept, kept2, delta2 = 0, 0.0, 0.0
        for block in torch.split(found.flatten(), BLOCK):
            above = keep_above(block, median)
            kept += int(above.count_nonzero())
            kept2 += float(above.square().sum())
            delta2 += float(block.square().sum())
        values = [median, float(kept), float(found.numel()), math.sqrt(kept2), math.sqrt(delta2)]
        return slot.tensor_name(expert), slot.component, values

    return list(
        in_order(
            row,
            ((slot, expert) for slot in slots for expert in range(len(base.pieces[slot.name]))),
            nbytes=lambda item: base.pieces[item[0].name][item[1]].span.count,
            budget=IN_FLIGHT,
        )
    )


def read_thresholds(artifact: Artifact, unit: str) -> dict[str, float]:
    """m of every gated tensor of a unit, by name."""
    table = read_table(artifact, unit, "tensors")
    column = table.columns.index("threshold")
    return {n: row[column] for n, row in zip(table.names, table.values, strict=True)}
