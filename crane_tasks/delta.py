"""Stage `delta`: what separates the donor from the base, lossless.

Stored is the difference of the bit patterns modulo 2^16 (2^32 for float32), from which base
and delta give back the donor bit by bit. The bf16 difference would not: it rounds.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact, Draft, Unit
from artifacts.tables import write_table
from artifacts.tensors import ArrayWriter
from crane_tasks.differences import COLUMNS, differences
from crane_tasks.errors import CheckpointError
from crane_tasks.models.check import check_pair, refuse_equal
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Slot, unit_name
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.files.safetensors_io import byte_view
from crane_tasks.models.files.wording import listed
from crane_tasks.numerics.bits import decode, encode
from crane_tasks.numerics.threshold import THRESHOLD_SUMS
from crane_tasks.pairing import pair_notes
from crane_tasks.parallel import in_order, spread_units
from crane_tasks.session import Context
from crane_tasks.sizes import gated, sizes_of
from crane_tasks.stage import BASE, DONOR, Keys, Needs, Stage

# Of weights that are read ahead for a GPU: bytes, and threads.
AHEAD, READERS = 2**30, 8
# A unit's table of what T at the median does to each tensor, made while the tensors are there.
# Artifacts from before have none.
MEDIANS = "medians"


def write_delta(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Unit of work: a decoder layer. Reads each weight of both checkpoints once.

    Raises:
        CheckpointError: the pair does not fit, or weights are NaN or Inf: all are named.
    """
    pair = ctx.pair()
    check_pair(pair, ctx.recipe.pair.allow)
    units = {unit_name(layer): (layer,) for layer, _ in pair.base.layers()}
    done = spread_units(ctx, draft, DELTA.name, _write_layer, units)
    for number, _ in enumerate(done, start=1):
        ctx.progress(DELTA.name, number, len(units), "layers")


def _check(ctx: Context, keys: Keys) -> None:
    """The recipe allows the pair as it is; a person hears in what it is none of twins."""
    ctx.unlike_configs().refuse(ctx.recipe.pair.allow)
    for note in pair_notes(ctx):
        ctx.notice(note)


def frozen_layers(ctx: Context, keys: Keys) -> set[int]:
    """The decoder layers in which donor and base are equal."""
    delta, groups = ctx.store.open(keys[DELTA]), ctx.pair().base.layers()
    return {layer for layer, slots in groups if layer is not None and _frozen(delta, slots)}


def _frozen(delta: Artifact, slots: Iterable[Slot]) -> bool:
    return all(row["delta2"] == 0 for slot in slots for row in read_statistics(delta, slot))


def _confirm(ctx: Context, keys: Keys) -> None:
    """There is a delta: else all the rest would be made for nothing."""
    delta = ctx.store.open(keys[DELTA])
    if all(_frozen(delta, slots) for _, slots in ctx.pair().base.layers()):
        refuse_equal(ctx.base, ctx.donor)


def _needs(ctx: Context, keys: Keys) -> Needs:
    sizes = sizes_of(ctx)
    return Needs(store=sizes.total, memory=sizes.buffer, seconds=3 * sizes.reading)


DELTA = Stage(
    name="delta",
    version=2,
    schema=Schema(
        arrays={
            rf".+\.stats|{MEDIANS}": ("float64",),
            r".+": ("uint16", "uint32", "float32"),
        },
        meta=("layer",),
    ),
    inputs={"base": BASE, "donor": DONOR},
    check=_check,
    confirm=_confirm,
    write=write_delta,
    needs=_needs,
)


def _write_layer(ctx: Context, unit: Unit, layer: int | None) -> None:
    pair = ctx.pair()
    groups = dict(pair.base.layers())
    unit.meta["layer"] = layer
    # Another density's m is no median; the stage `threshold` finds it by itself.
    medians = [] if ctx.recipe.merge.density is not None else gated(groups[layer])
    wanted = {slot.name for slot in medians}
    if bad := _write_slots(unit, pair, groups[layer], wanted, ctx.torch_device):
        order = list(groups)
        rest = [slot for next_ in order[order.index(layer) + 1 :] for slot in groups[next_]]
        later = differences(pair, rest, ctx.torch_device)
        _refuse(bad + [b for difference in later for b in difference.bad])


def _refuse(bad: list[str]) -> None:
    raise CheckpointError(
        f"weights that are NaN or infinite: {listed(bad)}. Download the checkpoint again."
    )


