"""The edit as data: what is added to a tensor of the base, in three parts.

    θ = θ_base + P( α · S(c, l) · T(δ) )

Each part is a value of its own and may be replaced or left out; a recipe names the edit
(`merge.method`, a file of `crane_tasks/edits`). What an edit is made from follows from its
parts: a stage that none of them needs is not computed, not planned and in no key.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from artifacts.store import Artifact
from crane_tasks.errors import CraneError
from crane_tasks.models.files.layout import Site, Slot
from crane_tasks.numerics.projector import project, protection
from crane_tasks.numerics.threshold import keep_above
from crane_tasks.projector import PROJECTOR, basis_site, read_basis
from crane_tasks.recipe import Recipe, known_methods
from crane_tasks.scores.reading import Scores
from crane_tasks.scores.stage import SCORES, scores_of
from crane_tasks.session import Context
from crane_tasks.stage import Keys, Stage
from crane_tasks.threshold import THRESHOLD, read_thresholds

# Bases held at a time: those of two layers, as a window may end within one.
KEPT_BASES = 16


class OpenThreshold(Protocol):
    """T with its artifact open."""

    def __call__(self, slot: Slot, experts: Sequence[int], delta: Tensor) -> Tensor:
        """T(δ) of some tensors of a slot, [n, rows, ...] float32; may overwrite `delta`."""


class OpenGate(Protocol):
    """S with its artifact open."""

    def __call__(self, layer: int | None, component: str) -> float:
        """The factor of a component in a layer, or (None) outside the layers."""


class OpenProjection(Protocol):
    """P with its artifact open."""

    def site(self, slot: Slot, width: int) -> Site | None:
        """The site whose basis protects a tensor with inputs of `width`, or None."""

    def directions(self, slot: Slot, site: Site, expert: int) -> Tensor | None:
        """V float32 [d, r] at a site of an expert (0 if it has none), on the device, or None."""

    def weights(self, sigma: Tensor) -> Tensor:
        """How much of each direction is removed: in the dtype of `sigma` [r]."""

    def __call__(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        """P(step): without what lies in protected directions of the tensors' inputs."""


class Part(Protocol):
    """T, S or P as a value."""

    @property
    def stage(self) -> Stage:
        """Whose artifact it reads."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The recipe's fields that it reads; they enter the edit's key."""

    @property
    def words(self) -> str:
        """How the card tells it."""


class ThresholdPart(Part, Protocol):
    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        """T of a run."""


class GatePart(Part, Protocol):
    def open(self, ctx: Context, keys: Keys) -> OpenGate:
        """S of a run.

        Raises:
            ScoreError: it cannot be had from this run's gradients.
        """


class ProjectionPart(Part, Protocol):
    def open(self, ctx: Context, keys: Keys) -> OpenProjection:
        """P of a run."""


@dataclass(frozen=True)
class Edit:
    """An edit: its formula as people write it, and its parts.

    Attributes:
        title: what the card calls it.
        formula: in ASCII, for the card.
        cite: whose it is: a line for the card.
    """

    title: str
    formula: str
    cite: str
    threshold: ThresholdPart | None = None
    gate: GatePart | None = None
    projection: ProjectionPart | None = None

    @property
    def parts(self) -> list[Part]:
        """Those that it has, in the order of the formula."""
        return [p for p in (self.threshold, self.gate, self.projection) if p is not None]

    @property
    def fields(self) -> tuple[str, ...]:
        """The recipe's fields that decide it."""
        return ("alpha", *(name for part in self.parts for name in part.fields), "merge")

    @property
    def stages(self) -> dict[str, Stage]:
        """Those that its parts read, by role."""
        return {part.stage.role: part.stage for part in self.parts}


def edit_named(method: str) -> Edit:
    """The edit of a file of `crane_tasks/edits`."""
    edit: Edit = import_module(f"crane_tasks.edits.{method}").EDIT
    return edit


def edit_of(recipe: Recipe) -> Edit:
    """The edit that a recipe names."""
    return edit_named(recipe.merge.method)


def edit_stages() -> dict[str, Stage]:
    """The stages that any edit is made from, by role."""
    return {r: s for method in known_methods() for r, s in edit_named(method).stages.items()}


def not_of_edit(recipe: Recipe) -> Collection[str]:
    """The roles of those that the recipe's edit does without."""
    return edit_stages().keys() - edit_of(recipe).stages.keys()


@dataclass(frozen=True)
class MedianThreshold:
    """T: the coordinates above their tensor's median magnitude, times 2."""

    stage: Stage = THRESHOLD
    fields: tuple[str, ...] = ()
    words: str = "T keeps the larger half of each tensor's delta, doubled."

    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        return _Medians(ctx.store.open(keys[THRESHOLD]))


