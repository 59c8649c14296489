"""How far a long stage is, in lines: for logs, which have no bars."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from flows.wording import duration

PERIOD = 15.0  # seconds between two lines, at least, and before the first
STEP = 10.0  # percent


@dataclass
class _Pass:
    """A stage on its way from nothing to all; some stages go more than once."""

    start: float
    next: float  # the earliest time for a line
    done: int = 0
    percent: float = 0.0  # at the last line


class ProgressLines:
    """Hears progress (as `session.Progress`); says a line for each ten percent, none too soon."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._clock = clock
        self._passes: dict[str, _Pass] = {}

    def __call__(self, stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        if bar:
            return
        now = self._clock()
        known = self._passes.get(stage)
        if known is None or done < known.done:
            known = self._passes[stage] = _Pass(now, now + PERIOD)
        known.done = done
        percent = 100.0 * done / total if total else 100.0
        if now >= known.next and percent >= known.percent + STEP and done < total:
            left = (now - known.start) * (total - done) / done
            self._say(f"{stage}: {percent:.0f} %, {what}, about {duration(left)} left")
            known.next, known.percent = now + PERIOD, percent
