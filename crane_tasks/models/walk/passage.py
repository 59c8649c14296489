"""Batches on their way through the layers: what every walk does, whatever it gathers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from crane_tasks.models.walk.batches import Batch
from crane_tasks.models.walk.keeping import Keeper, keeper_for
from crane_tasks.models.walk.loading import on
from crane_tasks.models.walk.pace import Pace
from crane_tasks.models.walk.stream import LayerStream


class Passage:
    """The state of each batch before the next layer, kept where there is room for it.

    Attributes:
        hidden: per batch the state [B, T, d], first that before layer 0.
        calls: per batch and layer the layer's other arguments.
        tokens: tokens of each batch, padding included.
    """

    def __init__(
        self,
        stream: LayerStream,
        batches: Sequence[Batch],
        lists: int,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        """Args:
        lists: boundaries that the walk holds at once, this one included.
        devices: those that the batches are spread over; the stream's by default.
        """
        self._stream = stream
        self.devices = stream.devices if devices is None else tuple(devices)
        with stream.embedding():
            entered = [stream.enter(batch.ids) for batch in batches]
        own = [self.devices[i % len(self.devices)] for i in range(len(batches))]
        self.calls = [
            [call.to(device) for call in calls]
            for device, (_, calls) in zip(own, entered, strict=True)
        ]
        boundary = sum(hidden.nbytes for hidden, _ in entered) // len(self.devices)
        self._keepers = [
            keeper_for(device, boundary, lists, resident=stream.resident) for device in self.devices
        ]
        self.hidden: list[Tensor] = [
            self.keeper(i).keep(hidden.to(own[i])) for i, (hidden, _) in enumerate(entered)
        ]
        self.settle()
        self.tokens = [batch.ids.numel() for batch in batches]

    @property
    def offload(self) -> bool:
        """Whether saved lists are to be moved to host memory."""
        return any(keeper.offload for keeper in self._keepers)

    def place(self, index: int) -> int:
        """Which of the devices a batch is on."""
        return index % len(self.devices)

    def keeper(self, index: int) -> Keeper:
        """What keeps a batch's states."""
        return self._keepers[self.place(index)]

    def settle(self) -> None:
        """Wait until all that was kept is there."""
        for keeper in self._keepers:
            keeper.settle()

    @torch.no_grad()
    def push(
        self,
        modules: Sequence[nn.Module],
        layer: int,
        pace: Pace,
        before: Callable[[int], None] = lambda index: None,
        first: int = 0,
    ) -> None:
        """Every batch through one layer, which lies on each device; `before(index)` ahead of each.

        The pace counts its batches from `first` on.
        """
        for index, calls in enumerate(self.calls):
            before(index)
            keeper, module = self.keeper(index), modules[self.place(index)]
            with on(keeper.device):
                state = keeper.fetch(self.hidden[index])
                self.hidden[index] = keeper.keep(self._stream.run(module, state, calls[layer]))
            pace.batch("forward", layer, first + index, 1)
        self.settle()
