"""Stage `threshold`: the median magnitude m of every tensor's delta, and what T keeps."""

import math
from collections.abc import Iterable

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft
from crane_tasks.context import Context
from crane_tasks.delta import read_delta
from crane_tasks.models.layout import Slot, unit_name
from crane_tasks.numerics.threshold import keep_above, median_magnitude
from crane_tasks.tables import read_table, write_table

STAGE = "threshold"
VERSION = 1
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

    def write(draft: Draft) -> None:
        write_threshold(ctx, ctx.store.open(delta), draft)

    return ctx.store.build(ref, SCHEMA, write)


def write_threshold(ctx: Context, delta: Artifact, draft: Draft) -> None:
    """Unit of work: a decoder layer. One tensor in memory at a time."""
    base = ctx.pair().base
    groups = list(base.layers())
    for number, (layer, slots) in enumerate(groups):
        name = unit_name(layer)
        if not draft.done(name):
            rows = [row for slot in gated(slots) for row in _rows(ctx, delta, slot)]
            with draft.unit(name) as unit:
                write_table(unit, "tensors", COLUMNS, rows)
        ctx.progress(STAGE, number + 1, len(groups), "layers")


def _rows(ctx: Context, delta: Artifact, slot: Slot) -> list[tuple[str, str, list[float]]]:
    base = ctx.pair().base
    rows = []
    for expert in range(len(base.pieces[slot.name])):
        found = read_delta(delta, slot, base.read(slot.name, expert), expert)
        median = median_magnitude(found)
        kept = keep_above(found, median)
        values = [
            float(median),
            float((kept != 0).sum()),
            float(found.numel()),
            math.sqrt(float(kept.double().square().sum())),
            math.sqrt(float(found.double().square().sum())),
        ]
        rows.append((slot.tensor_name(expert), slot.component, values))
    return rows


def read_thresholds(artifact: Artifact, unit: str) -> dict[str, float]:
    """m of every gated tensor of a unit, by name."""
    table = read_table(artifact, unit, "tensors")
    column = table.columns.index("threshold")
    return {n: row[column] for n, row in zip(table.names, table.values, strict=True)}
