"""Intervals of shares and means, and the comparison of two models on the same rows."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crane_tasks.numerics.intervals import bootstrap_mean, mcnemar, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Published: Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(
    hits: int, count: int, low: float, high: float
) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 400), st.integers(0, 400))
def test_a_share_lies_in_its_interval(hits: int, misses: int) -> None:
    low, high = wilson(hits, hits + misses)
    share = hits / (hits + misses) if hits + misses else 0.0
    assert 0.0 <= low <= share <= high <= 1.0


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    # By hand: 2 * sum of C(n, i) / 2^n up to the smaller count.
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (3, 3, 1.0), (9, 1, 22 / 1024)],
)
def test_mcnemars_exact_test(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_the_bootstrap_is_near_the_normal_interval_and_covers() -> None:
    numbers, inside = random.Random(1), 0
    for _ in range(200):
        rows = [numbers.gauss(3.0, 2.0) for _ in range(60)]
        low, high = bootstrap_mean(rows)
        inside += low <= 3.0 <= high
    assert 0.88 <= inside / 200 <= 0.99
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(60), rel=0.35)


def test_the_bootstrap_is_the_same_each_time_and_knows_what_is_unknown() -> None:
    assert bootstrap_mean([1.0, 2.0, 5.0]) == bootstrap_mean([1.0, 2.0, 5.0])
    assert bootstrap_mean([2.0] * 7) == (2.0, 2.0)
    assert all(map(math.isnan, (*bootstrap_mean([]), *bootstrap_mean([1.0, math.nan]))))
