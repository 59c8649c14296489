"""Hidden states between the layers of a walk: in memory, and on disk so that it can resume.

They are written behind the computation into the artifact's draft. A file's name carries its
digest, so that one torn by a power cut is not there; nothing has to wait for the disk. A disk
slower than the walk lags behind: a walk that resumes takes the steps again whose states had
not come to the disk, but visits no layer twice.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from crane_tasks.models.files.safetensors_io import DTYPES, ShardWriter, read_header, read_rows
from crane_tasks.models.walk.loading import on, recorded

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIX = ".safetensors"
DIGITS = 64  # of a blake3 digest
# Per GPU, where the work that makes a list ends.
Events = dict[torch.device, torch.cuda.Event]
# Lists that may wait on the device to be offloaded.
ON_DEVICE = 2
# Tasks for the disk that may wait without their list being held in memory anyway.
BEHIND = 2


class States:
    """Named lists of tensors, each on disk whole or not at all.

    At most `budget` bytes of them stay in memory as well (None: all); the oldest go first,
    as the way back needs them last. What is dropped before its turn is never written.
    """

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        self._folder = folder
        self._budget = budget
        folder.mkdir(parents=True, exist_ok=True)
        self._memory: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._ahead: dict[str, Future[list[Tensor]]] = {}
        self._sound: set[Path] = set()
        # One thread: saves and drops come to the disk in their order.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._tasks: deque[tuple[str, Future[None]]] = deque()
        self._wanted: dict[str, int] = {}  # the save of each name that still counts
        self._saves = 0
        # What was dropped, and after which save: its file goes once that save is on disk, so
        # that a kill at any time finds lists that belong together.
        self._stale: list[tuple[str, int]] = []
        self._lock = threading.Lock()  # of the memory, which the offloading thread writes too
        # Whether lists on a device are moved to host memory behind the computation.
        self.offload = False
        self._offloader = ThreadPoolExecutor(1, thread_name_prefix="states-offload")
        self._offloading: deque[Future[list[Tensor]]] = deque()
        self._staging = torch.empty(0, dtype=torch.uint8)  # page-locked

    def within(self, name: str) -> "States":
        """The states of one plan, apart from those of others."""
        return States(self._folder / name, self._budget)

    def _files(self, name: str) -> list[Path]:
        return list(self._folder.glob(f"{name}.{'?' * DIGITS}{SUFFIX}"))

    def _file(self, name: str) -> Path | None:
        """The file of a list; one that is not what was written is removed."""
        for file in self._files(name):
            if file not in self._sound and _digest(file) != file.name.split(".")[-2]:
                file.unlink()
                continue
            self._sound.add(file)
            return file
        return None

    def has(self, name: str) -> bool:
        """Whether the list was saved, in this walk or an earlier one."""
        return name in self._wanted or self._file(name) is not None

    def save(self, name: str, states: list[Tensor]) -> None:
        """Keep the list, and write it behind the computation.

        Raises:
            OSError: an earlier list could not be written (the disk is full).
        """
        states = [t.detach().contiguous() for t in states]
        with self._lock:
            self._memory[name] = states
            while self._budget is not None and _size(self._memory) > self._budget:
                self._memory.popitem(last=False)
        self._saves += 1
        self._wanted[name] = number = self._saves
        events = _events(states)
        if events and self.offload:
            moved = self._offloader.submit(self._offloaded, name, number, states, events)
            self._offloading.append(moved)
            while len(self._offloading) > ON_DEVICE:
                self._offloading.popleft().result()
            # The disk may be slow: what waits for it must not be on the device.
            self._later(name, lambda: self._write(name, number, moved.result()))
        else:
            self._later(
                name, lambda: self._write(name, number, self._fetched(name, number, states, events))
            )
        # A list that waits for the disk is in memory all the same: only so many may.
        while sum(waiting not in self._memory for waiting, _ in self._tasks) > BEHIND:
            self._tasks.popleft()[1].result()

    def _offloaded(
        self, name: str, number: int, states: list[Tensor], events: Events
    ) -> list[Tensor]:
        moved = self._fetched(name, number, states, events)
        with self._lock:
            if self._wanted.get(name) == number and name in self._memory:
                self._memory[name] = moved
        return moved

    def _fetched(
        self, name: str, number: int, states: list[Tensor], events: Events
    ) -> list[Tensor]:
        """A list in host memory, without waiting for what a device does after it was saved."""
        if not events or self._wanted.get(name) != number:
            return states
        aside: Any = torch.cuda.Stream  # its types are missing
        streams = {device: aside(device) for device in events}
        for device, stream in streams.items():
            stream.wait_event(events[device])
        return [self._to_host(t, streams[t.device]) if t.device in streams else t for t in states]

    def _to_host(self, state: Tensor, stream: torch.cuda.Stream) -> Tensor:
        if self._staging.numel() < state.nbytes:
            self._staging = torch.empty(state.nbytes, dtype=torch.uint8, pin_memory=True)
        through = self._staging[: state.nbytes].view(state.dtype).view(state.shape)
        with torch.cuda.stream(stream):
            through.copy_(state, non_blocking=True)
            stream.synchronize()
        # NumPy asks for huge pages: page by page, fresh memory takes longer than the copy.
        fresh = torch.from_numpy(np.empty(state.nbytes, dtype=np.uint8))
        return fresh.view(state.dtype).view(state.shape).copy_(through)

    def _later(self, name: str, task: Callable[[], None]) -> None:
        while self._tasks and self._tasks[0][1].done():
            self._tasks.popleft()[1].result()
        self._tasks.append((name, self._disk.submit(task)))

    def _write(self, name: str, number: int, states: list[Tensor]) -> None:
        if self._wanted.get(name) != number:
            return  # dropped or saved again since
        part = self._folder / f"{name}.part"
        announced = [(str(i), NAMES[t.dtype], tuple(t.shape)) for i, t in enumerate(states)]
        with ShardWriter(part, announced, {}, durable=False) as writer:
            for state in states:
                writer.write(state)
            digest = writer.close()
        file = self._folder / f"{name}.{digest}{SUFFIX}"
        self._remove(name)
        part.replace(file)
        self._sound.add(file)
        self._clear(number)

    def _clear(self, number: int) -> None:
        """Remove the files of what was dropped up to a save that is on disk now."""
        stale, self._stale = self._stale, []
        for name, after in stale:
            if after > number:
                self._stale.append((name, after))
            elif name not in self._wanted:  # not saved again since
                self._remove(name)

    def ask(self, name: str) -> None:
        """Begin to read a list that will be wanted, if it is not in memory."""
        if name not in self._memory and name not in self._ahead:
            self._ahead[name] = self._disk.submit(self._read, name)

    def load(self, name: str) -> list[Tensor]:
        """The list, from memory or from disk (then on the CPU).

        Raises:
            KeyError: there is none.
        """
        if name in self._memory:
            return list(self._memory[name])
        self.ask(name)
        return self._ahead.pop(name).result()

    def _read(self, name: str) -> list[Tensor]:
        file = self._file(name)
        if file is None:
            raise KeyError(name)
        entries = {e.name: e for e in read_header(file)[0]}
        ordered = [entries[str(i)] for i in range(len(entries))]
        return [read_rows(e, 0, e.shape[0] if e.shape else 1, e.shape) for e in ordered]

    def drop(self, name: str) -> None:
        """Forget a list; its file goes when what was saved before is on disk."""
        with self._lock:
            self._memory.pop(name, None)
        self._wanted.pop(name, None)
        number = self._saves
        self._later(name, lambda: self._stale.append((name, number)))

    def _remove(self, name: str) -> None:
        for file in self._files(name):
            file.unlink()

    def flush(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: something could not be written.
        """
        tasks, self._tasks = self._tasks, deque()
        errors = [error for _, task in tasks if (error := task.exception())]
        if errors:
            raise errors[0]
        self._clear(self._saves)


def _events(states: list[Tensor]) -> Events:
    found = {}
    for device in {t.device for t in states if t.is_cuda}:
        with on(device):
            found[device] = recorded()
    return found


def _size(lists: OrderedDict[str, list[Tensor]]) -> int:
    return sum(t.nbytes for states in lists.values() for t in states)


def _digest(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
