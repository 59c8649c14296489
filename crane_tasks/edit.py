"""The edit of one weight, from what the stages have stored (DESIGN 1).

    θ = θ_base + P_τ( α · S(c, l) · T(δ) )

except for the router under `router: slerp`, and for embedding and lm_head, which move by a
plain fraction of δ row by row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from artifacts.store import Artifact
from crane_tasks.check import special_tokens
from crane_tasks.delta import decode
from crane_tasks.errors import CraneError, RecipeError
from crane_tasks.models.checkpoint import Checkpoint
from crane_tasks.models.layout import Site, Slot
from crane_tasks.numerics.merge import round_stochastic, seed_of, slerp
from crane_tasks.numerics.projector import project, protection
from crane_tasks.numerics.threshold import keep_above
from crane_tasks.projector import basis_site, read_basis
from crane_tasks.recipe import Recipe, Rows
from crane_tasks.scores import Scores
from crane_tasks.threshold import PLAIN, read_thresholds

# The official script's rule for the router under slerp.
SLERP_SHARE = 1.0 / 3.0
# Rows of an embedding handled at a time: 152k rows of 2,048 in float32 would be 1.2 GB.
ROW_BLOCK = 8192
# Bases held at a time: those of two layers, as a shard may end within one.
KEPT_BASES = 16


@dataclass(frozen=True)
class Edited:
    """A part of one tensor: base and result as stored, delta and intended edit in float32."""

    base: Tensor
    stored: Tensor
    delta: Tensor
    intended: Tensor


@dataclass
class Editor:
    """Computes merged tensors one at a time, from artifacts and the base."""

    recipe: Recipe
    base: Checkpoint
    delta: Artifact
    thresholds: Artifact
    scores: Scores
    projector: Artifact
    row_factors: Mapping[str, Tensor]  # component -> fraction of delta per row
    device: torch.device
    _thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    _bases: dict[tuple[str, str], tuple[Tensor, Tensor] | None] = field(default_factory=dict)

    def parts(self, slot: Slot, expert: int) -> Iterator[Edited]:
        """The merged tensor of a slot: whole, or in blocks of rows in order."""
        piece = self.base.pieces[slot.name][expert]
        if slot.component not in PLAIN:
            index = expert if slot.stacked else ...
            yield self._edited(slot, expert, piece.read(), index, first=0)
            return
        rows = piece.shape[0]
        for first in range(0, rows, ROW_BLOCK):
            last = min(rows, first + ROW_BLOCK)
            yield self._edited(slot, 0, piece.read(first, last), slice(first, last), first=first)

    def _edited(self, slot: Slot, expert: int, base: Tensor, index: Any, first: int) -> Edited:
        base = base.to(self.device)
        code = self.delta.read(slot.unit, slot.array_name, index).to(self.device)
        delta, weight = decode(base, code), base.float()
        intended = self._intended(slot, expert, weight, delta, first)
        # A stored head that is tied to the embedding is rounded as that is.
        tied = slot.name == "lm_head.weight" and slot.component == "embedding"
        name = "model.embed_tokens.weight" if tied else slot.tensor_name(expert)
        offset = first * (base.numel() // max(1, base.shape[0])) if base.dim() else 0
        rounded = self._rounded(weight + intended, base.dtype, name, offset)
        # Without an edit the base's own bits: the sum would turn a minus zero into a zero.
        return Edited(base, torch.where(intended == 0, base, rounded), delta, intended)

    def _intended(
        self, slot: Slot, expert: int, weight: Tensor, delta: Tensor, first: int
    ) -> Tensor:
        if slot.component in PLAIN:
            factors = self.row_factors[slot.component][first : first + delta.shape[0]]
            return factors.to(self.device)[:, None] * delta
        if slot.component == "router" and self.recipe.merge.router == "slerp":
            share = self.recipe.alpha * SLERP_SHARE
            return slerp(weight, weight + delta, share) - weight
        step = keep_above(delta, self._threshold(slot, expert))
        step *= self.recipe.alpha * self.scores.of(slot)
        return self._projected(slot, expert, step)

    def _threshold(self, slot: Slot, expert: int) -> float:
        if slot.unit not in self._thresholds:
            self._thresholds[slot.unit] = read_thresholds(self.thresholds, slot.unit)
        return self._thresholds[slot.unit][slot.tensor_name(expert)]

    def _projected(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        site = basis_site(self.projector, slot, step.shape[-1])
        found = self._basis(slot, site, expert) if site else None
        if site is None or found is None:
            return step
        directions, weight = found
        if directions.shape[0] != step.shape[-1]:
            raise CraneError(
                f"{slot.tensor_name(expert)} reads {step.shape[-1]} inputs, its projector at "
                f"{site.name} has {directions.shape[0]}"
            )
        return project(step, directions, weight)

    def _basis(self, slot: Slot, site: Site, expert: int) -> tuple[Tensor, Tensor] | None:
        """V and w at a site; kept for the layer's other tensors."""
        own = expert if site.side == "routed" else 0
        key = (slot.unit, f"{site.name}.{own}")
        if key not in self._bases:
            found = read_basis(self.projector, slot, site, own)
            if found is not None:
                weight = protection(found[1], self.recipe.tau).float()
                found = found[0].to(self.device), weight.to(self.device)
            while len(self._bases) > KEPT_BASES:
                self._bases.pop(next(iter(self._bases)))
            self._bases[key] = found
        return self._bases[key]

    def _rounded(self, value: Tensor, dtype: torch.dtype, name: str, offset: int) -> Tensor:
        merge = self.recipe.merge
        if merge.rounding == "stochastic" and dtype == torch.bfloat16:
            return round_stochastic(value, seed=seed_of(merge.seed, name), offset=offset)
        return value.to(dtype)


def row_factors(rows: Rows, count: int, tokenizer: Any, where: str) -> Tensor:
    """The fraction of the delta that each of `count` rows moves by: float32 [count].

    `scale` everywhere, 0 at special tokens if they are kept, and the rows named by token on
    top of both.

    Raises:
        RecipeError: `rows` names a token that is not in the vocabulary.
    """
    factors = torch.full((count,), float(rows.scale))
    vocabulary = tokenizer.get_vocab()
    if rows.keep_special:
        for token in special_tokens(tokenizer):
            factors[vocabulary[token]] = 0.0
    unknown = [token for token in rows.rows if token not in vocabulary]
    if unknown:
        raise RecipeError(
            f"{where}.rows: no single token in the base's vocabulary: "
            f"{', '.join(map(repr, unknown))}"
        )
    for token, fraction in rows.rows.items():
        factors[vocabulary[token]] = fraction
    return factors
