"""Where hidden states wait between layers: on the device, or in host memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane_tasks.models.files.memory import free_gpu_memory
from crane_tasks.models.walk.loading import on, recorded

# Lists of hidden states that are on a device at once where the rest is in host memory.
IN_USE = 6


class Keeper:
    """Keeps states where they are: on the device, or on a CPU that is the device.

    Attributes:
        offload: whether saved lists are to be moved to host memory behind the computation.
    """

    def __init__(self, device: torch.device, *, offload: bool = False) -> None:
        self.device = device
        self.offload = offload

    def keep(self, state: Tensor) -> Tensor:
        """A state for later; what it holds is sure only after `settle`."""
        return state.detach()

    def fetch(self, state: Tensor) -> Tensor:
        """A kept state on the device."""
        return state.to(self.device)

    def settle(self) -> None:
        """Wait until all that was kept is there."""


@dataclass
class _Slot:
    """A page-locked buffer, the copy through it that is under way, and where that ends."""

    buffer: Tensor
    moved: torch.cuda.Event | None = None
    target: Tensor | None = None

    def free(self) -> None:
        if self.moved is not None:
            self.moved.synchronize()
        if self.target is not None:
            self.target.copy_(self._as(self.target))
        self.moved = self.target = None

    def _as(self, like: Tensor) -> Tensor:
        raw = self.buffer[: like.nbytes].view(like.dtype)
        return raw.view(like.shape)

    def room_for(self, like: Tensor) -> Tensor:
        """The buffer, free, in the form of a tensor."""
        self.free()
        if self.buffer.numel() < like.nbytes:
            self.buffer = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._as(like)


class HostKeeper(Keeper):
    """Keeps every state in ordinary host memory, for sets too large for the device.

    They are copied through a few page-locked slots, so that the device computes one batch while
    the state before it leaves and the one after it comes. To page-lock all of the host
    memory would cost more time than the copies.
    """

    SLOTS = 4  # a batch on its way back has three states: entering, incoming and outgoing

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._slots = [_Slot(torch.empty(0, dtype=torch.uint8)) for _ in range(self.SLOTS)]
        self._next = 0

    def _slot(self) -> _Slot:
        self._next = (self._next + 1) % self.SLOTS
        return self._slots[self._next]

    def keep(self, state: Tensor) -> Tensor:
        slot, state = self._slot(), state.detach()
        with on(self.device):
            slot.room_for(state).copy_(state, non_blocking=True)
            slot.moved = recorded()
        slot.target = torch.empty(state.shape, dtype=state.dtype)
        return slot.target

    def fetch(self, state: Tensor) -> Tensor:
        slot = self._slot()
        with on(self.device):
            on_device = slot.room_for(state).copy_(state).to(self.device, non_blocking=True)
            slot.moved = recorded()
        return on_device

    def settle(self) -> None:
        for slot in self._slots:
            slot.free()


def keeper_for(device: torch.device, boundary: int, lists: int, *, resident: bool) -> Keeper:
    """What keeps hidden states between layers: `lists` boundaries of so many bytes.

    On the device if the weights are `resident` and all take at most a quarter of what is
    free. Else in host memory: the few lists in use stay on the device if they take at
    most a quarter (entering, incoming, outgoing, two on their way), or none does.
    """
    if device.type != "cuda":
        return Keeper(device)
    free = free_gpu_memory(device)
    if resident and 4 * lists * boundary <= free:
        return Keeper(device)
    if 4 * IN_USE * boundary <= free:
        return Keeper(device, offload=True)
    return HostKeeper(device)
