"""The edit as data: what is added to a tensor of the base, in three parts.

    θ = θ_base + P( α · S(c, l) · T(δ) )

Each part is a value (`known_parts.py`, `projections.py`) and may be replaced or left out; a recipe
names the edit (`merge.method`, a file of `crane_tasks/edits`) and may name parts in place of its
own. What an edit is made from follows from its parts: a stage that none of them needs is not
computed, not planned and in no key.
"""

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from crane_tasks.errors import RecipeError
from crane_tasks.known_parts import GATES, THRESHOLDS
from crane_tasks.merge_section import known_methods
from crane_tasks.models.files.layout import Site, Slot
from crane_tasks.parts import (
    GatePart,
    OpenGate,
    OpenProjection,
    OpenThreshold,
    Part,
    ProjectionPart,
    ThresholdPart,
)
from crane_tasks.projections import PROJECTIONS
from crane_tasks.recipe import Recipe
from crane_tasks.session import Context
from crane_tasks.stage import Keys, Stage

ROUTER_SITE = "ffn_input"
LAYERS = re.compile(r"layers (\d+)-(\d*)")


@dataclass(frozen=True)
class Edit:
    """An edit: its formula as people write it, and its parts.

    Attributes:
        title: what the card calls it.
        formula: in ASCII, for the card.
        cite: whose it is: a line for the card.
        spherical: whole tensors go from base to donor on the sphere, by alpha.
        version: of what it does besides its parts.
    """

    title: str
    formula: str
    cite: str
    threshold: ThresholdPart | None = None
    gate: GatePart | None = None
    projection: ProjectionPart | None = None
    spherical: bool = False
    version: int = 1

    @property
    def versions(self) -> list[int]:
        """Of its formula: its own and its parts'."""
        return [self.version, *(part.version for part in self.parts)]

    @property
    def parts(self) -> list[Part]:
        """Those that it has, in the order of the formula."""
        return [p for p in (self.threshold, self.gate, self.projection) if p is not None]

    @property
    def fields(self) -> tuple[str, ...]:
        """The recipe's fields that decide it."""
        return ("alpha", *(name for part in self.parts for name in part.fields), "merge")

    @property
    def foretold(self) -> bool:
        """Whether the change of loss that it should make is predicted: it has a gate."""
        return self.gate is not None and all(part.foretold for part in self.parts)

    @property
    def stages(self) -> dict[str, Stage]:
        """Those that its parts read, by role."""
        return {stage.role: stage for part in self.parts for stage in part.stages}


def edit_named(method: str) -> Edit:
    """The edit of a file of `crane_tasks/edits`."""
    edit: Edit = import_module(f"crane_tasks.edits.{method}").EDIT
    return edit


def edit_of(recipe: Recipe) -> Edit:
    """The edit that a recipe names, with the parts that it has in place of the method's own."""
    merge = recipe.merge
    edit = edit_named(merge.method)
    if merge.threshold is not None:
        edit = replace(edit, threshold=THRESHOLDS[merge.threshold])
    if merge.gate is not None:
        edit = replace(edit, gate=GATES[merge.gate])
    if merge.projection is not None:
        edit = replace(edit, projection=PROJECTIONS[merge.projection])
    return edit


def _every_part() -> list[Part]:
    methods = (edit_named(method).parts for method in known_methods())
    named = (*THRESHOLDS.values(), *GATES.values(), *PROJECTIONS.values())
    return [*(p for parts in methods for p in parts), *(p for p in named if p is not None)]


def edit_stages() -> dict[str, Stage]:
    """The stages that any edit is made from, by role."""
    return {stage.role: stage for part in _every_part() for stage in part.stages}


def edit_fields() -> tuple[str, ...]:
    """The recipe's fields that any edit reads."""
    return tuple(sorted({"alpha", "merge", *(f for part in _every_part() for f in part.fields)}))


def not_of_edit(recipe: Recipe) -> Collection[str]:
    """The roles of those that the recipe's edit does without."""
    return edit_stages().keys() - edit_of(recipe).stages.keys()