class _Medians:
    """The medians of all tensors, read unit by unit."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._units: dict[str, dict[str, float]] = {}
        self._lock = Lock()

    def __call__(self, slot: Slot, experts: Sequence[int], delta: Tensor) -> Tensor:
        with self._lock:
            if slot.unit not in self._units:
                self._units[slot.unit] = read_thresholds(self._artifact, slot.unit)
        medians = [self._units[slot.unit][slot.tensor_name(e)] for e in experts]
        if len(medians) == 1:
            return keep_above(delta, medians[0])
        column = delta.new_tensor(medians).view(-1, *[1] * (delta.dim() - 1))
        return keep_above(delta, column)


@dataclass(frozen=True)
class TaylorGate:
    """S: what reasoning and agent gradients agree on, per component and layer."""

    stage: Stage = SCORES
    fields: tuple[str, ...] = ("gate.baseline",)
    words: str = (
        "S weighs components and layers by what reasoning and agent calibration sets agree on."
    )

    def open(self, ctx: Context, keys: Keys) -> OpenGate:
        scores: Scores = scores_of(ctx, keys)
        return scores.at


@dataclass(frozen=True)
class SigmoidProjection:
    """P_tau: removes w_i = sigmoid(4.6 / tau · (σ_i / σ_1 - tau)) of each format direction."""

    stage: Stage = PROJECTOR
    fields: tuple[str, ...] = ("tau",)
    words: str = "P_tau removes what lies in strong format directions."

    def open(self, ctx: Context, keys: Keys) -> OpenProjection:
        return _Bases(ctx.store.open(keys[PROJECTOR]), ctx.recipe.tau, ctx.torch_device)


class _Bases:
    """Bases on the device, those of a layer kept for its other tensors."""

    def __init__(self, artifact: Artifact, tau: float, device: torch.device) -> None:
        self._artifact, self._tau, self._device = artifact, tau, device
        self._known: dict[tuple[str, str], tuple[Tensor, Tensor] | None] = {}
        self._lock = Lock()

    def site(self, slot: Slot, width: int) -> Site | None:
        return basis_site(self._artifact, slot, width)

    def weights(self, sigma: Tensor) -> Tensor:
        return protection(sigma, self._tau)

    def directions(self, slot: Slot, site: Site, expert: int) -> Tensor | None:
        basis = read_basis(self._artifact, slot, site, expert)
        return None if basis is None else basis[0].to(self._device)

    def __call__(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        with self._lock:
            site = self.site(slot, step.shape[-1])
            basis = self._basis(slot, site, expert) if site else None
        if site is None or basis is None:
            return step
        directions, weight = basis
        if self._device.type == "cuda":  # not to be freed under another stream's hands
            directions.record_stream(torch.cuda.current_stream())
            weight.record_stream(torch.cuda.current_stream())
        if directions.shape[0] != step.shape[-1]:
            raise CraneError(
                f"{slot.tensor_name(expert)} reads {step.shape[-1]} inputs, its projector at "
                f"{site.name} has {directions.shape[0]}"
            )
        return project(step, directions, weight)

    def _basis(self, slot: Slot, site: Site, expert: int) -> tuple[Tensor, Tensor] | None:
        own = expert if site.side == "routed" else 0
        key = (slot.unit, f"{site.name}.{own}")
        if key not in self._known:
            basis = read_basis(self._artifact, slot, site, own)
            if basis is not None:
                weight = self.weights(basis[1]).float()
                basis = basis[0].contiguous().to(self._device), weight.to(self._device)
                if self._device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # other streams will read it
            while len(self._known) > KEPT_BASES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = basis
        return self._known[key]


@dataclass(frozen=True)
class OpenEdit:
    """A recipe's edit with its artifacts open; may be shared by threads.

    A part that the edit leaves out is None: the whole delta, the factor 1, nothing removed.
    """

    alpha: float
    threshold: OpenThreshold | None
    gate: OpenGate | None
    projection: OpenProjection | None

    def factor(self, layer: int | None, component: str) -> float:
        """α · S(c, l)."""
        return self.alpha * (1.0 if self.gate is None else self.gate(layer, component))

    def kept(self, slot: Slot, experts: Sequence[int], delta: Tensor) -> Tensor:
        """T(δ); may overwrite `delta`."""
        return delta if self.threshold is None else self.threshold(slot, experts, delta)

    def step(self, slot: Slot, experts: Sequence[int], delta: Tensor) -> Tensor:
        """P(α S T(δ)) of some tensors of a slot, [n, rows, ...] float32; may overwrite `delta`.

        Linear in the sign: of -δ it is the negative edit. Several experts only if one basis
        serves them all.
        """
        factor = self.factor(slot.layer, slot.component)
        if factor == 0:
            return torch.zeros_like(delta)
        step = self.kept(slot, experts, delta).mul_(factor)
        return step if self.projection is None else self.projection(slot, experts[0], step)


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
    return OpenEdit(ctx.recipe.alpha, *opened)
