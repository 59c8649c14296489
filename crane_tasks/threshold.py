"""Stage `threshold`: the magnitude m of every tensor's delta above which T keeps it.

Medians come with the delta, which had both tensors in memory; another density's m is found from
the stored delta and the base.
"""

from collections.abc import Iterable

import torch

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Draft, Unit
from artifacts.tables import read_table, write_table
from crane_tasks.delta import DELTA, MEDIANS, read_delta
from crane_tasks.differences import IN_FLIGHT, THREADS
from crane_tasks.models.files.layout import Slot, unit_name
from crane_tasks.numerics.threshold import THRESHOLD_SUMS, threshold_sums
from crane_tasks.parallel import in_order, spread_units
from crane_tasks.session import Context
from crane_tasks.sizes import gated, sizes_of
from crane_tasks.stage import Keys, Needs, Stage


def density_scale(density: float | None) -> float:
    """By how much T scales what it keeps: 1 / density, 2 at the median."""
    return 2.0 if density is None else 1.0 / density


def write_threshold(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Unit of work: a decoder layer. A few tensors in memory at a time."""
    delta = keys[DELTA]
    units = {unit_name(layer): (delta, layer) for layer, _ in ctx.pair().base.layers()}
    done = spread_units(ctx, draft, THRESHOLD.name, _write_layer, units)
    for number, _ in enumerate(done, start=1):
        ctx.progress(THRESHOLD.name, number, len(units), "layers")


def _needs(ctx: Context, keys: Keys) -> Needs:
    sizes = sizes_of(ctx)
    return Needs(memory=sizes.buffer, seconds=3 * sizes.reading)


THRESHOLD = Stage(
    name="threshold",
    version=2,
    schema=Schema(arrays={"tensors": ("float64",)}),
    inputs={"delta": DELTA},
    fields=("merge.density",),
    # The median is the method's own, and older than the field.
    config=lambda ctx: {k: v for k in ("density",) if (v := ctx.recipe.merge.density) is not None},
    write=write_threshold,
    needs=_needs,
)


def _write_layer(ctx: Context, unit: Unit, delta: Ref, layer: int | None) -> None:
    artifact, slots = ctx.store.open(delta), gated(dict(ctx.pair().base.layers())[layer])
    if ctx.recipe.merge.density is None and artifact.has(unit.name, MEDIANS):
        table = read_table(artifact, unit.name, MEDIANS)
        rows = list(zip(table.names, table.components, table.values, strict=True))
    else:
        rows = _rows(ctx, artifact, slots)
    write_table(unit, "tensors", THRESHOLD_SUMS, rows)


def _rows(
    ctx: Context, delta: Artifact, slots: Iterable[Slot]
) -> list[tuple[str, str, list[float]]]:
    base, density = ctx.pair().base, ctx.recipe.merge.density

    def row(item: tuple[Slot, int]) -> tuple[str, str, list[float]]:
        slot, expert = item
        change = read_delta(delta, slot, base.read(slot.name, expert), expert)
        return slot.tensor_name(expert), slot.component, threshold_sums(change, density)

    return list(
        in_order(
            row,
            ((slot, expert) for slot in slots for expert in range(len(base.pieces[slot.name]))),
            nbytes=lambda item: base.pieces[item[0].name][item[1]].span.count,
            budget=IN_FLIGHT,
            threads=min(THREADS, torch.get_num_threads()),
        )
    )


def read_thresholds(artifact: Artifact, unit: str) -> dict[str, float]:
    """m of every gated tensor of a unit, by name."""
    table = read_table(artifact, unit, "tensors")
    column = table.columns.index("threshold")
    return {n: row[column] for n, row in zip(table.names, table.values, strict=True)}