@dataclass(frozen=True)
class OpenEdit:
    """A recipe's edit with its artifacts open; may be shared by threads.

    A part that the edit leaves out is None: the whole delta, the factor 1, nothing removed.
    """

    alpha: float
    scales: Mapping[str, float]  # by slot, where it is not 1
    spherical: bool
    router_site: Site | None  # where the router's edit is projected, if it is
    threshold: OpenThreshold | None
    gate: OpenGate | None
    projection: OpenProjection | None

    def factor(self, layer: int | None, component: str) -> float:
        """α · S(c, l)."""
        return self.alpha * (1.0 if self.gate is None else self.gate(layer, component))

    def tensor_factor(self, slot: Slot, expert: int) -> float:
        """α · S of one tensor, with the recipe's further factor."""
        score = 1.0 if self.gate is None else self.gate.of(slot, expert)
        return self.alpha * score * self.scale_of(slot)

    def kept(
        self, slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int = 1
    ) -> Tensor:
        """T(δ) of rows from `first` on; may overwrite `delta`, which is δ times `sign`."""
        if self.threshold is None:
            return delta
        return self.threshold(slot, experts, first, delta, sign)

    def step(
        self, slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int = 1
    ) -> Tensor:
        """P(α S T(δ)) of rows from `first` on of some tensors of a slot, [n, rows, ...] float32.

        `delta` is δ (`sign` 1) or -δ (-1), of which it is the negative edit; it may be
        overwritten. Several experts only if one basis serves them all.
        """
        factors = [self.tensor_factor(slot, expert) for expert in experts]
        if not any(factors):
            return torch.zeros_like(delta)
        step = self.kept(slot, experts, first, delta, sign)
        if len(set(factors)) == 1:
            step.mul_(factors[0])
        else:
            step.mul_(step.new_tensor(factors).view(-1, *[1] * (step.dim() - 1)))
        return self._projected(slot, experts, step)

    def unscaled(
        self, slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int
    ) -> Tensor:
        """P(T(δ)), as `step` without α and S."""
        return self._projected(slot, experts, self.kept(slot, experts, first, delta, sign))

    def _projected(self, slot: Slot, experts: Sequence[int], step: Tensor) -> Tensor:
        if self.projection is None:
            return step
        if slot.component == "router" and self.router_site is not None:
            slot = replace(slot, site=self.router_site)
        return self.projection(slot, experts[0], step)

    def scale_of(self, slot: Slot) -> float:
        """The recipe's further factor of a slot."""
        return self.scales.get(slot.name, 1.0)


def open_edit(ctx: Context, keys: Keys) -> OpenEdit:
    """The recipe's edit over the stages' artifacts.

    Raises:
        ScoreError: the baseline has no positive gain in some layer.
    """
    edit = edit_of(ctx.recipe)
    opened: list[Any] = [
        None if part is None else part.open(ctx, keys)
        for part in (edit.threshold, edit.gate, edit.projection)
    ]
    scales = slot_scales(ctx.recipe.merge.scales, ctx.pair().base.slots.values())
    layout, router = ctx.pair().base.layout, ctx.recipe.merge.router
    sites = {site.name: site for site in layout.sites}
    site = sites.get(ROUTER_SITE) if router.endswith("projected") else None
    return OpenEdit(ctx.recipe.alpha, scales, edit.spherical, site, *opened)


def slot_scales(scales: Mapping[str, float], slots: Iterable[Slot]) -> dict[str, float]:
    """The product of the factors that match each slot; those with none are left out.

    A key is a component, `layers 16-` or `layers 0-7`, or a tensor's name with `*`.

    Raises:
        RecipeError: a key matches nothing.
    """
    found: dict[str, float] = {}
    known = list(slots)
    for key, factor in scales.items():
        matching = [slot.name for slot in known if _matches(key, slot)]
        if not matching:
            components = sorted({slot.component for slot in known})
            raise RecipeError(
                f"merge.scales: '{key}' matches no tensor. Write a component "
                f"({', '.join(components)}), a range as `layers 16-`, or a name with *."
            )
        found |= {name: found.get(name, 1.0) * factor for name in matching}
    return found


def _matches(key: str, slot: Slot) -> bool:
    if layers := LAYERS.fullmatch(key):
        first, last = int(layers[1]), int(layers[2] or sys.maxsize)
        return slot.layer is not None and first <= slot.layer <= last
    return key == slot.component or fnmatchcase(slot.name, key)
