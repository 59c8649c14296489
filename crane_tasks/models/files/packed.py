"""Block-scaled FP8, as Qwen and DeepSeek publish it, seen as the bfloat16 that it stands for.

A matrix `X.weight` is stored in float8_e4m3fn, and beside it `X.weight_scale_inv` with a factor
for each block of it, [ceil(rows / height), ceil(columns / width)]. Its weights are the products,
taken in float32 and rounded to bfloat16, as transformers does with `dequantize`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.safetensors_io import DTYPES, Entry, Span, byte_view, read_span

FP8 = "F8_E4M3"
SCALE = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16")
LARGEST = 448.0  # that FP8 holds
AT_ONCE = 2**18  # weights that are multiplied at a time
WIDTH = torch.bfloat16.itemsize
# What each byte stands for: to look it up takes a CPU a sixth of the time of torch's conversion.
VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the blocks of a checkpoint that is quantised so; None of any other."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return None
    match settings.get("weight_block_size"), settings.get("fmt", "e4m3"):
        case [[int(height), int(width)], "e4m3"] if height > 0 and width > 0:
            return height, width
    return None


def _read(entry: Entry) -> Tensor:
    stored = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    read_span(entry.span(), byte_view(stored))
    return stored


def _raw_rows(weight: Entry, first: int, last: int) -> Tensor:
    """Rows of a matrix in FP8 as its bytes, uint8 [last - first, columns]."""
    columns = weight.shape[1]
    raw = torch.empty((last - first, columns), dtype=torch.uint8)
    read_span(weight.span(first * columns, (last - first) * columns), byte_view(raw))
    return raw


def _products(raw: Tensor, own: Tensor, width: int) -> Tensor:
    """Bytes [n, columns] times the scales of their rows [n, ceil(columns / width)], in bfloat16."""
    values = VALUES.index_select(0, raw.flatten().int()).view(raw.shape)
    return values.mul_(own.repeat_interleave(width, dim=1)[:, : raw.shape[1]]).bfloat16()


@dataclass(frozen=True)
class PackedSpan(Span):
    """A range of the bytes that a matrix would have in bfloat16."""

    weight: Entry
    scale: Entry
    block: tuple[int, int]

    def part(self, start: int, count: int) -> "PackedSpan":
        first = self.start + start
        return PackedSpan(self.file, first, count, self.weight, self.scale, self.block)

    def read_into(self, into: memoryview) -> None:
        row = self.weight.shape[1] * WIDTH
        end, height = self.start + self.count, max(1, AT_ONCE // self.weight.shape[1])
        scales, done = self._scales(), 0
        first, last = self.start // row, -(-end // row)
        for begin in range(first, last, height):
            stop = min(begin + height, last)
            rows = byte_view(self._rows(begin, stop, scales))
            taken = rows[max(0, self.start - begin * row) : min(end, stop * row) - begin * row]
            into[done : done + len(taken)] = taken
            done += len(taken)

    def _scales(self) -> Tensor:
        return _read(self.scale).float()

    def _rows(self, first: int, last: int, scales: Tensor) -> Tensor:
        raw = _raw_rows(self.weight, first, last)
        own = scales[torch.arange(first, last) // self.block[0]]
        return _products(raw, own, self.block[1])


@dataclass(frozen=True)
class PackedEntry(Entry):
    """A matrix in FP8, as the bfloat16 tensor that it stands for; offsets are within itself."""

    weight: Entry
    scale: Entry
    block: tuple[int, int]

    def span(self, start: int = 0, count: int | None = None) -> PackedSpan:
        count = self.nbytes - start if count is None else count
        return PackedSpan(self.file, start, count, self.weight, self.scale, self.block)


def unpacked(entries: Mapping[str, Entry], block: tuple[int, int] | None) -> dict[str, Entry]:
    """The tensors of a checkpoint, each FP8 matrix with its scales as one in bfloat16.

    Raises:
        CheckpointError: FP8 without scales, or scales of another shape or dtype.
    """
    found: dict[str, Entry] = {}
    scales = {n for n in entries if n.endswith(SCALE) and n.removesuffix(SCALE) in entries}
    for name, entry in entries.items():
        if entry.dtype == FP8:
            found[name] = _packed(entry, entries.get(name + SCALE), block)
        elif block is None or name not in scales:
            found[name] = entry
    return found


def _packed(entry: Entry, scale: Entry | None, block: tuple[int, int] | None) -> PackedEntry:
    place = f"{entry.file}: {entry.name}"
    if block is None or scale is None or len(entry.shape) != 2:
        raise CheckpointError(
            f"{place} has dtype {FP8}, which is read only of a matrix, with {entry.name}{SCALE} "
            "and the config's weight_block_size. Dequantise the checkpoint first."
        )
    wanted = tuple(-(-n // b) for n, b in zip(entry.shape, block, strict=True))
    if scale.shape != wanted or scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{place} {list(entry.shape)} in blocks of {list(block)} needs scales "
            f"{list(wanted)}; {scale.name} is {scale.dtype} {list(scale.shape)}"
        )
    rows, columns = entry.shape
    end = rows * columns * WIDTH
    return PackedEntry(entry.name, "BF16", entry.shape, entry.file, 0, end, entry, scale, block)


def packed_again(entry: PackedEntry, first: int, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a merged matrix in the form of the base's.

    A block that is as it was keeps its bits. Another gets the scale at which its largest weight
    is the largest of FP8, rounded to the dtype of scales, and its weights are the nearest.

    Args:
        first: the first row, where a block begins.
        merged: bfloat16 [rows, columns]; whole blocks, or all rows to the matrix's end.

    Returns:
        FP8 values as uint8 [rows, columns]; scales [ceil(rows / height), ceil(columns / width)].
    """
    rows, columns = merged.shape
    height, width = entry.block
    raw = _raw_rows(entry.weight, first, first + rows)
    stored = _read(entry.scale)[first // height : -(-(first + rows) // height)]
    own = stored.float().repeat_interleave(height, dim=0)[:rows]
    tall, wide = stored.shape

    def blocks(matrix: Tensor) -> Tensor:
        """[tall, height, wide, width], with zeros where the last blocks are not whole."""
        spare = (0, wide * width - columns, 0, tall * height - rows)
        return torch.nn.functional.pad(matrix, spare).view(tall, height, wide, width)

    moved = blocks((merged != _products(raw, own, width)).byte()).amax((1, 3)).bool()
    weights = blocks(merged.float())
    fitting = (weights.abs().amax((1, 3)) / LARGEST).to(stored.dtype)
    scales = torch.where(moved, torch.where(fitting > 0, fitting, 1), stored)
    values = (weights / scales.float()[:, None, :, None]).clamp(-LARGEST, LARGEST)
    again = values.to(torch.float8_e4m3fn).view(torch.uint8)
    kept = torch.where(moved[:, None, :, None], again, blocks(raw))
    return kept.view(tall * height, wide * width)[:rows, :columns].contiguous(), scales
