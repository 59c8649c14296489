"""The edit of weights, from what the stages have stored (DESIGN 1).

    θ = θ_base + P_τ( α · S(c, l) · T(δ) )

except for the router under `router: slerp`, and for embedding and lm_head, which move by a
plain fraction of δ row by row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from artifacts.store import Artifact
from crane_tasks.check import special_tokens
from crane_tasks.delta import decode
from crane_tasks.errors import CraneError, RecipeError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Site, Slot
from crane_tasks.numerics.edit import stacked_edit_sums
from crane_tasks.numerics.projector import project, protection
from crane_tasks.numerics.rounding import round_stochastic, seed_of
from crane_tasks.numerics.slerp import slerp
from crane_tasks.numerics.threshold import keep_above
from crane_tasks.projector import basis_site, read_basis
from crane_tasks.recipe import Recipe, Rows
from crane_tasks.scores import Scores
from crane_tasks.threshold import PLAIN, read_thresholds

# The official script's rule for the router under slerp.
SLERP_SHARE = 1.0 / 3.0
# Weights worked on at once: on a CPU few enough that all passes over them stay in its cache,
# on a GPU enough to fill it. Where a CPU's blocks begin depends on the tensor's shape alone,
# so the result does not depend on how it is stored or cut into files.
BLOCK = {"cpu": 2**18, "cuda": 2**26}
# Bases held at a time: those of two layers, as a window may end within one.
KEPT_BASES = 16


@dataclass(frozen=True)
class Edited:
    """Merged tensors in the stored dtype [n, rows, ...], and for each of them intended2,
    realised2, dot and changed of `EditSums`: float64 [n, 4]."""

    stored: Tensor
    sums: Tensor


@dataclass
class Editor:
    """Computes merged tensors from artifacts and the base; may be shared by threads."""

    recipe: Recipe
    base: Checkpoint
    delta: Artifact
    thresholds: Artifact
    scores: Scores
    projector: Artifact
    row_factors: Mapping[str, Tensor]  # component -> fraction of delta per row
    device: torch.device
    carried: frozenset[str] = frozenset()  # stored names that are copied from the base
    _thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    _bases: dict[tuple[str, str], tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def untouched(self, slot: Slot, first: int, last: int) -> bool:
        """Whether rows [first, last) stay the base's whatever the delta is."""
        if slot.component not in PLAIN:
            return False
        return not bool(self.row_factors[slot.component][first:last].any())

    def routed(self, slot: Slot) -> bool:
        """Whether every expert of the slot has a projector of its own."""
        return slot.site is not None and slot.site.side == "routed"

    def edit(
        self, slot: Slot, experts: Sequence[int], first: int, base: Tensor, code: Tensor
    ) -> Edited:
        """Rows from `first` on of some tensors of a slot.

        Args:
            experts: which of them; [0] of a plain tensor. Several only if one projector
                serves them all.
            base: their rows of the base as stored, [n, rows, ...].
            code: the same of the delta artifact.
        """
        base, code = base.to(self.device), code.to(self.device)
        stored = torch.empty_like(base)
        sums = torch.zeros(len(experts), 4, dtype=torch.float64, device=self.device)
        rows = base.shape[1]
        height = max(1, BLOCK[self.device.type] // max(1, base.numel() // max(1, rows)))
        if self._slerped(slot):
            height = max(1, rows)  # it needs the angle between the whole tensors
        for begin in range(0, rows, height):
            block = slice(begin, min(begin + height, rows))
            mine = base[:, block]
            weight = mine.float()
            # What is taken away, for x - (+0) is x also where x is -0, which x + 0 is not:
            # weights without an edit keep their bits, and no comparison has to find them.
            taken = decode(mine, code[:, block], wide=weight).neg_()
            taken = self._step(slot, experts, first + begin, weight, taken)
            merged = stored[:, block]
            self._round(slot, experts, first + begin, weight - taken, merged)
            sums += stacked_edit_sums(weight, taken.neg_(), merged)
        return Edited(stored, sums)

    def _slerped(self, slot: Slot) -> bool:
        return slot.component == "router" and self.recipe.merge.router == "slerp"

    def _step(
        self, slot: Slot, experts: Sequence[int], first: int, weight: Tensor, delta: Tensor
    ) -> Tensor:
        """The edit that belongs to a delta (of -δ: the negative edit), in float32."""
        if slot.component in PLAIN:
            factors = self.row_factors[slot.component][first : first + delta.shape[1]]
            return (factors.to(self.device)[:, None] * delta).add_(0.0)  # no -0
        if self._slerped(slot):
            return weight - slerp(weight, weight - delta, self.recipe.alpha * SLERP_SHARE)
        factor = self.recipe.alpha * self.scores.of(slot)
        if factor == 0:
            return torch.zeros_like(delta)
        step = keep_above(delta, self._threshold(slot, experts, delta)).mul_(factor)
        return self._projected(slot, experts[0], step)

    def _threshold(self, slot: Slot, experts: Sequence[int], like: Tensor) -> Tensor | float:
        with self._lock:
            if slot.unit not in self._thresholds:
                self._thresholds[slot.unit] = read_thresholds(self.thresholds, slot.unit)
        found = [self._thresholds[slot.unit][slot.tensor_name(e)] for e in experts]
        if len(found) == 1:
            return found[0]
        return like.new_tensor(found).view(-1, *[1] * (like.dim() - 1))

    def _projected(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        with self._lock:
            site = basis_site(self.projector, slot, step.shape[-1])
            found = self._basis(slot, site, expert) if site else None
        if site is None or found is None:
            return step
        directions, weight = found
        if self.device.type == "cuda":  # not to be freed under another stream's hands
            directions.record_stream(torch.cuda.current_stream())
            weight.record_stream(torch.cuda.current_stream())
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
                found = found[0].contiguous().to(self.device), weight.to(self.device)
                if self.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # other streams will read it
            while len(self._bases) > KEPT_BASES:
                self._bases.pop(next(iter(self._bases)))
            self._bases[key] = found
        return self._bases[key]

    def _round(
        self, slot: Slot, experts: Sequence[int], first: int, value: Tensor, into: Tensor
    ) -> None:
        merge = self.recipe.merge
        if merge.rounding != "stochastic" or into.dtype != torch.bfloat16:
            into.copy_(value)
            return
        # A stored head that is tied to the embedding is rounded as that is.
        tied = slot.name == "lm_head.weight" and slot.component == "embedding"
        offset = first * math.prod(value.shape[2:])
        for expert, mine, place in zip(experts, value, into, strict=True):
            name = "model.embed_tokens.weight" if tied else slot.tensor_name(expert)
            place.copy_(round_stochastic(mine, seed=seed_of(merge.seed, name), offset=offset))


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
