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
VERSION = 1
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
    """A set read back from the store."""

    sequences: list[Tensor]
    target_lengths: list[int]
    masks: list[Tensor]
    places: list[str]

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
    places = artifact.unit_meta("set")["places"]
    return TokenSet([ids[a:b] for a, b in spans], lengths, masks, places)