def _write_slots(
    unit: Unit,
    pair: Pair,
    slots: Sequence[Slot],
    medians: Collection[str],
    device: torch.device,
) -> list[str]:
    """Encode the slots of a unit; returns the names of tensors that are not finite."""
    table: list[tuple[str, str, list[float]]] = []
    writers = {slot.name: _writer(unit, pair, slot) for slot in slots}

    def take(slot: Slot, expert: int, code: Tensor) -> None:
        writers[slot.name][expert if slot.stacked else ...] = code

    statistics: dict[str, list[list[float]]] = {}
    bad: list[str] = []
    for difference in differences(pair, slots, device, take, medians):
        slot = difference.slot
        bad += difference.bad
        if bad:
            continue
        statistics.setdefault(slot.array_name, []).append(difference.statistics)
        if difference.median is not None:
            name = slot.tensor_name(difference.expert)
            table.append((name, slot.component, difference.median))
    if not bad:
        if table:
            write_table(unit, MEDIANS, THRESHOLD_SUMS, table)
        for name, rows in statistics.items():
            values = torch.tensor(rows, dtype=torch.float64)
            unit.write(f"{name}.stats", values, attributes={"columns": COLUMNS})
    return bad


def _writer(unit: Unit, pair: Pair, slot: Slot) -> ArrayWriter:
    """The array of a slot's stored delta."""
    pieces = pair.base.pieces[slot.name]
    ours, theirs = pieces[0].dtype, pair.donor_dtype(slot.name)
    # Of nothing: what its dtype is depends on the two sides' alone.
    dtype = encode(torch.empty(0, dtype=ours), torch.empty(0, dtype=theirs)).dtype
    shape = (len(pieces), *pieces[0].shape) if slot.stacked else pieces[0].shape
    return unit.create(slot.array_name, shape, dtype, stacked=slot.stacked)


def read_delta(artifact: Artifact, slot: Slot, base: Tensor, expert: int = 0) -> Tensor:
    """The float32 delta of one tensor, rebuilt from the artifact and the base."""
    index = expert if slot.stacked else None
    parts = []
    for chunk in artifact.row_chunks(slot.unit, slot.array_name, index):
        data = torch.empty(chunk.nbytes, dtype=torch.uint8)
        chunk.read_into(byte_view(data))
        parts.append(data)
    code = torch.cat(parts) if len(parts) != 1 else parts[0]
    code = code.view(artifact.dtype(slot.unit, slot.array_name))
    return decode(base, code[: base.numel()].view(base.shape))


def read_statistics(artifact: Artifact, slot: Slot) -> list[dict[str, float]]:
    """What was measured of each tensor of a slot: `COLUMNS`, a mapping per expert."""
    rows = artifact.read(slot.unit, f"{slot.array_name}.stats").tolist()
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def read_stacks(
    artifact: Artifact, base: Checkpoint, parts: Iterable[tuple[Slot, slice]], device: torch.device
) -> Iterator[tuple[Slot, slice, Tensor, Tensor]]:
    """Weights of the base as stored and δ in float32 of some experts of slots, [n, out, in] each,
    on a device. A plain tensor is a stack of one.

    A GPU need not wait for the files: they are read ahead by threads, into page-locked memory.
    """
    ahead = device.type == "cuda"

    def read(part: tuple[Slot, slice]) -> tuple[Slot, slice, Tensor, Tensor]:
        slot, experts = part
        weight = base.read_stack(slot.name, experts, pinned=ahead)
        return slot, experts, weight, _read_codes(artifact, slot, weight, experts, pinned=ahead)

    def nbytes(part: tuple[Slot, slice]) -> int:
        slot, experts = part
        return sum(piece.span.count for piece in base.pieces[slot.name][experts])

    found = (
        in_order(read, parts, nbytes=nbytes, budget=AHEAD, threads=READERS)
        if ahead
        else map(read, parts)
    )
    for slot, experts, weight, codes in found:
        there = weight.to(device, non_blocking=True)
        yield slot, experts, there, decode(there, codes.to(device, non_blocking=True))


def _read_codes(
    artifact: Artifact, slot: Slot, weight: Tensor, experts: slice, *, pinned: bool
) -> Tensor:
    """The stored form of a stack [n, out, in]."""
    dtype = artifact.dtype(slot.unit, slot.array_name)
    count = weight[0].numel()
    out = torch.empty((len(weight), count), dtype=dtype, pin_memory=pinned)
    for number, row in zip(range(experts.start, experts.stop), out, strict=True):
        at = 0
        for chunk in artifact.row_chunks(
            slot.unit, slot.array_name, number if slot.stacked else None
        ):
            values = chunk.nbytes // dtype.itemsize
            if at + values <= count:
                chunk.read_into(byte_view(row[at : at + values]))
            else:  # the last chunk is filled up beyond the tensor's end
                whole = torch.empty(values, dtype=dtype)
                chunk.read_into(byte_view(whole))
                row[at:] = whole[: count - at]
            at += values
    return out.view(weight.shape)
