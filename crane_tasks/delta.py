"""Stage `delta`: what separates the donor from the base, lossless.

Stored is the difference of the bit patterns modulo 2^16 (2^32 for float32), from which base
and delta give back the donor bit by bit. The bf16 difference would not: it rounds.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft, Unit
from crane_tasks.check import check_pair
from crane_tasks.context import Context
from crane_tasks.errors import CheckpointError
from crane_tasks.models.checkpoint import Pair, listed
from crane_tasks.models.layout import Slot, unit_name

STAGE = "delta"
VERSION = 1
COLUMNS = ["delta2", "base2", "donor2", "max_abs", "numel"]
SCHEMA = Schema(
    arrays={r".+\.stats": ("float64",), r".+": ("uint16", "uint32", "float32")}, meta=("layer",)
)
_SIGNED = {2: torch.int16, 4: torch.int32}
_UNSIGNED = {2: torch.uint16, 4: torch.uint32}


def delta_ref(ctx: Context) -> Ref:
    """The key: the two checkpoints' contents and nothing else."""
    return Ref(STAGE, VERSION, {}, {"base": ctx.base_id, "donor": ctx.donor_id})


def build_delta(ctx: Context, ref: Ref) -> Built:
    """Make or find the delta artifact."""
    return ctx.store.build(ref, SCHEMA, lambda draft: write_delta(ctx, draft))


def write_delta(ctx: Context, draft: Draft) -> None:
    """Unit of work: a decoder layer. Reads each weight of both checkpoints once.

    Raises:
        CheckpointError: the pair does not fit, or weights are NaN or Inf: all are named.
    """
    pair = ctx.pair()
    check_pair(pair)
    groups = list(pair.base.layers())
    for number, (layer, slots) in enumerate(groups):
        name = unit_name(layer)
        if not draft.done(name):
            with draft.unit(name) as unit:
                unit.meta["layer"] = layer
                bad = [b for slot in slots for b in _write_slot(unit, pair, slot)]
                if bad:
                    rest = [s for _, later in groups[number + 1 :] for s in later]
                    _refuse(
                        bad
                        + [
                            b
                            for slot in rest
                            for t in _tensors(pair, slot)
                            for b in _not_finite(pair, slot, *t)
                        ]
                    )
        ctx.progress(STAGE, number + 1, len(groups), "layers")


def _refuse(bad: list[str]) -> None:
    raise CheckpointError(
        f"weights that are NaN or infinite: {listed(bad)}. Download the checkpoint again."
    )


def _tensors(pair: Pair, slot: Slot) -> Iterator[tuple[int, Tensor, Tensor]]:
    for expert in range(len(pair.base.pieces[slot.name])):
        yield expert, pair.base.read(slot.name, expert), pair.donor_tensor(slot.name, expert)


def _not_finite(pair: Pair, slot: Slot, expert: int, base: Tensor, donor: Tensor) -> list[str]:
    return [
        f"{slot.tensor_name(expert)} in {side.folder}"
        for side, tensor in ((pair.base, base), (pair.donor, donor))
        if not torch.isfinite(tensor).all()
    ]


def _write_slot(unit: Unit, pair: Pair, slot: Slot) -> list[str]:
    """Encode one slot; returns the names of tensors that are not finite."""
    pieces = pair.base.pieces[slot.name]
    writer = None
    stats, bad = [], []
    for expert, base, donor in _tensors(pair, slot):
        if found := _not_finite(pair, slot, expert, base, donor):
            bad += found
            continue
        code = encode(base, donor)
        if writer is None:
            shape = (len(pieces), *code.shape) if slot.stacked else tuple(code.shape)
            writer = unit.create(slot.array_name, shape, code.dtype, stacked=slot.stacked)
        writer[expert if slot.stacked else ...] = code
        stats.append(_statistics(base, donor))
    if stats and not bad:
        unit.write(
            f"{slot.array_name}.stats",
            torch.tensor(stats, dtype=torch.float64),
            attributes={"columns": COLUMNS},
        )
    return bad


def _statistics(base: Tensor, donor: Tensor) -> list[float]:
    wide_base, wide_donor = base.double(), donor.double()
    delta = (donor.float() - base.float()).double()
    return [
        float(delta.square().sum()),
        float(wide_base.square().sum()),
        float(wide_donor.square().sum()),
        float(delta.abs().max()) if delta.numel() else 0.0,
        float(delta.numel()),
    ]


def encode(base: Tensor, donor: Tensor) -> Tensor:
    """The stored form: bits of donor minus bits of base, wrapping; or float32 delta.

    Of unlike dtypes the float32 delta itself is kept.
    """
    if base.dtype != donor.dtype:
        return donor.float() - base.float()
    signed, unsigned = _SIGNED[base.element_size()], _UNSIGNED[base.element_size()]
    return (donor.view(signed) - base.view(signed)).view(unsigned)


def decode(base: Tensor, code: Tensor) -> Tensor:
    """The float32 delta from a base tensor and its stored form."""
    if code.dtype == torch.float32:
        return code
    signed = _SIGNED[base.element_size()]
    donor = (base.view(signed) + code.view(signed)).view(base.dtype)
    return donor.float() - base.float()


def read_delta(artifact: Artifact, slot: Slot, base: Tensor, expert: int = 0) -> Tensor:
    """The float32 delta of one tensor, rebuilt from the artifact and the base."""
    index = expert if slot.stacked else ...
    return decode(base, artifact.read(slot.unit, slot.array_name, index))


def read_stacked_delta(artifact: Artifact, slot: Slot, base: Tensor, experts: slice) -> Tensor:
    """The float32 delta of some experts of a slot, on the device of `base` [n, out, in].

    A plain tensor is a stack of one.
    """
    code = artifact.read(slot.unit, slot.array_name, experts if slot.stacked else ...)
    return decode(base, code.to(base.device).reshape(base.shape))
