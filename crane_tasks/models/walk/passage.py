"""Batches on their way through the layers: what every walk does, whatever it gathers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from crane_tasks.models.walk.batches import Batch
from crane_tasks.models.walk.keeping import keeper_for
from crane_tasks.models.walk.pace import Pace
from crane_tasks.models.walk.stream import LayerStream


class Passage:
    """The state of each batch before the next layer, kept where there is room for it.

    Attributes:
        hidden: per batch the state [B, T, d], first that before layer 0.
        calls: per batch and layer the layer's other arguments.
        keeper: where states wait.
        tokens: tokens of each batch, padding included.
    """

    def __init__(self, stream: LayerStream, batches: Sequence[Batch], lists: int) -> None:
        """`lists`: boundaries that the walk holds at once, this one included."""
        self._stream = stream
        with stream.embedding():
            entered = [stream.enter(batch.ids) for batch in batches]
        self.calls = [calls for _, calls in entered]
        boundary = sum(hidden.nbytes for hidden, _ in entered)
        self.keeper = keeper_for(stream.device, boundary, lists, resident=stream.resident)
        self.hidden: list[Tensor] = [self.keeper.keep(hidden) for hidden, _ in entered]
        self.keeper.settle()
        self.tokens = [batch.ids.numel() for batch in batches]

    @torch.no_grad()
    def push(
        self,
        module: nn.Module,
        layer: int,
        pace: Pace,
        before: Callable[[int], None] = lambda index: None,
        first: int = 0,
    ) -> None:
        """Every batch through one layer; `before(index)` ahead of each.

        The pace counts its batches from `first` on.
        """
        for index, calls in enumerate(self.calls):
            before(index)
            state = self.keeper.fetch(self.hidden[index])
            self.hidden[index] = self.keeper.keep(self._stream.run(module, state, calls[layer]))
            pace.batch("forward", layer, first + index, 1)
        self.keeper.settle()
