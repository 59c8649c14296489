"""What a merge needs, from the headers alone, and whether the disks have room for it."""

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crane_tasks.errors import OutputError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Slot
from crane_tasks.threshold import gated


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint as stored, and counts of weights.

    Attributes:
        total: all tensors.
        gated: those that have gradients.
        layer: the largest decoder layer.
        outside: what lies in no layer.
        largest: weights of the largest single tensor.
        parameters: all weights.
    """

    total: int
    gated: int
    layer: int
    outside: int
    largest: int
    parameters: int


def sizes_of(base: Checkpoint) -> Sizes:
    """The sizes of a checkpoint; reads headers only."""

    def nbytes(slot: Slot) -> int:
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in base.pieces[slot.name])

    groups = {layer: sum(nbytes(s) for s in slots) for layer, slots in base.layers()}
    counts = [math.prod(p.shape) for pieces in base.pieces.values() for p in pieces]
    return Sizes(
        total=sum(e.nbytes for e in base.entries.values()),
        gated=sum(nbytes(s) for s in gated(base.slots.values())),
        layer=max(size for layer, size in groups.items() if layer is not None),
        outside=groups[None],
        largest=max(counts),
        parameters=sum(counts),
    )


def check_room(needs: Iterable[tuple[Path, int, str]]) -> None:
    """Refuse work whose results cannot fit: (place, bytes, what) each, added up per disk.

    Raises:
        OutputError: a disk has less free than will be written to it.
    """
    disks: dict[int, list[tuple[Path, int, str]]] = defaultdict(list)
    for place, count, what in needs:
        existing = next(p for p in (place, *place.parents) if p.exists())
        disks[existing.stat().st_dev].append((existing, count, what))
    for wanted in disks.values():
        free = shutil.disk_usage(wanted[0][0]).free
        total = sum(count for _, count, _ in wanted)
        if total > free:
            parts = ", ".join(f"{what} {count / 1e9:.1f} GB" for _, count, what in wanted)
            raise OutputError(
                f"{wanted[0][0]}: the disk has {free / 1e9:.1f} GB free, the merge will write "
                f"{total / 1e9:.1f} GB: {parts}. Free some, or move --store or --output."
            )
