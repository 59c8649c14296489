"""Tensors through the editor: read ahead, compute, hand over in order, in bounded memory.

A file is cut into windows of consecutive bytes. Several threads take a window each: they read
its weights and its part of the stored delta, merge it, and leave the result where the weights
were. The caller gets the windows in the order of the bytes and writes one while the next ones
are made. What is in flight is bounded in bytes, whatever the model's and the files' size.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from crane_tasks.apply.editor import Editor
from crane_tasks.apply.windows import ALIGN, Part, Window, windows_of
from crane_tasks.errors import RecipeError
from crane_tasks.models.files.memory import aligned, keep_small_blocks
from crane_tasks.models.files.safetensors_io import byte_view, read_span
from crane_tasks.parallel import in_order

# Bytes of a window. On a CPU small: many are in flight. On a GPU large enough that its
# transfers and products run at full speed.
WINDOW = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
# Bytes of weights in flight, but for a single larger window; deltas come on top.
IN_FLIGHT = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}
# A GPU is fed by few threads: more of them wait for each other's turn in Python.
GPU_THREADS = 3


@dataclass
class MergedWindow:
    """A window's merged bytes, and each part's intended2, realised2, dot and changed.

    `data` is overwritten once the next window was asked for.

    Attributes:
        others: the bytes that further editors make of the same window, on their device.
    """

    window: Window
    data: Tensor
    sums: list[list[float]]
    others: tuple[Tensor, ...] = ()

    def tensors(self) -> Iterator[tuple[Part, list[Tensor]]]:
        """Every part with its merged rows in the stored dtype, [rows, ...], by each editor."""
        at = 0
        for part in self.window.parts:
            made = [typed(d, at, part.shape, part.dtype) for d in (self.data, *self.others)]
            yield part, made
            at += part.span.count


class Pipeline:
    """Threads' buffers through which windows go; made once for a whole checkpoint."""

    def __init__(
        self,
        editor: Editor,
        *others: Editor,
        window: int | None = None,
        threads: int | None = None,
        on_host: bool = True,
    ) -> None:
        """
        Args:
            others: further editors of the same base and delta, for which neither is read again.
            window: bytes of a window, by default what suits the device.
            threads: so many, by default all cores, or what keeps a GPU busy.
            on_host: whether what the first editor makes is wanted in host memory.
        """
        self._on_host = on_host
        self._editor, self._others = editor, others
        self._device = editor.device
        cuda = self._device.type == "cuda"
        self._window = window or WINDOW[self._device.type]
        self._threads = threads or (GPU_THREADS if cuda else torch.get_num_threads())
        self._buffers = self._fresh_buffers()
        self._own = threading.local()
        keep_small_blocks()

    def _fresh_buffers(self) -> "SimpleQueue[_Buffers]":
        """One for every thread, for the window that waits in order, and for the caller's."""
        buffers: SimpleQueue[_Buffers] = SimpleQueue()
        for _ in range(self._threads + 2):
            buffers.put(_Buffers(pinned=self._device.type == "cuda"))
        return buffers

    def run(self, parts: Iterable[Part]) -> Iterator[MergedWindow]:
        """Merge the parts; windows come in order.

        Raises:
            RecipeError: a merged weight is beyond what its dtype can hold.
            DamagedArtifact, CheckpointError: a chunk or a file is not what it was.
        """
        done = in_order(
            self._merge,
            windows_of(parts, self._window),
            nbytes=lambda window: window.nbytes * (1 + len(self._others)),
            budget=IN_FLIGHT[self._device.type],
            threads=self._threads,
        )
        ended = False
        try:
            for merged, buffers in done:
                for made in (merged.data, *merged.others):
                    if made.is_cuda:  # made on a thread's stream, read on the caller's
                        made.record_stream(torch.cuda.current_stream())
                yield merged
                self._buffers.put(buffers)
            ended = True
        finally:
            if not ended:  # windows that nobody took have kept theirs
                self._buffers = self._fresh_buffers()

    def _merge(self, window: Window) -> "tuple[MergedWindow, _Buffers]":
        buffers = self._buffers.get()
        weights, codes = buffers.sized(window, self._window)
        places = _read(window, weights, codes)
        with self._stream():
            base = weights.to(self._device, non_blocking=True)
            delta = codes.to(self._device, non_blocking=True)
            made = [base, *(base.clone() for _ in self._others)]
            editors = (self._editor, *self._others)
            summed = [
                self._merged(editor, window, merged, delta, places)
                for editor, merged in zip(editors, made, strict=True)
            ]
            if self._on_host and self._device.type == "cuda":
                made[0] = weights.copy_(base, non_blocking=True)
            # Reading the sums waits for the device, and so for the copy before them.
            sums = [_read_sums(e, window, s) for e, s in zip(editors, summed, strict=True)]
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        return MergedWindow(window, made[0], sums[0], tuple(made[1:])), buffers

    def _merged(
        self,
        editor: Editor,
        window: Window,
        merged: Tensor,
        delta: Tensor,
        places: "list[tuple[int, int]]",
    ) -> "list[tuple[int, Tensor]]":
        """Merge a window in place; returns the sums [4] of the parts that were edited."""
        found: list[tuple[int, Tensor]] = []
        for group in self._groups(window):
            parts = [window.parts[i] for i in group]
            rows = (parts[0].shape or (1,))[0]
            shape = (rows, *parts[0].shape[1:])
            base = [typed(merged, places[i][0], shape, parts[0].dtype) for i in group]
            code = [typed(delta, places[i][1], shape, parts[0].code) for i in group]
            slot = parts[0].slot
            assert slot is not None, "only edited parts are grouped"
            edited = editor.merged(
                slot, [p.expert for p in parts], parts[0].first, _stacked(base), _stacked(code)
            )
            for i, stored in zip(group, edited.stored, strict=True):
                at, count = places[i][0], window.parts[i].span.count
                merged[at : at + count] = stored.contiguous().flatten().view(torch.uint8)
            found += zip(group, edited.sums, strict=True)
        return found

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream of this thread's own, so that one window's copies pass another's products."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._own, "stream"):
            make: Any = torch.cuda.Stream  # its types are missing
            self._own.stream = make(self._device)
        with torch.cuda.stream(self._own.stream):
            yield

    def _groups(self, window: Window) -> list[list[int]]:
        """Parts that are merged together: on a GPU the experts that one projector serves."""
        alone = self._device.type == "cpu"
        groups: dict[object, list[int]] = {}
        for number, part in enumerate(window.parts):
            if part.slot is None or part.chunk is None:
                continue
            single = alone or self._editor.routed(part.slot)
            key = number if single else (part.slot.name, part.first, part.shape)
            groups.setdefault(key, []).append(number)
        return list(groups.values())


