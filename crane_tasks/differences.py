"""Every tensor of a pair read and compared: on the cores of a CPU, or on a GPU."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_tasks.models.files.layout import Slot
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.walk.loading import recorded
from crane_tasks.numerics.bits import encode
from crane_tasks.numerics.threshold import stacked_threshold_sums, threshold_sums
from crane_tasks.parallel import in_order

COLUMNS = ["delta2", "base2", "donor2", "max_abs", "numel"]
# Bytes of base tensors that are worked on at a time; a few times that is in memory.
IN_FLIGHT = 128 * 2**20
BLOCK = 2**18  # weights whose passes stay in a core's cache
# Every pass over a block takes Python's lock once. With 16 threads these stand in one another's
# way: 6.3 GB a side took 55 s, with 4 threads 24 s (H100 machine, 16 cores).
THREADS = 4
# For a GPU: weights of a stack that are compared at once, bytes that are read ahead, threads that
# read, and stacks whose results are being written.
AT_ONCE = 2**26
AHEAD, READERS, BEHIND = 2**30, 8, 4


@dataclass(frozen=True)
class Difference:
    """What is known of one tensor's delta, or why there is none.

    Attributes:
        statistics: `COLUMNS`.
        bad: what is not finite, in words.
        median: what T at the median does (`THRESHOLD_SUMS`), where that was asked for.
    """

    slot: Slot
    expert: int
    statistics: list[float]
    bad: list[str]
    median: list[float] | None = None


# Takes a tensor's delta in its stored form, on any thread.
Take = Callable[[Slot, int, Tensor], None]


def nothing(slot: Slot, expert: int, code: Tensor) -> None:
    """For callers that want no delta."""


def differences(
    pair: Pair,
    slots: Iterable[Slot],
    device: torch.device,
    take: Take = nothing,
    medians: Collection[str] = (),
) -> Iterator[Difference]:
    """Every tensor of the slots in order; all have been taken when the iterator has ended.

    Sums on a GPU are those of a CPU but for rounding; deltas and medians are the same bits.

    Args:
        take: gets every delta that is finite.
        medians: the slots for which T at the median is found as well.
    """
    if device.type == "cuda":
        return _on_gpu(pair, slots, device, take, medians)
    return _on_cpu(pair, slots, take, medians)


def _on_cpu(
    pair: Pair, slots: Iterable[Slot], take: Take, medians: Collection[str]
) -> Iterator[Difference]:
    def difference(item: tuple[Slot, int]) -> Difference:
        slot, expert = item
        base, donor = pair.base.read(slot.name, expert), pair.donor_tensor(slot.name, expert)
        change, numbers = _compared(base, donor)
        bad = _not_finite(pair, slot, expert, numbers)
        if not bad:
            take(slot, expert, encode(base, donor))
        median = threshold_sums(change) if not bad and slot.name in medians else None
        return Difference(slot, expert, numbers, bad, median)

    yield from in_order(
        difference,
        ((slot, e) for slot in slots for e in range(len(pair.base.pieces[slot.name]))),
        nbytes=lambda item: pair.base.pieces[item[0].name][item[1]].span.count,
        budget=IN_FLIGHT,
        threads=min(THREADS, torch.get_num_threads()),
    )


def _compared(base: Tensor, donor: Tensor) -> tuple[Tensor, list[float]]:
    """δ in float32 and its `COLUMNS`; summed in float32 within blocks, in float64 across them."""
    change = torch.empty(base.numel())
    sums = torch.zeros(3, dtype=torch.float64)
    largest = 0.0
    blocks = (torch.split(tensor.flatten(), BLOCK) for tensor in (base, donor, change))
    for ours, theirs, delta in zip(*blocks, strict=True):
        ours, theirs = ours.float(), theirs.float()
        torch.sub(theirs, ours, out=delta)
        sums += torch.stack([x.square().sum() for x in (delta, ours, theirs)])
        low, high = delta.aminmax()
        largest = max(largest, -float(low), float(high))
    return change, [*sums.tolist(), largest, float(base.numel())]


def _not_finite(pair: Pair, slot: Slot, expert: int, numbers: list[float]) -> list[str]:
    """Which side's tensor is not finite. Large finite weights can overflow the squares: only
    where a sum is not finite every weight is looked at."""
    if all(map(math.isfinite, numbers)):
        return []
    sides = (
        (pair.base.folder, pair.base.read(slot.name, expert)),
        (pair.donor.folder, pair.donor_tensor(slot.name, expert)),
    )
    return [
        f"{slot.tensor_name(expert)} in {folder}"
        for folder, tensor in sides
        if not torch.isfinite(tensor).all()
    ]


def _on_gpu(
    pair: Pair,
    slots: Iterable[Slot],
    device: torch.device,
    take: Take,
    medians: Collection[str],
) -> Iterator[Difference]:
    """Stacks are read ahead into page-locked memory, compared on the device, written behind."""

    def read(part: tuple[Slot, slice]) -> tuple[Slot, slice, Tensor, Tensor]:
        slot, experts = part
        base = pair.base.read_stack(slot.name, experts, pinned=True)
        if slot.stacked:
            return slot, experts, base, pair.donor.read_stack(slot.name, experts, pinned=True)
        return slot, experts, base, pair.donor_tensor(slot.name)[None].pin_memory()

    def write(slot: Slot, experts: list[int], codes: Tensor, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        for expert, code in zip(experts, codes, strict=True):
            take(slot, expert, code)

    writing: list[Future[None]] = []
    parts = _parts(pair, slots)
    with ThreadPoolExecutor(READERS, thread_name_prefix="deltas") as pool:
        for slot, experts, base, donor in in_order(
            read,
            parts,
            nbytes=lambda part: _nbytes(pair, *part),
            budget=AHEAD,
            threads=READERS,
        ):
            numbers = range(experts.start, experts.stop)
            found, code, median = _stacks_compared(
                base.to(device, non_blocking=True),
                donor.to(device, non_blocking=True),
                median=slot.name in medians,
            )
            bad = [_not_finite(pair, slot, e, row) for e, row in zip(numbers, found, strict=True)]
            here = torch.empty(code.shape, dtype=code.dtype, pin_memory=True)
            here.copy_(code, non_blocking=True)
            copied = recorded()
            sound = [e for e, why in zip(numbers, bad, strict=True) if not why]
            if len(sound) == len(numbers):
                while len(writing) >= BEHIND:
                    writing.pop(0).result()
                writing.append(pool.submit(write, slot, sound, here, copied))
            for place, expert in enumerate(numbers):
                own = median[place] if median and not bad[place] else None
                yield Difference(slot, expert, found[place], bad[place], own)
        for task in writing:
            task.result()


def _stacks_compared(
    base: Tensor, donor: Tensor, *, median: bool
) -> tuple[list[list[float]], Tensor, list[list[float]]]:
    """Per tensor of a stack [n, ...] its `COLUMNS`; the stored form; what T at the median does."""
    code = encode(base, donor)
    # By numbers: of nothing, -1 says nothing.
    ours, theirs = (side.reshape(len(side), side[0].numel()).float() for side in (base, donor))
    base2, donor2 = (side.square().sum(1, dtype=torch.float64) for side in (ours, theirs))
    change = theirs.sub_(ours)
    del ours
    delta2 = change.square().sum(1, dtype=torch.float64)
    largest = change.abs().amax(1).double() if change.shape[1] else torch.zeros_like(delta2)
    numel = torch.full_like(delta2, change.shape[1])
    found = torch.stack([delta2, base2, donor2, largest, numel], dim=1)
    rows = stacked_threshold_sums(change) if median else found[:, :0]
    told = torch.cat([found, rows], dim=1).tolist()  # one wait for the device
    columns = len(COLUMNS)
    return [r[:columns] for r in told], code, [r[columns:] for r in told] if median else []


def _parts(pair: Pair, slots: Iterable[Slot]) -> Iterator[tuple[Slot, slice]]:
    """The slots' experts in runs of about `AT_ONCE` weights."""
    for slot in slots:
        pieces = pair.base.pieces[slot.name]
        step = max(1, AT_ONCE // max(1, math.prod(pieces[0].shape)))
        for first in range(0, len(pieces), step):
            yield slot, slice(first, min(first + step, len(pieces)))


def _nbytes(pair: Pair, slot: Slot, experts: slice) -> int:
    return 2 * sum(piece.span.count for piece in pair.base.pieces[slot.name][experts])
