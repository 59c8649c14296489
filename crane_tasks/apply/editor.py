"""Merged tensors from the base, the stored delta and an edit, in blocks, rounded as asked.

The edit of a recipe is for all tensors but the router under `router: slerp`, and embedding and
lm_head, which move by a plain fraction of δ row by row (docs/method.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.store import Artifact
from crane_tasks.apply.rows import row_factors
from crane_tasks.delta import DELTA
from crane_tasks.edit import OpenEdit, open_edit
from crane_tasks.models.files.checkpoint import EMBEDDING, HEAD, Checkpoint
from crane_tasks.models.files.layout import Slot
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.numerics.bits import decode
from crane_tasks.numerics.edit import stacked_edit_sums
from crane_tasks.numerics.hashing import seed_of
from crane_tasks.numerics.rounding import ROUNDED, round_stochastic
from crane_tasks.numerics.slerp import slerp
from crane_tasks.recipe import Recipe
from crane_tasks.session import Context
from crane_tasks.sizes import PLAIN
from crane_tasks.stage import Keys

# The official script's rule for the router under slerp.
SLERP_SHARE = 1.0 / 3.0
# Weights worked on at once: on a CPU few enough that all passes over them stay in its cache,
# on a GPU enough to fill it. Where a CPU's blocks begin depends on the tensor's shape alone,
# so the result does not depend on how it is stored or cut into files.
BLOCK = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True)
class Edited:
    """Merged tensors in the stored dtype [n, rows, ...], and for each of them intended2,
    realised2, dot and changed of `EditSums`: float64 [n, 4]."""

    stored: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Editor:
    """Computes merged tensors from artifacts and the base; may be shared by threads.

    Attributes:
        row_factors: component -> the fraction of the delta that each of its rows moves by.
        carried: stored names that are copied from the base.
    """

    recipe: Recipe
    base: Checkpoint
    delta: Artifact
    edit: OpenEdit
    row_factors: Mapping[str, Tensor]
    device: torch.device
    carried: frozenset[str] = frozenset()

    def untouched(self, slot: Slot, first: int, last: int) -> bool:
        """Whether rows [first, last) stay the base's whatever the delta is."""
        if slot.component not in PLAIN:
            return False
        return not bool(self.row_factors[slot.component][first:last].any())

    def moves(self, name: str) -> bool:
        """Whether anything of a slot can be other than the base's."""
        slot = self.base.slots.get(name)
        if slot is None or slot.component not in PLAIN:
            return slot is not None  # what is only carried has no slot
        return bool(self.row_factors[slot.component].any())

    def routed(self, slot: Slot) -> bool:
        """Whether every expert of the slot has a projector of its own."""
        return slot.site is not None and slot.site.side == "routed"

    def merged(
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
            weight = base[:, block].float()
            # What is taken away, for x - (+0) is x also where x is -0, which x + 0 is not:
            # weights without an edit keep their bits, and no comparison has to find them.
            taken = decode(base[:, block], code[:, block], wide=weight).neg_()
            taken = self._step(slot, experts, first + begin, weight, taken)
            into = stored[:, block]
            self._round(slot, experts, first + begin, weight - taken, into)
            sums += stacked_edit_sums(weight, taken.neg_(), into)
        return Edited(stored, sums)

    def _slerped(self, slot: Slot) -> bool:
        if slot.component in PLAIN:
            return False
        router = slot.component == "router" and self.recipe.merge.router.startswith("slerp")
        return router or self.edit.spherical

    def _step(
        self, slot: Slot, experts: Sequence[int], first: int, weight: Tensor, delta: Tensor
    ) -> Tensor:
        """The negative edit that belongs to -δ, in float32."""
        if slot.component in PLAIN:
            factors = self.row_factors[slot.component][first : first + delta.shape[1]]
            return (factors.to(self.device)[:, None] * delta).add_(0.0)  # no -0
        if self.edit.spherical:
            share = self.recipe.alpha * self.edit.scale_of(slot)
            turned = [slerp(w, w - d, share) for w, d in zip(weight, delta, strict=True)]
            return weight - torch.stack(turned)
        if self._slerped(slot):
            if self.recipe.merge.router == "slerp-projected":
                delta = self.edit.unscaled(slot, experts, first, delta, -1)
            share = self.recipe.alpha * SLERP_SHARE * self.edit.scale_of(slot)
            return weight - slerp(weight, weight - delta, share)
        return self.edit.step(slot, experts, first, delta, -1)

    def _round(
        self, slot: Slot, experts: Sequence[int], first: int, value: Tensor, into: Tensor
    ) -> None:
        merge = self.recipe.merge
        if merge.rounding != "stochastic" or into.dtype not in ROUNDED:
            into.copy_(value)
            return
        # A stored head that is tied to the embedding is rounded as that is.
        tied = slot.name == HEAD and slot.component == "embedding"
        offset = first * math.prod(value.shape[2:])
        for expert, rows, place in zip(experts, value, into, strict=True):
            name = EMBEDDING if tied else slot.tensor_name(expert)
            seed = seed_of(merge.seed, name)
            place.copy_(round_stochastic(rows, seed=seed, offset=offset, dtype=into.dtype))


def make_editor(ctx: Context, keys: Keys) -> Editor:
    """The editor over the stages' artifacts.

    Raises:
        ScoreError: the baseline has no positive gain in some layer.
        RecipeError: a row is named by a token that does not exist.
    """
    base, merge = ctx.pair().base, ctx.recipe.merge
    tokenizer = load_tokenizer(ctx.base)
    factors = {
        slot.component: row_factors(
            merge.embedding if slot.component == "embedding" else merge.lm_head,
            base.pieces[slot.name][0].shape[0],
            tokenizer,
            f"merge.{slot.component}",
            ctx.unlike(),
        )
        for slot in base.slots.values()
        if slot.component in PLAIN
    }
    return Editor(
        recipe=ctx.recipe,
        base=base,
        delta=ctx.store.open(keys[DELTA]),
        edit=open_edit(ctx, keys),
        row_factors=factors,
        device=ctx.torch_device,
        carried=frozenset(base.carried),
    )