def _read_sums(
    editor: Editor, window: Window, found: "list[tuple[int, Tensor]]"
) -> list[list[float]]:
    """Each part's sums, of those that were not edited 0.

    Raises:
        RecipeError: the realised edit of one is not finite.
    """
    sums = [[0.0] * 4 for _ in window.parts]
    rows = torch.stack([row for _, row in found]).tolist() if found else []
    for (place, _), row in zip(found, rows, strict=True):
        sums[place], part = row, window.parts[place]
        if not math.isfinite(row[1]):
            raise RecipeError(
                f"alpha {editor.recipe.alpha:g} is too large: the merged {part.tensor_name} is "
                f"beyond what {str(part.dtype).removeprefix('torch.')} can hold"
            )
    return sums


class _Buffers:
    """Memory for one window's weights and codes, used again and again."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._weights = torch.empty(0, dtype=torch.uint8)
        self._codes = torch.empty(0, dtype=torch.uint8)

    def sized(self, window: Window, usual: int) -> tuple[Tensor, Tensor]:
        """Room for a window. That of one larger than usual is not kept."""
        weights = self._room(self._weights, window.nbytes, usual)
        codes = self._room(self._codes, window.code_bytes, usual)
        if window.nbytes <= usual:
            self._weights = weights
        if window.code_bytes <= usual:
            self._codes = codes
        return weights[: window.nbytes], codes[: window.code_bytes]

    def _room(self, kept: Tensor, nbytes: int, usual: int) -> Tensor:
        if kept.numel() >= nbytes:
            return kept
        return torch.empty(max(nbytes, usual), dtype=torch.uint8, pin_memory=self._pinned)


def _read(window: Window, weights: Tensor, codes: Tensor) -> list[tuple[int, int]]:
    """Fill both buffers; returns where each part begins in the one and in the other."""
    into, codes_into = byte_view(weights), byte_view(codes)
    places, at, code_at = [], 0, 0
    for part in window.parts:
        read_span(part.span, into[at : at + part.span.count])
        places.append((at, code_at))
        at += part.span.count
        if part.chunk:
            part.chunk.read_into(codes_into[code_at : code_at + part.chunk.nbytes])
            code_at += aligned(part.chunk.nbytes, ALIGN)
    return places


def typed(data: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes begin at `at`; a view where its dtype can begin there."""
    count = math.prod(shape) * dtype.itemsize
    raw = data[at : at + count]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
