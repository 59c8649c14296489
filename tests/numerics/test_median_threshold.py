"""T, the median magnitude threshold: exact for every size, strict, and doubling."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crane_tasks.numerics.threshold import (
    drop_at_random,
    keep_above,
    keep_agreed,
    median_magnitude,
    stacked_threshold_sums,
    threshold_sums,
    top_magnitude,
)

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


@steady
@given(st.integers(1, 400), st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_largest_share_is_what_a_sort_gives(count: int, density: float, seed: int) -> None:
    delta = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    kept = keep_above(delta, float(top_magnitude(delta, density)), 1.0)
    order = delta.abs().argsort(descending=True)[: round(density * count)]
    assert set(kept.nonzero().flatten().tolist()) == set(order.tolist())
    assert torch.equal(kept[order], delta[order])


def test_what_is_dropped_at_random_keeps_the_mean_and_depends_on_positions_alone() -> None:
    delta = torch.full((200_000,), 0.5)
    whole = drop_at_random(delta, 0.25, seed=7)
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.01)
    parts = [drop_at_random(delta[i : i + 777], 0.25, seed=7, offset=i)
             for i in range(0, delta.numel(), 777)]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(drop_at_random(delta, 0.25, seed=8), whole)
    assert torch.equal(drop_at_random(delta, 1.0, seed=7), delta)


def test_agreed_entries_are_those_along_which_both_losses_fall() -> None:
    delta = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    grad_r = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, -1.0])
    grad_a = torch.tensor([-2.0, 2.0, 3.0, -3.0, -1.0, -1.0])
    assert keep_agreed(delta, grad_r, grad_a).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("width", [1, 2, 7, 4096])
def test_a_stack_has_its_tensors_sums(width: int) -> None:
    """Medians to the bit, also among equal magnitudes; norms but for rounding."""
    generator = torch.Generator().manual_seed(width)
    stack = torch.randn(5, width, generator=generator).bfloat16().float()
    stack[1] = 0.25
    stack[2, ::2] *= -1
    found = stacked_threshold_sums(stack)
    for row, tensor in zip(found.tolist(), stack, strict=True):
        wanted = threshold_sums(tensor)
        assert row[:3] == wanted[:3]
        assert row[3:] == pytest.approx(wanted[3:], rel=1e-5)
