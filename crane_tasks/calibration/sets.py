"""Calibration sets as they are stored, and read back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact
from crane_tasks.models.walk.losses import Item

NAME = "calibration"
VERSION = 2
SCHEMA = Schema(
    arrays={
        "token_ids": ("int64",),
        "offsets": ("int64",),
        "target_lengths": ("int64",),
        "format_mask": ("bool",),
    },
    meta=("places",),
)


def offsets_of(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Where each sequence begins in their concatenation, and the end: int64 [n + 1]."""
    lengths = torch.tensor([0, *(len(s) for s in sequences)])
    return lengths.cumsum(0)


@dataclass(frozen=True)
class TokenSet:
    """A set read back from the store.

    Attributes:
        sequences: token ids [T] of each row.
        target_lengths: how many of them are the target, at its end; empty in a format set.
        masks: which tokens hold the format, bool [T]; empty in a target set.
        places: where each row came from.
        unended: the places whose target ended for lack of room; None where it was not noted.
    """

    sequences: list[Tensor]
    target_lengths: list[int]
    masks: list[Tensor]
    places: list[str]
    unended: list[str] | None = None

    def items(self) -> list[Item]:
        """The items of a target set, weighted so that their sum is the mean over items."""
        weight = 1.0 / len(self.sequences)
        return [
            Item(ids, int(ids.numel()) - length, weight)
            for ids, length in zip(self.sequences, self.target_lengths, strict=True)
        ]

    def prompts(self) -> list[list[int]]:
        """The token ids before each target."""
        return [
            ids[: ids.numel() - length].tolist()
            for ids, length in zip(self.sequences, self.target_lengths, strict=True)
        ]

    def targets(self) -> list[list[int]]:
        """The token ids of each target."""
        return [
            ids[ids.numel() - length :].tolist()
            for ids, length in zip(self.sequences, self.target_lengths, strict=True)
        ]


def read_set(artifact: Artifact) -> TokenSet:
    """A calibration artifact as tensors."""
    ids, offsets = artifact.read("set", "token_ids"), artifact.read("set", "offsets").tolist()
    spans = list(pairwise(offsets))
    lengths, masks = [], []
    if artifact.has("set", "target_lengths"):
        lengths = artifact.read("set", "target_lengths").tolist()
    if artifact.has("set", "format_mask"):
        mask = artifact.read("set", "format_mask")
        masks = [mask[a:b] for a, b in spans]
    meta = artifact.unit_meta("set")
    sequences = [ids[a:b] for a, b in spans]
    return TokenSet(sequences, lengths, masks, meta["places"], meta.get("unended"))
