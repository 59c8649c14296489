"""Losses of calibration items at the head, and the gradient that goes back from there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crane_tasks.models.walk.batches import Batch, batched, unpadded
from crane_tasks.models.walk.overlay import Overlay, Overlays
from crane_tasks.models.walk.pace import OnStep, Pace
from crane_tasks.models.walk.passage import Passage
from crane_tasks.models.walk.stream import LayerStream

# Logits are made for so many bytes of float32 at a time: a vocabulary of 152k times 2,000
# target tokens would be 1.2 GB.
LOGIT_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}


# A set's losses, and states [T, d] after the last layer, by item.
SetLosses = tuple[list[float], list[Tensor]]


@dataclass(frozen=True)
class Item:
    """One calibration item: token ids [T], of which the first `prompt` are masked.

    `weight` is the item's share in the set's objective, 1 / (number of items).
    """

    ids: Int[Tensor, " T"]
    prompt: int
    weight: float

    @property
    def targets(self) -> int:
        return int(self.ids.numel()) - self.prompt


@torch.no_grad()
def item_losses(
    stream: LayerStream, items: list[Item], on_step: OnStep
) -> tuple[list[float], list[Tensor]]:
    """Each item's mean token NLL, and its state [T, d] after the last layer; forward only."""
    return losses_of_sets(stream, [items], on_step)[0]


@torch.no_grad()
def losses_of_sets(
    stream: LayerStream, sets: Sequence[list[Item]], on_step: OnStep
) -> list[SetLosses]:
    """`item_losses` of several sets in one walk: every weight is read once.

    No batch holds items of two sets, so that a set's losses have the same bits in any company.
    """
    batches = _batches(stream, sets)
    passage = Passage(stream, [batch for _, batch in batches], 2)
    count = stream.num_layers
    pace = Pace(on_step, layers=count, tokens=passage.tokens, passes=count)
    stream.expect(range(count))
    for layer in range(count):
        with stream.on_each(layer) as modules:
            passage.push(modules, layer, pace)
        pace.layer()
    return _at_the_head(stream, sets, batches, passage)


@torch.no_grad()
def losses_of_models(
    stream: LayerStream,
    sets: Sequence[list[Item]],
    edits: Sequence[Overlay],
    together: Overlays,
    on_step: OnStep,
) -> list[list[SetLosses]]:
    """`losses_of_sets` of several models that differ from the checkpoint by an edit each.

    One walk: every layer is read once, and is there once for each of them. The bits are those
    of walks of their own.

    Args:
        together: what all the edits make of a slot, in their order.
    """
    batches = _batches(stream, sets)
    passages = []
    for number, edit in enumerate(edits):
        own = [stream.device_of(number)]
        with stream.edited(edit, layers=False):
            passages.append(Passage(stream, [b for _, b in batches], 2 * len(edits), own))
    count, tokens = stream.num_layers, passages[0].tokens * len(edits)
    pace = Pace(on_step, layers=count, tokens=tokens, passes=count)
    stream.expect(range(count))
    for layer in range(count):
        with stream.layers(layer, together, len(edits)) as modules:
            for number, (module, passage) in enumerate(zip(modules, passages, strict=True)):
                passage.push([module], layer, pace, first=number * len(batches))
        pace.layer()
    found = []
    for edit, passage in zip(edits, passages, strict=True):
        with stream.edited(edit, layers=False):
            found.append(_at_the_head(stream, sets, batches, passage))
    return found


def _batches(stream: LayerStream, sets: Sequence[list[Item]]) -> list[tuple[int, Batch]]:
    """The sets' batches, each with its set's place."""
    return [
        (number, batch)
        for number, items in enumerate(sets)
        for batch in batched([item.ids for item in items], stream.batch_tokens)
    ]


def _at_the_head(
    stream: LayerStream,
    sets: Sequence[list[Item]],
    batches: Sequence[tuple[int, Batch]],
    passage: Passage,
) -> list[SetLosses]:
    found = [([math.nan] * len(items), [torch.empty(0)] * len(items)) for items in sets]
    with stream.head():
        for index, (number, batch) in enumerate(batches):
            items, (losses, states), h = sets[number], found[number], passage.hidden[index]
            last = passage.keeper(index).fetch(h).to(stream.device)
            of_batch, _ = batch_losses(stream, last, [items[i] for i in batch.items])
            for place, loss, state in zip(batch.items, of_batch, unpadded(batch, h), strict=True):
                losses[place], states[place] = loss, state
    return found


def batch_losses(
    stream: LayerStream, hidden: Float[Tensor, "B T d"], items: Sequence[Item]
) -> tuple[list[float], Float[Tensor, "B T d"] | None]:
    """Each item's mean token NLL over its targets, and the weighted gradient.

    `hidden` is the batch's state after the last layer, an item per row, padded on the
    right. The gradient (None when grad is off) is that of the sum of `item.weight`
    times the item's loss; the gradients of `stream.outside` accumulate alongside. Logits are
    made for so many target tokens at a time as `LOGIT_BYTES` allows.
    """
    grad = torch.is_grad_enabled()
    total = torch.zeros(len(items), dtype=torch.float64, device=stream.device)
    counts = torch.tensor([item.targets for item in items], dtype=torch.float64)
    weights = torch.tensor([item.weight for item in items], dtype=torch.float64) / counts
    weights = weights.to(stream.device)
    places = [_target_places(row, hidden.shape[1], item) for row, item in enumerate(items)]
    rows, at, labels = (torch.cat(part).to(stream.device) for part in zip(*places, strict=True))
    step = max(1, LOGIT_BYTES[stream.device.type] // (4 * stream.vocab_size))
    leaf = hidden.detach().reshape(1, -1, hidden.shape[-1]).requires_grad_(grad)
    with stream.head():
        for first in range(0, rows.numel(), step):
            chosen = slice(first, first + step)
            logits = stream.logits(leaf, at[chosen])
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = nn.functional.cross_entropy(wide, labels[chosen], reduction="none")
            total.index_add_(0, rows[chosen], loss.detach().double())
            if grad:
                torch.autograd.backward((loss * weights[rows[chosen]]).sum())
    gradient = None if leaf.grad is None else leaf.grad.view(hidden.shape)
    return (total.cpu() / counts).tolist(), gradient


def _target_places(row: int, width: int, item: Item) -> tuple[Tensor, Tensor, Tensor]:
    """An item's row, the places of the states that predict its targets, and the targets.

    Places count through a batch [B, width, d] whose rows lie one after the other.
    """
    at = torch.arange(item.prompt - 1, int(item.ids.numel()) - 1)
    return torch.full_like(at, row), at + row * width, item.ids[item.prompt :]
