"""How sure a mean over rows is: intervals at 95 %, and whether two models differ.

Wilson's interval for a share (Wilson 1927), the percentile bootstrap over rows for other means
(Efron 1979), and McNemar's exact test for two models' right answers to the same rows.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Z = 1.959963984540054  # of the normal distribution, at 97.5 %
TAIL = 2.5  # per cent, on either side
DRAWS = 2000
BLOCK = 100  # draws whose numbers are in memory at once
SEED = 0


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The interval of a share of `count` rows; of no rows all shares are possible."""
    if not count:
        return 0.0, 1.0
    share, weight = hits / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    # Rounding must not leave a share outside of its own interval.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """The interval of a mean over rows; NaN of none, or where a value is NaN.

    The draws depend on the number of rows alone, so that models that were asked the same rows
    are compared on the same draws.
    """
    rows = np.asarray(values, dtype=np.float64)
    if not rows.size or not np.isfinite(rows).all():
        return math.nan, math.nan
    draws = _draws(rows.size)
    blocks = (draws[first : first + BLOCK] for first in range(0, DRAWS, BLOCK))
    means = np.concatenate([block.astype(np.float64) @ rows for block in blocks]) / rows.size
    low, high = np.percentile(means, [TAIL, 100 - TAIL])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """How often each of the rows is in each draw: [DRAWS, count]. More than 255 times is none, of
    any number of rows that there can be."""
    numbers, shares = np.random.default_rng(SEED), np.full(count, 1 / count)
    blocks = range(0, DRAWS, BLOCK)
    return np.concatenate(
        [numbers.multinomial(count, shares, size=BLOCK).astype(np.uint8) for _ in blocks]
    )


def mcnemar(lost: int, gained: int) -> float:
    """The chance that of so many rows, in which one of two models alone is right, as few or
    fewer are either's, if both are as good: two-sided, exact."""
    count, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(count, n) for n in range(few + 1))
    return min(1.0, float(2 * tail / 2**count))
