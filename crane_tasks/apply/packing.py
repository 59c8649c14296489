"""Writing a merge of FP8 weights in FP8 again, as its bfloat16 bytes come."""

from collections.abc import Iterable

import torch
from torch import Tensor

from crane_tasks.models.files.packed import FP8, SCALE, PackedEntry, packed_again
from crane_tasks.models.files.safetensors_io import Entry, ShardWriter

Announced = list[tuple[str, str, tuple[int, ...]]]


def announced(entries: Iterable[Entry], *, fp8: bool) -> Announced:
    """Name, dtype and shape of what a file holds of these tensors, in the order of its bytes."""
    found: Announced = []
    for entry in entries:
        if fp8 and isinstance(entry, PackedEntry):
            found.append((entry.name, FP8, entry.shape))
            found.append((entry.name + SCALE, entry.scale.dtype, entry.scale.shape))
        else:
            found.append((entry.name, entry.dtype, entry.shape))
    return found


class PackingWriter:
    """Takes a file's tensors in bfloat16, in order, and writes those that were FP8 so again.

    What it holds is less than a block's height of rows, and what it was given.
    """

    def __init__(self, writer: ShardWriter, entries: Iterable[Entry]) -> None:
        self._writer = writer
        self._entries = iter(entries)
        self._entry: Entry | None = None
        self._left = 0  # bytes of the tensor that are to come
        self._held = torch.empty(0, dtype=torch.uint8)  # of a matrix, not yet written
        self._row = 0  # the first of these
        self._scales: list[Tensor] = []

    def write(self, data: Tensor) -> None:
        """The next bytes, uint8 [n]."""
        data = data.detach().cpu()
        while data.numel():
            if not self._left:
                self._entry = next(self._entries)
                self._left, self._row = self._entry.nbytes, 0
            taken, data = data[: self._left], data[self._left :]
            self._left -= taken.numel()
            if isinstance(self._entry, PackedEntry):
                self._pack(self._entry, taken)
            else:
                self._writer.write(taken)

    def _pack(self, entry: PackedEntry, taken: Tensor) -> None:
        self._held = torch.cat([self._held, taken])
        columns = entry.shape[1]
        rows = self._held.numel() // (columns * torch.bfloat16.itemsize)
        if self._left:
            rows -= rows % entry.block[0]
        if rows:
            size = rows * columns * torch.bfloat16.itemsize
            merged = self._held[:size].view(torch.bfloat16).view(rows, columns)
            values, scales = packed_again(entry, self._row, merged)
            self._writer.write(values)
            self._scales.append(scales)
            self._held, self._row = self._held[size:].clone(), self._row + rows
        if not self._left:
            self._writer.write(torch.cat(self._scales))
            self._scales = []
