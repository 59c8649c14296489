"""T, the median magnitude threshold: exact for every size, strict, and doubling."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crane_tasks.numerics.threshold import keep_above, median_magnitude

steady = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
FLOATS = st.floats(min_value=-1e6, max_value=1e6, width=32)
# Few distinct magnitudes, so that ties are the rule.
TIES = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])
DELTAS = st.lists(FLOATS, min_size=1, max_size=60) | st.lists(TIES, min_size=1, max_size=60)


def transformed(delta: Tensor) -> Tensor:
    """T(δ)."""
    return keep_above(delta, median_magnitude(delta))


@steady
@given(values=DELTAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_median_is_the_half_nth_smallest_magnitude(
    values: list[float], dtype: torch.dtype
) -> None:
    ordered = sorted(abs(v) for v in values)
    wanted = ordered[max(1, len(values) // 2) - 1]
    assert float(median_magnitude(torch.tensor(values, dtype=dtype))) == wanted


@steady
@given(values=DELTAS)
def test_float32_and_float64_agree_on_the_median_and_on_what_is_kept(values: list[float]) -> None:
    # They are found by different algorithms.
    narrow = torch.tensor(values, dtype=torch.float32)
    wide = narrow.double()
    assert float(median_magnitude(narrow)) == float(median_magnitude(wide))
    assert torch.equal(transformed(narrow).double(), transformed(wide))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 99, 100, 101, 10_001])
def test_half_of_unlike_magnitudes_is_kept(count: int) -> None:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    delta = (order + 1).float() * (-1.0) ** order
    assert int((transformed(delta) != 0).sum()) == count - max(1, count // 2)


@steady
@given(values=DELTAS)
def test_what_is_kept_is_doubled_and_the_rest_is_zero(values: list[float]) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    median = median_magnitude(delta)
    for before, after in zip(delta.tolist(), transformed(delta).tolist(), strict=True):
        assert after == (2 * before if abs(before) > float(median) else 0.0)


@steady
@given(values=DELTAS)
def test_never_more_than_half_is_kept_beyond_the_odd_one(values: list[float]) -> None:
    kept = int((transformed(torch.tensor(values, dtype=torch.float32)) != 0).sum())
    assert kept <= (len(values) + 1) // 2 or len(values) == 1


@pytest.mark.parametrize("value", [0.25, -3.0, 0.0])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_a_constant_delta_is_dropped_because_only_strictly_greater_is_kept(
    value: float, count: int
) -> None:
    assert not transformed(torch.full((count,), value)).any()


def test_a_tie_at_the_median_is_dropped_whole() -> None:
    delta = torch.tensor([1.0, -2.0, 2.0, 2.0, -3.0, 4.0])
    assert float(median_magnitude(delta)) == 2.0
    assert transformed(delta).tolist() == [0.0, 0.0, 0.0, 0.0, -6.0, 8.0]


def test_it_differs_from_torch_median_for_odd_sizes_and_not_for_even_ones() -> None:
    odd, even = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert float(median_magnitude(odd)) == 1.0
    assert float(odd.abs().median()) == 2.0
    assert float(median_magnitude(even)) == float(even.abs().median()) == 2.0


def test_shape_dtype_and_the_delta_itself_are_left_alone() -> None:
    delta = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    before = delta.clone()
    after = transformed(delta)
    assert torch.equal(delta, before)
    assert after.shape == delta.shape and after.dtype == delta.dtype
    assert median_magnitude(delta).shape == ()


def test_layout_in_memory_does_not_matter() -> None:
    delta = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    assert float(median_magnitude(delta.T)) == float(median_magnitude(delta))
    assert torch.equal(transformed(delta.T), transformed(delta).T)


def test_the_smallest_magnitudes_of_float32_are_told_apart() -> None:
    delta = torch.tensor([1e-45, 3e-45, -4e-45, 1e-38])
    assert float(median_magnitude(delta)) == float(delta[1])
    assert transformed(delta).tolist() == [0.0, 0.0, 2 * float(delta[2]), 2 * float(delta[3])]


def test_the_norm_is_not_kept() -> None:
    # The official code's comment claims that T keeps the L1 norm; for a Gaussian delta
    # it is 1.59 times as large.
    delta = torch.randn(200_000, generator=torch.Generator().manual_seed(2))
    ratio = float(transformed(delta).abs().sum() / delta.abs().sum())
    assert ratio == pytest.approx(1.59, abs=0.01)
