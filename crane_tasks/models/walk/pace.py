"""How far a walk is and how fast it goes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WalkStep:
    """Where a walk is.

    Attributes:
        direction: "forward" or "backward".
        layer, layers: the decoder layer it is in, from 0, and how many there are.
        batch, batches: batches of items that are through this layer, and how many there are.
        done, total: token passes through a layer, those of the way back weighted by their cost.
        rate: tokens of the sets a second at this pace, for the walk as a whole.
        between: whether all batches are through the layer and what it gave is kept.
    """

    direction: str
    layer: int
    layers: int
    batch: int
    batches: int
    done: int
    total: int
    rate: float
    between: bool

    def __str__(self) -> str:
        return f"{self.direction} {self.layer + 1}/{self.layers}, {self.rate:,.0f} tokens/s"


OnStep = Callable[[WalkStep], None]


class Pace:
    """Counts token passes and reports a `WalkStep` after every batch and every layer."""

    def __init__(
        self,
        on_step: OnStep,
        *,
        layers: int,
        tokens: Sequence[int],
        passes: int,
        skipped: int = 0,
    ) -> None:
        """`passes` of all tokens make the walk; `skipped` were made by an earlier one."""
        self._on_step = on_step
        self._layers = layers
        self._tokens = tokens
        self._total = passes * sum(tokens)
        self._done = self._before = skipped * sum(tokens)
        self._passes = passes
        self._start = time.monotonic()
        self._last: WalkStep | None = None

    def batch(self, direction: str, layer: int, index: int, weight: int) -> None:
        """A batch is through a layer; its pass counts as `weight` forward ones."""
        self._done += weight * self._tokens[index]
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._before) / self._passes / seconds
        self._last = WalkStep(
            direction,
            layer,
            self._layers,
            index + 1,
            len(self._tokens),
            self._done,
            self._total,
            rate,
            between=False,
        )
        self._on_step(self._last)

    def layer(self) -> None:
        """All batches are through a layer, and what it gave is kept."""
        if self._last is not None:
            self._on_step(replace(self._last, between=True))
