"""Activations at the input sites, added up in one forward walk.

Only a sum over the rows is kept per site, such as HᵀH, so memory does not grow with the rows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crane_tasks.models.files.layout import Site
from crane_tasks.models.walk.batches import Batch, batched, plan_mark
from crane_tasks.models.walk.pace import OnStep, Pace
from crane_tasks.models.walk.passage import Passage
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import LayerStream


@dataclass
class Sum:
    """What the rows seen so far come to, e.g. HᵀH float64 [d, d], and how many there were."""

    total: Float[Tensor, "..."]
    rows: int


Sums = dict[str, dict[int, Sum]]  # site -> expert (0 if none) -> sum
Reduce = Callable[[Tensor], Tensor]  # rows [n, d] -> their sum of some kind


class _Taps:
    """Forward hooks on one layer that add up what chosen rows come to."""

    def __init__(
        self, module: nn.Module, sites: Collection[Site], reduce: Reduce, masks: list[Tensor]
    ) -> None:
        self.sums: Sums = {}
        self._masks = masks
        self._rows = masks[0]
        self._reduce = reduce
        self._handles = []
        modules = dict(module.named_modules())
        for site in sites:
            if (target := modules.get(site.module)) is None:
                continue  # a linear-attention layer has no self_attn, and so on
            hook = {
                "output": partial(self._output, site.name),
                "input": partial(self._input, site.name),
                "routed": partial(self._routed, site.name),
            }[site.side]
            self._handles.append(target.register_forward_hook(hook))

    def choose(self, batch: int) -> None:
        """Whose rows the hooks will see."""
        self._rows = self._masks[batch]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, site: str, expert: int, rows: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        total = self._reduce(rows)
        sums = self.sums.setdefault(site, {})
        if expert in sums:
            sums[expert].total += total
            sums[expert].rows += rows.shape[0]
        else:
            sums[expert] = Sum(total, rows.shape[0])

    def _chosen(self, states: Tensor) -> Tensor:
        return states.reshape(-1, states.shape[-1])[self._rows]

    def _output(self, site: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._add(site, 0, self._chosen(output))

    def _input(self, site: str, _module: nn.Module, args: Any, _output: Tensor) -> None:
        self._add(site, 0, self._chosen(args[0]))

    def _routed(self, site: str, module: nn.Module, args: Any, _output: Tensor) -> None:
        """The true input of each expert's down projection, for the rows routed to it."""
        hidden, chosen = self._chosen(args[0]), args[1][self._rows]
        experts: Any = module
        for expert in torch.unique(chosen).tolist():
            rows = hidden[(chosen == expert).any(dim=-1)]
            gate, up = nn.functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            self._add(site, int(expert), experts.act_fn(gate) * up)


@torch.no_grad()
def walk_activations(
    stream: LayerStream,
    items: list[tuple[Tensor, Tensor]],
    sites: Collection[Site],
    *,
    reduce: Reduce,
    states: States,
    done: Collection[int],
    visit: Callable[[int, Sums], None],
    on_step: OnStep,
) -> None:
    """Push the items through all layers: token ids int64 [T], mask of the rows taken bool [T].

    `visit(layer, sums)` once per layer that is not in `done`, in order; the state behind a
    visited layer is kept in `states`, so that a killed walk resumes behind it.
    """
    batches = batched([ids for ids, _ in items], stream.batch_tokens)
    passage = Passage(stream, batches, 3)
    states = states.within(plan_mark(batches))
    states.offload = passage.offload
    masks = [_mask(b, items).to(stream.device_of(i)) for i, b in enumerate(batches)]
    reached = max((i + 1 for i in done if states.has(f"behind.{i}")), default=0)
    if reached:
        passage.hidden = states.load(f"behind.{reached - 1}")
    count = stream.num_layers
    pace = Pace(on_step, layers=count, tokens=passage.tokens, passes=count, skipped=reached)
    stream.expect(range(reached, count))
    try:
        for layer in range(reached, count):
            with stream.on_each(layer) as modules:
                taps = [_Taps(module, sites, reduce, masks) for module in modules]
                passage.push(modules, layer, pace, partial(_choose, taps, passage))
                for tapped in taps:
                    tapped.remove()
            if layer + 1 < count:  # behind the last one nothing goes on
                states.save(f"behind.{layer}", passage.hidden)
            if layer not in done:
                visit(layer, _together([tapped.sums for tapped in taps], stream.device))
            states.drop(f"behind.{layer - 1}")
            pace.layer()
    finally:
        states.flush()


def _choose(taps: Sequence[_Taps], passage: Passage, batch: int) -> None:
    taps[passage.place(batch)].choose(batch)


def _together(parts: list[Sums], device: torch.device) -> Sums:
    """What the devices have added up, in their order, on one of them."""
    first, *rest = parts
    for sums in rest:
        for site, by_expert in sums.items():
            own = first.setdefault(site, {})
            for expert, one in by_expert.items():
                moved = one.total.to(device)
                if expert in own:
                    own[expert].total += moved
                    own[expert].rows += one.rows
                else:
                    own[expert] = Sum(moved, one.rows)
    return first


def _mask(batch: Batch, items: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Which rows of a batch are taken, bool [B * T]; none of the padding."""
    return batch.rows([items[i][1] for i in batch.items], fill=False).flatten()
