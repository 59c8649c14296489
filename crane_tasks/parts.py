"""What a part of an edit is: T (which of the delta), S (how far), P (what is taken away).

A part is a value that says what it reads, how the card tells it, and how it is opened in a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from crane_tasks.models.files.layout import Site, Slot
from crane_tasks.session import Context
from crane_tasks.stage import Keys, Stage


class OpenThreshold(Protocol):
    """T with its artifacts open."""

    def __call__(
        self, slot: Slot, experts: Sequence[int], first: int, delta: Tensor, sign: int
    ) -> Tensor:
        """T(δ) of rows from `first` on of some tensors of a slot, [n, rows, ...] float32.

        `delta` is δ (`sign` 1) or -δ (-1), of which the result is that of T(δ); it may be
        overwritten.
        """


class OpenGate(Protocol):
    """S with its artifact open."""

    def __call__(self, layer: int | None, component: str) -> float:
        """The factor of a component in a layer, or (None) outside the layers."""

    def of(self, slot: Slot, expert: int) -> float:
        """The factor of one tensor: its component's, unless the gate is finer."""


class OpenProjection(Protocol):
    """P with its artifacts open."""

    def __call__(self, slot: Slot, expert: int, step: Tensor) -> Tensor:
        """P(step): without what the inputs of its tensors say is to be protected."""


class OpenSpectral(OpenProjection, Protocol):
    """P by directions, of which a share is removed."""

    def site(self, slot: Slot, width: int) -> Site | None:
        """The site whose basis protects a tensor with inputs of `width`, or None."""

    def directions(self, slot: Slot, site: Site, expert: int) -> Tensor | None:
        """V float32 [d, r] at a site of an expert (0 if it has none), on the device, or None."""

    def weights(self, sigma: Tensor) -> Tensor:
        """How much of each direction is removed: in the dtype of `sigma` [r]."""


@dataclass(frozen=True)
class Part:
    """T, S or P as a value.

    Attributes:
        stages: whose artifacts it reads.
        fields: the recipe's fields that it reads besides the section `merge`; they enter the key.
        words: how the card tells it.
        version: of its formula; changed, what it was applied in is computed again.
        foretold: whether the forecast's sums say what it makes of an edit.
    """

    stages: tuple[Stage, ...] = ()
    fields: tuple[str, ...] = ()
    words: str = ""
    version: int = 1
    foretold: bool = True

    def check(self, ctx: Context, keys: Keys) -> None:
        """Refuse what is known to be wrong before anything dear."""


class ThresholdPart(Part):
    def open(self, ctx: Context, keys: Keys) -> OpenThreshold:
        """T of a run."""
        raise NotImplementedError


class GatePart(Part):
    def open(self, ctx: Context, keys: Keys) -> OpenGate:
        """S of a run.

        Raises:
            ScoreError: it cannot be had from this run's gradients.
        """
        raise NotImplementedError


class ProjectionPart(Part):
    def open(self, ctx: Context, keys: Keys) -> OpenProjection:
        """P of a run."""
        raise NotImplementedError
