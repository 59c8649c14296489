"""A file's bytes in windows: which rows of which tensors, and where their delta is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from artifacts.tensors import Chunk
from crane_tasks.apply.editor import Editor
from crane_tasks.models.files.layout import Slot
from crane_tasks.models.files.memory import aligned
from crane_tasks.models.files.safetensors_io import Entry, Span

COPY_BYTES = 8 * 2**20  # of a carried tensor, at a time
ALIGN = 16  # bytes, for every delta in a window's buffer


@dataclass(frozen=True)
class Part:
    """Consecutive bytes of a file: rows [first, last) of one tensor, or bytes to be copied.

    Attributes:
        span: where the base has them.
        slot: None if they are copied.
        chunk: where their delta is; None if they stay the base's.
        shape: of the rows, [last - first, ...].
    """

    span: Span
    slot: Slot | None = None
    expert: int = 0
    first: int = 0
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8
    chunk: Chunk | None = None
    code: torch.dtype = torch.uint8

    @property
    def tensor_name(self) -> str:
        return self.slot.tensor_name(self.expert) if self.slot else ""


@dataclass(frozen=True)
class Window:
    """Parts that are read, merged and handed over together."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.span.count for part in self.parts)

    @property
    def code_bytes(self) -> int:
        return sum(aligned(part.chunk.nbytes, ALIGN) for part in self.parts if part.chunk)


def parts_of(editor: Editor, slot: Slot, expert: int, *others: Editor) -> Iterator[Part]:
    """The parts of one canonical tensor: one per chunk of its delta, in order.

    Args:
        others: further editors of the same base and delta: what any of them moves is read.
    """
    piece = editor.base.pieces[slot.name][expert]
    index = expert if slot.stacked else None
    span = piece.span
    rows, *rest = piece.shape or (1,)
    row = span.count // max(1, rows)
    code = editor.delta.dtype(slot.unit, slot.array_name)
    for chunk in editor.delta.row_chunks(slot.unit, slot.array_name, index):
        untouched = all(e.untouched(slot, chunk.first, chunk.last) for e in (editor, *others))
        yield Part(
            span.part(chunk.first * row, (chunk.last - chunk.first) * row),
            slot,
            expert,
            chunk.first,
            (chunk.last - chunk.first, *rest),
            piece.dtype,
            None if untouched else chunk,
            code,
        )


def parts_of_entry(editor: Editor, entry: Entry) -> Iterator[Part]:
    """The parts of a stored tensor, in the order of its bytes; carried ones are copied."""
    if entry.name in editor.carried:
        step = COPY_BYTES
        for start in range(0, entry.nbytes, step):
            count = min(step, entry.nbytes - start)
            yield Part(entry.span(start, count), shape=(count,))
        return
    for slot_name, expert in editor.base.stored_parts(entry):
        yield from parts_of(editor, editor.base.slots[slot_name], expert)


def windows_of(parts: Iterable[Part], limit: int) -> Iterator[Window]:
    """The parts in order, in windows of at most `limit` bytes; a larger part is one alone."""
    held: list[Part] = []
    size = 0
    for part in parts:
        if held and size + part.span.count > limit:
            yield Window(tuple(held))
            held, size = [], 0
        held.append(part)
        size += part.span.count
    if held:
        yield Window(tuple(held))
