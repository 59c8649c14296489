"""Weights read ahead of their use, by several threads, into memory a GPU can copy from."""

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from crane_tasks.models.files.checkpoint import Source
from crane_tasks.models.files.memory import aligned
from crane_tasks.models.files.safetensors_io import Span, byte_view, read_span

# One thread copies some GB/s out of the page cache, a GPU takes 50 of them.
THREADS = min(12, os.cpu_count() or 1)
# Bytes that one thread reads at a time: the parts of a large tensor are read side by side.
BLOCK = 32 * 2**20
ALIGN = 64  # bytes, for every tensor in a buffer: what vector code wants

Sources = Mapping[str, Source]
Job = list[tuple[Span, memoryview]]


class Loader:
    """Reads one group of tensors (a decoder layer) at a time, in the background.

    `ask` begins to read, `take` waits and gives the tensors. The bytes land in one buffer
    that is used again and again, page-locked if a GPU is to copy from it. With `reuse` the
    tensors share one block of memory as well: those of one `take` are overwritten by the
    next, and neither allocator is left with holes.
    """

    def __init__(self, device: torch.device, *, reuse: bool = False) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._reuse = reuse
        self._block = torch.empty(0, dtype=torch.uint8, device=device)
        self._copied: torch.cuda.Event | None = None
        self._asked: int | None = None
        self._reads: list[Future[None]] = []

    def ask(self, group: int, sources: Sources) -> None:
        """Begin to read a group, unless that is already under way."""
        if self._asked == group:
            return
        wait(self._reads)  # of a group that is no longer wanted
        self._reads = []
        self._asked = group
        if self._copied is not None:
            self._copied.synchronize()  # the device may still be reading the buffer
        needed = sum(aligned(s.nbytes, ALIGN) for s in sources.values())
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
            locked = self._device.type == "cuda"
            self._buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=locked)
        for job in _jobs(sources, byte_view(self._buffer)):
            self._reads.append(self._pool.submit(_read, job))

    def take(self, group: int, sources: Sources, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a group on the device in `dtype`.

        Raises:
            CheckpointError: a file is shorter than its header says.
        """
        self.ask(group, sources)
        self._wait()
        block = self._room(
            sum(aligned(_count(s) * dtype.itemsize, ALIGN) for s in sources.values())
        )
        tensors, at, place = {}, 0, 0
        for name, source in sources.items():
            raw = self._buffer[at : at + source.nbytes].view(source.dtype).view(source.shape)
            size = _count(source) * dtype.itemsize
            tensors[name] = block[place : place + size].view(dtype).view(source.shape)
            if raw.dtype != dtype:
                raw = raw.to(self._device, non_blocking=True)  # it converts faster than the host
            tensors[name].copy_(raw, non_blocking=True)
            at, place = at + aligned(source.nbytes, ALIGN), place + aligned(size, ALIGN)
        if self._device.type == "cuda":
            self._copied = recorded()
        self._asked = None
        return tensors

    def _room(self, nbytes: int) -> Tensor:
        if not self._reuse:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if self._block.numel() < nbytes:
            self._block = torch.empty(0, dtype=torch.uint8, device=self._device)
            self._block = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return self._block

    def _wait(self) -> None:
        """Until all reads have ended; the first error is raised, none runs on."""
        reads, self._reads = self._reads, []
        errors = [error for read in reads if (error := read.exception())]
        if errors:
            self._asked = None
            raise errors[0]


def recorded() -> torch.cuda.Event:
    """An event that comes when the device has done what it was given so far."""
    make: Any = torch.cuda.Event  # its types are missing
    event: torch.cuda.Event = make()
    event.record()
    return event


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, whose streams and events are meant when none is named."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _jobs(sources: Sources, into: memoryview) -> Iterator[Job]:
    """The reads that fill the buffer, gathered to about `BLOCK` bytes each."""
    job: Job = []
    size = begin = 0
    for source in sources.values():
        at = begin
        for span in source.spans:
            for first in range(0, span.count, BLOCK):
                count = min(BLOCK, span.count - first)
                place = at + first
                job.append((span.part(first, count), into[place:][:count]))
                size += count
                if size >= BLOCK:
                    yield job
                    job, size = [], 0
            at += span.count
        begin += aligned(source.nbytes, ALIGN)
    yield job


def _read(job: Job) -> None:
    for span, into in job:
        read_span(span, into)


def _count(source: Source) -> int:
    return math.prod(source.shape)
