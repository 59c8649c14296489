"""What the gate takes from the walk: one forward and one backward for all layers.

Forward: every batch's state is pushed through each layer in turn and kept at the boundary.
Backward, from the last layer down: the layer is loaded once, each batch's forward is
recomputed with grad from its boundary, and the incoming gradient is pulled through it.
"""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crane_tasks.models.walk.batches import Batch, batched, plan_mark
from crane_tasks.models.walk.loading import on
from crane_tasks.models.walk.losses import Item, batch_losses
from crane_tasks.models.walk.pace import OnStep, Pace
from crane_tasks.models.walk.passage import Passage
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import LayerStream

Gradients = dict[str, Tensor]  # parameter name within its layer -> gradient
Sets = Mapping[str, list[Item]]
Visit = Callable[[int | None, dict[str, Gradients]], None]
# A batch's way back costs its forward once more and twice that for the two gradients.
BACKWARD = 3


class Accumulator:
    """Adds up parameter gradients over batches in float32 (or wider), whatever the compute dtype.

    Left to autograd, a bfloat16 parameter would collect its gradient in bfloat16. Each
    gradient is taken as soon as it is there, so that only one of them is in memory beside
    the sums; a single batch needs no sum.
    """

    def __init__(self, *copies: Mapping[str, nn.Parameter]) -> None:
        """`copies`: the parameters on each device; the sums come to be on the first."""
        self._parameters = copies[0]
        self._sums: list[Gradients] = [{} for _ in copies]
        self._hooks = []
        for sums, parameters in zip(self._sums, copies, strict=True):
            for name, parameter in parameters.items():
                hooked: Any = parameter  # the method has no types
                take = partial(_take, sums, name)
                self._hooks.append(hooked.register_post_accumulate_grad_hook(take))

    def result(self, kept: torch.dtype | None) -> Gradients:
        """The sums, rounded once to `kept` (None: float32 or wider); ends the collection.

        A parameter that no item reached (an idle expert) has gradient 0.
        """
        for hook in self._hooks:
            hook.remove()
        totals: Gradients = {}
        first, *others = self._sums
        for name, parameter in self._parameters.items():
            for sums in others:  # in the devices' order, so that every run adds alike
                if name in sums:
                    _add(first, name, sums.pop(name).to(parameter.device))
            dtype = kept or torch.promote_types(parameter.dtype, torch.float32)
            if name in first:
                totals[name] = first.pop(name).to(dtype)
            else:
                totals[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return totals


def _take(sums: Gradients, name: str, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    _add(sums, name, gradient)


def _add(sums: Gradients, name: str, gradient: Tensor) -> None:
    if name not in sums:
        sums[name] = gradient
    else:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        sums[name] = sums[name].to(wide).add_(gradient)


class GradientWalk:
    """Gradients of the mean item loss of each set, layer by layer.

    Attributes:
        losses: each item's mean token NLL, known once the head was visited.
    """

    def __init__(
        self,
        stream: LayerStream,
        sets: Sets,
        states: States,
        *,
        batch_tokens: int | None = None,
        kept: torch.dtype | None = None,
    ) -> None:
        """`kept`: the dtype to which a set's finished gradients are rounded, or None."""
        self._stream = stream
        self._sets = sets
        self._kept = kept
        self._batches = [
            (name, batch)
            for name, items in sets.items()
            for batch in batched([item.ids for item in items], batch_tokens or stream.batch_tokens)
        ]
        self._states = states.within(plan_mark(batch for _, batch in self._batches))
        self._passage = Passage(stream, [b for _, b in self._batches], stream.num_layers + 2)
        self._states.offload = self._passage.offload
        self.losses: dict[str, list[float]] = {n: [math.nan] * len(i) for n, i in sets.items()}

    def run(self, visit: Visit, done: Collection[int | None], on_step: OnStep) -> None:
        """Walk forward and backward; `visit(layer, gradients per set)` once per layer.

        The parameters outside the layers come first, as layer None. Layers in `done` were
        visited by an earlier, killed walk: they are not visited again, and not even walked
        if that walk's states are still there.
        """
        count = self._stream.num_layers
        if all(layer in done for layer in (None, *range(count))):
            return
        start = self._start(done)
        if start is None and not self._states.has("hidden.0"):
            self._states.save("hidden.0", self._passage.hidden)
        reached = self._reached() if start is None else count
        pace = Pace(
            on_step,
            layers=count,
            tokens=self._passage.tokens,
            passes=count * (1 + BACKWARD),
            skipped=reached + (0 if start is None else (count - start) * BACKWARD),
        )
        begin = count if start is None else start
        self._stream.expect([*range(reached, count), *reversed(range(begin))])
        try:
            if start is None:
                self._forward(reached, pace)
            self._passage.hidden = []  # not to be in memory on the way back
            if start is None or None not in done:
                self._head(visit, done)
            self._back(begin, visit, done, pace)
        finally:
            # What has been reached is on disk before this run's memory goes.
            self._states.flush()

    def _start(self, done: Collection[int | None]) -> int | None:
        """How many layers are still to walk back by what an earlier walk left, or None.

        The gradient that enters the last of them is there, their states are, and the
        layers behind them are done.
        """
        count, states = self._stream.num_layers, self._states
        for start in range(1, count + 1):
            if (
                states.has(f"grad.{start}")
                and all(layer in done for layer in range(start, count))
                and all(states.has(f"hidden.{i}") for i in range(start))
                and (None in done or states.has(f"hidden.{count}"))
            ):
                return start
        # What else lies there is of no use to a walk that has other layers to visit.
        for i in range(1, count + 1):
            states.drop(f"grad.{i}")
        return None

    def _reached(self) -> int:
        """The boundary up to which a walk came forward, this one or an earlier."""
        count, states = self._stream.num_layers, self._states
        return next((i for i in range(count + 1) if not states.has(f"hidden.{i}")), count + 1) - 1

    def _forward(self, reached: int, pace: Pace) -> None:
        stream, states, passage = self._stream, self._states, self._passage
        passage.hidden = states.load(f"hidden.{reached}")
        for layer in range(reached, stream.num_layers):
            with stream.on_each(layer) as modules:
                passage.push(modules, layer, pace)
            states.save(f"hidden.{layer + 1}", passage.hidden)
            pace.layer()

    def _head(self, visit: Visit, done: Collection[int | None]) -> None:
        """Loss, its gradient at the last state, and the gradients outside the layers."""
        stream, states = self._stream, self._states
        count = stream.num_layers
        hidden = states.load(f"hidden.{count}")
        gradients: list[Tensor] = [torch.empty(0)] * len(hidden)
        for p in stream.outside.values():
            p.requires_grad_(True)
        by_set: dict[str, Gradients] = {}
        with stream.head():
            for name, items in self._sets.items():
                sums = Accumulator(stream.outside)
                for index, batch in self._of(name):
                    chosen = [items[i] for i in batch.items]
                    keeper = self._passage.keeper(index)
                    last = keeper.fetch(hidden[index]).to(stream.device)
                    losses, grad = batch_losses(stream, last, chosen)
                    assert grad is not None
                    gradients[index] = keeper.keep(grad.to(keeper.device))
                    for item, loss in zip(batch.items, losses, strict=True):
                        self.losses[name][item] = loss
                by_set[name] = sums.result(self._kept)
        for p in stream.outside.values():
            p.requires_grad_(False)
        self._passage.settle()
        states.save(f"grad.{count}", gradients)
        if None not in done:
            visit(None, by_set)
        states.drop(f"hidden.{count}")

    def _of(self, name: str) -> list[tuple[int, Batch]]:
        """The batches of a set with their places in the lists of states."""
        return [(i, batch) for i, (owner, batch) in enumerate(self._batches) if owner == name]

    def _back(self, begin: int, visit: Visit, done: Collection[int | None], pace: Pace) -> None:
        states = self._states
        gradients = states.load(f"grad.{begin}")
        for layer in reversed(range(begin)):
            if layer > 0:
                states.ask(f"hidden.{layer - 1}")
            by_set, gradients = self._backward(layer, gradients, pace)
            if layer > 0:
                states.save(f"grad.{layer}", gradients)
            if layer not in done:
                visit(layer, by_set)
            del by_set  # not to be in memory beside the next layer's
            # Dropped only after the visit has committed the layer: a kill in between
            # finds either the gradient that entered the layer, or the layer done.
            states.drop(f"grad.{layer + 1}")
            states.drop(f"hidden.{layer}")
            pace.layer()

    def _backward(
        self, layer: int, incoming: list[Tensor], pace: Pace
    ) -> tuple[dict[str, Gradients], list[Tensor]]:
        """One layer's gradients per set, and the gradients of the states that enter it."""
        stream = self._stream
        hidden = self._states.load(f"hidden.{layer}")
        outgoing: list[Tensor] = [torch.empty(0)] * len(hidden)
        by_set: dict[str, Gradients] = {}
        passage = self._passage
        with stream.on_each(layer, grad=True) as modules:
            for name in self._sets:
                sums = Accumulator(*(dict(module.named_parameters()) for module in modules))
                for index, _ in self._of(name):
                    keeper, module = passage.keeper(index), modules[passage.place(index)]
                    with on(keeper.device):
                        state = keeper.fetch(hidden[index]).detach().requires_grad_(True)
                        out = stream.run(module, state, passage.calls[index][layer])
                        torch.autograd.backward(out, keeper.fetch(incoming[index]))
                        assert state.grad is not None
                        outgoing[index] = keeper.keep(state.grad)
                    pace.batch("backward", layer, index, BACKWARD)
                by_set[name] = sums.result(self._kept)
        passage.settle()
        return by_set, outgoing
