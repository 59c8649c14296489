"""What the gate takes from the walk: one forward and one backward for all layers.

Forward: every batch's state is pushed through each layer in turn and kept at the boundary.
Backward, from the last layer down: the layer is loaded once, each batch's forward is
recomputed with grad from its boundary, and the incoming gradient is pulled through it.
"""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from crane_tasks.models.batches import Batch, batched, plan_mark, token_limit, unpadded
from crane_tasks.models.states import States
from crane_tasks.models.stream import Item, LayerCall, LayerStream

Gradients = dict[str, Tensor]  # parameter name within its layer -> float32 gradient
Sets = Mapping[str, list[Item]]
Visit = Callable[[int | None, dict[str, Gradients]], None]
Progress = Callable[[int, int], None]


class Accumulator:
    """Adds up parameter gradients over batches in float32 (or wider), whatever the compute dtype.

    Left to autograd, a bfloat16 parameter would collect its gradient in bfloat16.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: Gradients = {}

    def collect(self) -> None:
        """Take the gradients of one batch."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name in self._sums:
                self._sums[name] += parameter.grad
            else:
                wide = torch.promote_types(parameter.grad.dtype, torch.float32)
                self._sums[name] = parameter.grad.to(wide)
            parameter.grad = None

    def result(self) -> Gradients:
        """The sums; a parameter that no item reached (an idle expert) has gradient 0."""
        for name, parameter in self._parameters.items():
            if name not in self._sums:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self._sums[name] = torch.zeros_like(parameter, dtype=wide)
        return self._sums


class GradientWalk:
    """Gradients of the mean item loss of each set, layer by layer."""

    def __init__(
        self, stream: LayerStream, sets: Sets, states: States, batch_tokens: int | None = None
    ) -> None:
        self._stream = stream
        self._sets = sets
        self._batches = [
            (name, batch)
            for name, items in sets.items()
            for batch in batched(
                [item.ids for item in items], batch_tokens or token_limit(stream.device)
            )
        ]
        self._states = states.within(plan_mark(batch for _, batch in self._batches))
        self._first: list[Tensor] = []
        self._calls: list[list[LayerCall]] = []
        for _, batch in self._batches:
            hidden, calls = stream.enter(batch.ids)
            self._first.append(hidden.cpu())
            self._calls.append(calls)
        # Each item's mean token NLL, known once the head was visited.
        self.losses: dict[str, list[float]] = {n: [math.nan] * len(i) for n, i in sets.items()}

    def run(self, visit: Visit, done: Collection[int | None], progress: Progress) -> None:
        """Walk forward and backward; `visit(layer, gradients per set)` once per layer.

        The parameters outside the layers come first, as layer None. Layers in `done` were
        visited by an earlier, killed walk: they are not visited again, and not even walked
        if that walk's states are still there.
        """
        count, states = self._stream.num_layers, self._states
        total = 2 * count
        pulled = [i for i in range(count + 1) if states.has(f"grad.{i}")]
        start = min(pulled, default=count)
        if not pulled:
            self._forward(progress, total)
        if not pulled or None not in done:
            self._head(visit, done)
        if start < count and start not in done:
            start += 1  # that layer was walked, but the kill came before its visit
        if start < count:
            progress(total - start, total)
        for layer in reversed(range(start)):
            found = self._backward(layer)
            if layer not in done:
                visit(layer, found)
            # Dropped only after the visit has committed the layer: a kill in between
            # finds either the gradient that entered the layer, or the layer done.
            states.drop(f"grad.{layer + 1}")
            states.drop(f"hidden.{layer}")
            progress(total - layer, total)

    @torch.no_grad()
    def _forward(self, progress: Progress, total: int) -> None:
        stream, states = self._stream, self._states
        count = stream.num_layers
        reached = max((i for i in range(count + 1) if states.has(f"hidden.{i}")), default=None)
        if reached is None:
            reached = 0
            states.save("hidden.0", self._first)
        hidden = states.load(f"hidden.{reached}")
        for layer in range(reached, count):
            with stream.layer(layer) as module:
                hidden = [
                    stream.run(module, h.to(stream.device), calls[layer]).cpu()
                    for h, calls in zip(hidden, self._calls, strict=True)
                ]
            states.save(f"hidden.{layer + 1}", hidden)
            progress(layer + 1, total)

    def _head(self, visit: Visit, done: Collection[int | None]) -> None:
        """Loss, its gradient at the last state, and the gradients outside the layers."""
        stream, states = self._stream, self._states
        count = stream.num_layers
        hidden = states.load(f"hidden.{count}")
        gradients: list[Tensor] = [torch.empty(0)] * len(hidden)
        for p in stream.outside.values():
            p.requires_grad_(True)
        found: dict[str, Gradients] = {}
        for name, items in self._sets.items():
            sums = Accumulator(stream.outside)
            for index, batch in self._of(name):
                chosen = [items[i] for i in batch.items]
                losses, grad = stream.losses(hidden[index].to(stream.device), chosen)
                assert grad is not None
                gradients[index] = grad.cpu()
                for item, loss in zip(batch.items, losses, strict=True):
                    self.losses[name][item] = loss
                sums.collect()
            found[name] = sums.result()
        for p in stream.outside.values():
            p.requires_grad_(False)
        states.save(f"grad.{count}", gradients)
        if None not in done:
            visit(None, found)
        states.drop(f"hidden.{count}")

    def _of(self, name: str) -> list[tuple[int, Batch]]:
        """The batches of a set with their places in the lists of states."""
        return [(i, batch) for i, (owner, batch) in enumerate(self._batches) if owner == name]

    def _backward(self, layer: int) -> dict[str, Gradients]:
        stream, states = self._stream, self._states
        hidden, incoming = states.load(f"hidden.{layer}"), states.load(f"grad.{layer + 1}")
        outgoing: list[Tensor] = [torch.empty(0)] * len(hidden)
        found: dict[str, Gradients] = {}
        with stream.layer(layer, grad=True) as module:
            for name in self._sets:
                sums = Accumulator(dict(module.named_parameters()))
                for index, _ in self._of(name):
                    state = hidden[index].to(stream.device).requires_grad_(True)
                    out = stream.run(module, state, self._calls[index][layer])
                    torch.autograd.backward(out, incoming[index].to(stream.device))
                    assert state.grad is not None
                    outgoing[index] = state.grad.cpu()
                    sums.collect()
                found[name] = sums.result()
        states.save(f"grad.{layer}", outgoing)
        return found


@torch.no_grad()
def item_losses(
    stream: LayerStream, items: list[Item], progress: Progress
) -> tuple[list[float], list[Tensor]]:
    """Each item's mean token NLL, and its state [T, d] after the last layer; forward only."""
    batches = batched([item.ids for item in items], token_limit(stream.device))
    entered = [stream.enter(batch.ids) for batch in batches]
    hidden = [h.cpu() for h, _ in entered]
    for layer in range(stream.num_layers):
        with stream.layer(layer) as module:
            hidden = [
                stream.run(module, h.to(stream.device), calls[layer]).cpu()
                for h, (_, calls) in zip(hidden, entered, strict=True)
            ]
        progress(layer + 1, stream.num_layers)
    losses, states = [math.nan] * len(items), [torch.empty(0)] * len(items)
    for batch, h in zip(batches, hidden, strict=True):
        found, _ = stream.losses(h.to(stream.device), [items[i] for i in batch.items])
        own = unpadded(batch, h)
        for place, loss, state in zip(batch.items, found, own, strict=True):
            losses[place], states[place] = loss, state
    return losses, states
