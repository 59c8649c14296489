"""Items of like length run together, padded on the right.

In a causal model no token sees what follows it, in full as in linear attention, so padding
behind an item changes nothing before it; and as no loss is taken there, its gradients are
zero. No mask is needed, which keeps the fast path of attention.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A batch's shortest item is at least this share of its longest, so padding is bounded.
LIKE = 0.75


@dataclass(frozen=True)
class Batch:
    """Padded token ids [B, T] and the items' indices and lengths."""

    ids: Int[Tensor, "B T"]
    items: tuple[int, ...]
    lengths: tuple[int, ...]

    def rows(self, parts: Sequence[Tensor], fill: float | bool = 0) -> Tensor:
        """Per-token tensors of the items, padded: [B, T]."""
        return _padded(parts, self.ids.shape[1], fill)


def batched(sequences: Sequence[Tensor], limit: int) -> list[Batch]:
    """Sequences (token ids [T] each) by length, longest first, in batches of like lengths.

    A batch has at most `limit` tokens, or one item. Depends on the lengths and the limit
    alone, so a resumed walk sees the same batches.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-sequences[i].numel(), i))
    groups: list[list[int]] = []
    for index in order:
        length = sequences[index].numel()
        if groups:
            longest = sequences[groups[-1][0]].numel()
            if length >= LIKE * longest and (len(groups[-1]) + 1) * longest <= limit:
                groups[-1].append(index)
                continue
        groups.append([index])
    return [_batch(sequences, group) for group in groups]


def plan_mark(batches: Iterable[Batch]) -> str:
    """Names a plan of batches: states kept under one plan are of no use under another."""
    plan = repr([(batch.items, batch.lengths) for batch in batches])
    return blake2b(plan.encode(), digest_size=6).hexdigest()


def _batch(sequences: Sequence[Tensor], group: list[int]) -> Batch:
    lengths = tuple(int(sequences[i].numel()) for i in group)
    ids = _padded([sequences[i] for i in group], lengths[0], 0)
    return Batch(ids.long(), tuple(group), lengths)


def _padded(parts: Sequence[Tensor], width: int, fill: float | int) -> Tensor:
    """Vectors as rows of one tensor [B, width], filled up on the right."""
    out = torch.full((len(parts), width), fill, dtype=parts[0].dtype)
    for row, part in enumerate(parts):
        out[row, : part.numel()] = part
    return out


def unpadded(batch: Batch, states: Float[Tensor, "B T d"]) -> list[Tensor]:
    """Each item's own states [t, d]."""
    return [states[row, :length] for row, length in enumerate(batch.lengths)]
