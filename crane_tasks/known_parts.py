"""T and S by the names that a recipe has for them. (P: `projections.py`.)"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from threading import Lock

import torch
from torch import Tensor

from artifacts.store import Artifact
from crane_tasks.errors import RecipeError
from crane_tasks.models.files.layout import Slot
from crane_tasks.numerics.hashing import seed_of
from crane_tasks.numerics.threshold import drop_at_random, keep_above, keep_agreed
from crane_tasks.parts import (
    GatePart,
    OpenGate,
    OpenThreshold,
    ThresholdPart,
)
from crane_tasks.scores.gradients import GRADIENTS, SETS, read_gradient
from crane_tasks.scores.reading import Scores
from crane_tasks.scores.stage import SCORES, check_baseline, scores_of, tensor_scores
from crane_tasks.session import Context
from crane_tasks.stage import Keys
from crane_tasks.threshold import THRESHOLD, density_scale, read_thresholds

KEPT_GRADIENTS = 16  # tensors, of both sets


class MedianThreshold(ThresholdPart):
    """T: the coordinates above their tensor's median magnitude, times 2.

    With `merge.density` d, the share d that is largest, times 1 / d.
    """

    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        scale = density_scale(ctx.recipe.merge.density)
        return _Magnitudes(ctx.store.open(keys[THRESHOLD]), scale)


class TopThreshold(ThresholdPart):
    """T of TIES: the same coordinates as they are. With one donor its election has one voter."""

    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        return _Magnitudes(ctx.store.open(keys[THRESHOLD]), 1.0)


class _Magnitudes:
    """The magnitudes m of all tensors, read unit by unit."""

    def __init__(self, artifact: Artifact, scale: float) -> None:
        self._artifact, self._scale = artifact, scale
        self._units: dict[str, dict[str, float]] = {}
        self._lock = Lock()

    def __call__(
        self, slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int
    ) -> Tensor:
        with self._lock:
            if slot.unit not in self._units:
                self._units[slot.unit] = read_thresholds(self._artifact, slot.unit)
        found = [self._units[slot.unit][slot.tensor_name(e)] for e in experts]
        if len(found) == 1:
            return keep_above(delta, found[0], self._scale)
        column = delta.new_tensor(found).view(-1, *[1] * (delta.dim() - 1))
        return keep_above(delta, column, self._scale)


class RandomThreshold(ThresholdPart):
    """T of DARE: each coordinate with probability `merge.density`, times 1 / density."""

    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        merge = ctx.recipe.merge
        density = 0.5 if merge.density is None else merge.density

        def drop(
            slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int
        ) -> Tensor:
            offset = first * math.prod(delta.shape[2:])
            rows = [
                drop_at_random(
                    one, density, seed=seed_of(merge.seed, slot.tensor_name(e)), offset=offset
                )
                for e, one in zip(experts, delta, strict=True)
            ]
            return torch.stack(rows)

        return drop


class AgreedThreshold(ThresholdPart):
    """T coordinate by coordinate: those along which both sets' losses fall, from kept gradients."""

    def check(self, ctx: Context, keys: Keys) -> None:
        store = ctx.store
        lost = store.has(keys[SCORES]) and not store.has(keys[GRADIENTS])
        if not ctx.recipe.gate.store_gradients or lost:
            raise RecipeError(
                "merge.threshold: agreed reads the kept gradients, and "
                + (
                    f"{store.path(keys[SCORES])} was scored without keeping them; remove that "
                    "folder, and they are taken anew"
                    if lost
                    else "gate.store_gradients is false"
                )
            )

    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        return _Agreed(ctx.store.open(keys[GRADIENTS]))


class _Agreed:
    """Kept gradients, those of the tensors in use at hand: blocks of one come in a row."""

    def __init__(self, artifact: Artifact) -> None:
        self._read = lru_cache(maxsize=KEPT_GRADIENTS)(partial(_gradients, artifact))
        self._lock = Lock()

    def __call__(
        self, slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int
    ) -> Tensor:
        rows = slice(first, first + delta.shape[1])
        with self._lock:
            pairs = [self._read(slot, e if slot.stacked else None) for e in experts]
        both = [
            torch.stack([_shaped(pair[k], delta)[rows] for pair in pairs]).to(delta.device)
            for k in range(len(SETS))
        ]
        return keep_agreed(delta, sign * both[0].float(), sign * both[1].float())


def _gradients(artifact: Artifact, slot: Slot, expert: int | None) -> tuple[Tensor, ...]:
    return tuple(read_gradient(artifact, name, slot, expert) for name in SETS)


def _shaped(gradient: Tensor, like: Tensor) -> Tensor:
    """A tensor's gradient with rows of the form that `like` [n, rows, ...] has."""
    return gradient.reshape(-1, *like.shape[2:])


class TaylorGate(GatePart):
    """S: what reasoning and agent gradients agree on, per component and layer."""

    def check(self, ctx: Context, keys: Keys) -> None:
        check_baseline(ctx, keys)

    def open(self, ctx: Context, keys: Keys) -> OpenGate:
        own = {} if ctx.recipe.gate.per == "component" else tensor_scores(ctx, keys)
        return _Taylor(scores_of(ctx, keys), own)


@dataclass(frozen=True)
class _Taylor:
    """S per component and layer, and by a tensor's name where it has one of its own."""

    scores: Scores
    own: Mapping[str, float]

    def __call__(self, layer: int | None, component: str) -> float:
        return self.scores.at(layer, component)

    def of(self, slot: Slot, expert: int) -> float:
        score = self.own.get(slot.tensor_name(expert)) if self.own else None
        return self(slot.layer, slot.component) if score is None else score


MEDIAN = MedianThreshold(
    stages=(THRESHOLD,), words="T keeps the larger half of each tensor's delta, doubled."
)
TOP = TopThreshold(stages=(THRESHOLD,), words="T keeps the largest entries of each tensor's delta.")
DROP = RandomThreshold(words="T drops entries of the delta at random and scales up the others.")
AGREED = AgreedThreshold(
    stages=(SCORES, GRADIENTS),
    words="T keeps the entries along which both calibration losses fall.",
)
TAYLOR = TaylorGate(
    stages=(SCORES,),
    fields=("gate.baseline", "gate.unify", "gate.per"),
    words="S weighs components and layers by what reasoning and agent calibration sets agree on.",
)
THRESHOLDS: dict[str, ThresholdPart | None] = {
    "median": MEDIAN, "top": TOP, "drop": DROP, "agreed": AGREED, "none": None,
}  # fmt: skip
GATES: dict[str, GatePart | None] = {"taylor": TAYLOR, "flat": None}
