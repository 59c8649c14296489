"""P by the names that a recipe has for it: what is taken from an edit, by a weight's inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from artifacts.store import Artifact
from crane_tasks.errors import CraneError
from crane_tasks.magnitudes import MAGNITUDES
from crane_tasks.models.files.layout import Site, Slot
from crane_tasks.moments import AGENT_MOMENTS, REASONING_MOMENTS
from crane_tasks.numerics.projector import (
    hard_protection,
    project,
    protection,
    ridge_protection,
)
from crane_tasks.numerics.regression import plain_share, regression, relaxed
from crane_tasks.parts import OpenProjection, ProjectionPart
from crane_tasks.projector import PROJECTOR, basis_site, read_basis
from crane_tasks.session import Context
from crane_tasks.site_walk import read_mean
from crane_tasks.stage import Keys

# Sites whose tensors are held at a time: those of two layers, as a window may end within one.
KEPT_SITES = 16
Place = tuple[str, str, int]  # unit, site, expert (0 if it has none)
Tensors = tuple[Tensor, ...]


class _OnDevice:
    """What belongs to a site, on the device, for all tensors that read it; for many threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Place, Tensors | None] = {}  # last used, last
        self._lock = Lock()

    def get(self, place: Place, make: Callable[[], Tensors | None]) -> Tensors | None:
        """What is known of a place, or is now made of it."""
        with self._lock:
            found = self._known.pop(place) if place in self._known else self._moved(make())
            self._known[place] = found
            while len(self._known) > KEPT_SITES:
                self._known.pop(next(iter(self._known)))
        if found is not None and self._device.type == "cuda":
            for tensor in found:  # not to be freed under another stream's hands
                tensor.record_stream(torch.cuda.current_stream())
        return found

    def _moved(self, made: Tensors | None) -> Tensors | None:
        if made is None:
            return None
        moved = tuple(tensor.contiguous().to(self._device) for tensor in made)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # other streams will read it
        return moved


def _place(slot: Slot, site: Site, expert: int) -> Place:
    return slot.unit, site.name, expert if site.side == "routed" else 0


def _require_width(slot: Slot, expert: int, step: Tensor, site: Site, width: int) -> None:
    if width != step.shape[-1]:
        raise CraneError(
            f"{slot.tensor_name(expert)} reads {step.shape[-1]} inputs, its projector at "
            f"{site.name} has {width}"
        )


@dataclass(frozen=True)
class SpectralProjection(ProjectionPart):
    """P: removes the share w_i of each format direction; w a function of sigma and tau."""

    rule: Callable[[Tensor, float], Tensor] = protection

    def open(self, ctx: Context, keys: Keys) -> OpenProjection:
        artifact = ctx.store.open(keys[PROJECTOR])
        return _Bases(artifact, partial(_ruled, self.rule, ctx.recipe.tau), ctx.torch_device)


def _ruled(rule: Callable[[Tensor, float], Tensor], tau: float, sigma: Tensor) -> Tensor:
    return rule(sigma, tau)


class _Bases:
    """Bases on the device, those of a layer kept for its other tensors."""

    def __init__(
        self, artifact: Artifact, rule: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self._artifact, self.weights, self._device = artifact, rule, device
        self._kept = _OnDevice(device)

    def site(self, slot: Slot, width: int) -> Site | None:
        return basis_site(self._artifact, slot, width)

    def directions(self, slot: Slot, site: Site, expert: int) -> Tensor | None:
        basis = read_basis(self._artifact, slot, site, expert)
        return None if basis is None else basis[0].to(self._device)

    def __call__(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        site = self.site(slot, step.shape[-1])
        if site is None:
            return step
        place = _place(slot, site, expert)
        basis = self._kept.get(place, lambda: self._basis(slot, site, place[2]))
        if basis is None:
            return step
        directions, weight = basis
        _require_width(slot, expert, step, site, directions.shape[0])
        return project(step, directions, weight)

    def _basis(self, slot: Slot, site: Site, own: int) -> Tensors | None:
        basis = read_basis(self._artifact, slot, site, own)
        return None if basis is None else (basis[0], self.weights(basis[1]).float())


class RegressionProjection(ProjectionPart):
    """P: what the reasoning set's outputs need of the edit and the agent set's can bear."""

    def open(self, ctx: Context, keys: Keys) -> OpenProjection:
        artifacts = [ctx.store.open(keys[s]) for s in (REASONING_MOMENTS, AGENT_MOMENTS)]
        return _Regressions(artifacts, ctx.recipe.merge.protect, ctx.torch_device)


class _Regressions:
    """M of every site, solved for where its first tensor is edited."""

    def __init__(self, artifacts: list[Artifact], protect: float, device: torch.device) -> None:
        self._artifacts, self._protect, self._device = artifacts, protect, device
        self._kept = _OnDevice(device)

    def __call__(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        site, found = slot.site, None
        if site is not None:
            place = _place(slot, site, expert)
            found = self._kept.get(place, lambda: self._solved(slot, site, place[2]))
        if site is None or found is None:
            return step * plain_share(self._protect)
        _require_width(slot, expert, step, site, found[0].shape[0])
        return step @ found[0]

    def _solved(self, slot: Slot, site: Site, own: int) -> Tensors | None:
        both = [read_mean(artifact, slot.unit, site, own) for artifact in self._artifacts]
        known = [c.to(self._device) for c in both if c is not None]
        if not known:
            return None
        r, a = (torch.zeros_like(known[0]) if c is None else c.to(self._device) for c in both)
        matrix = regression(r, a, self._protect)
        return None if matrix is None else (matrix.float(),)


class ActivationProjection(ProjectionPart):
    """P of AIM: the less of the edit, the stronger an input channel is at format tokens."""

    def open(self, ctx: Context, keys: Keys) -> OpenProjection:
        artifact, omega = ctx.store.open(keys[MAGNITUDES]), ctx.recipe.merge.omega
        kept = _OnDevice(ctx.torch_device)

        def relax(slot: Slot, expert: int, step: Tensor) -> Tensor:
            if (site := slot.site) is None:
                return step
            unit, _, own = place = _place(slot, site, expert)

            def read() -> Tensors | None:
                mean = read_mean(artifact, unit, site, own)
                return None if mean is None else (mean,)

            found = kept.get(place, read)
            if found is None:
                return step
            _require_width(slot, expert, step, site, found[0].shape[0])
            return relaxed(step, found[0], omega)

        return relax


SIGMOID = SpectralProjection(
    stages=(PROJECTOR,),
    fields=("tau",),
    words="P_tau removes what lies in strong format directions.",
)
REGRESSION = RegressionProjection(
    stages=(REASONING_MOMENTS, AGENT_MOMENTS),
    words="P keeps what a regression gives that is to be the donor on the reasoning set's inputs "
    "and the base on the agent set's.",
    foretold=False,
)
AIM = ActivationProjection(
    stages=(MAGNITUDES,),
    words="P shrinks the edit where inputs at format tokens are strong.",
    foretold=False,
)
PROJECTIONS: dict[str, ProjectionPart | None] = {
    "sigmoid": SIGMOID,
    "hard": replace(SIGMOID, rule=hard_protection, words="P removes all that lies in format "
                    "directions whose strength is tau of the strongest, or more."),
    "ridge": replace(SIGMOID, rule=ridge_protection, words="P removes what a ridge regression on "
                     "the format activations would change."),
    "regression": REGRESSION,
    "aim": AIM,
    "none": None,
}  # fmt: skip
