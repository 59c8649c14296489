"""Other weights laid over a checkpoint's, slot by slot, and its own ones put back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.loading import Loader

# Several edits' of one slot at once: (expert, first row, rows by each of them).
Overlays = Callable[[str], Iterable[tuple[int, int, Sequence[Tensor]]]]


@dataclass(frozen=True)
class Overlay:
    """What an edit makes of a checkpoint.

    Attributes:
        pieces: the edited tensors of a slot as they would be stored: (expert, first row, rows).
        moves: whether a slot is to be overwritten at all.
    """

    pieces: Callable[[str], Iterable[tuple[int, int, Tensor]]]
    moves: Callable[[str], bool] = lambda slot: True


def lay_over(checkpoint: Checkpoint, edit: Overlay, weights: Mapping[str, Tensor]) -> None:
    """Overwrite weights, by the model's names for them, by what the edit makes of their slots."""

    def pieces(slot: str) -> Iterable[tuple[int, int, list[Tensor]]]:
        return ((expert, first, [rows]) for expert, first, rows in edit.pieces(slot))

    slots_of = checkpoint.slots_of
    moved = {n: w for n, w in weights.items() if any(map(edit.moves, slots_of(n)))}
    lay_all_over(checkpoint, pieces, [moved])


def lay_all_over(
    checkpoint: Checkpoint, edits: Overlays, models: Sequence[Mapping[str, Tensor]]
) -> None:
    """The same weights of several models, each overwritten by an edit of its own."""
    for name in models[0]:
        first = 0
        # What a checkpoint only carries has no slot and stays as it is.
        for slot in filter(checkpoint.slots.get, checkpoint.slots_of(name)):
            stacked = checkpoint.slots[slot].stacked
            rows = checkpoint.pieces[slot][0].shape[0] if stacked else 0
            for expert, begin, made in edits(slot):
                for weights, merged in zip(models, made, strict=True):
                    tensor = weights[name]
                    place = tensor[expert, first : first + rows] if stacked else tensor
                    if place.dim():
                        place = place[begin : begin + merged.shape[0]]
                    place.copy_(merged.view(place.shape))
            first += rows


def read_again(
    checkpoint: Checkpoint,
    groups: Iterable[Mapping[str, Tensor]],
    device: torch.device,
    compute: torch.dtype,
) -> None:
    """Overwrite groups of weights on a device by the checkpoint's own bits.

    Raises:
        CheckpointError: they cannot be read again.
    """
    loader = Loader(device, reuse=True)
    for number, group in enumerate(groups):
        sources = {name: checkpoint.source(name) for name in group}
        own = loader.take(number, sources, compute)
        for name, tensor in group.items():
            tensor.copy_(own[name])
