"""Slerp, stochastic rounding, and the sums that say what survived of an edit."""

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_sums import edit_sums
from torch import Tensor

from crane_tasks.numerics.edit import EditSums, stacked_edit_sums
from crane_tasks.numerics.hashing import seed_of
from crane_tasks.numerics.rounding import round_stochastic
from crane_tasks.numerics.slerp import SLERP_PARALLEL, slerp

steady = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at_angle(omega: float, size: int = 40) -> tuple[Tensor, Tensor]:
    """Two unit vectors with this angle between them, float64."""
    plane = torch.linalg.qr(normal(size, 2)).Q
    return plane[:, 0], math.cos(omega) * plane[:, 0] + math.sin(omega) * plane[:, 1]


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 values next to a float32, toward zero and away from it."""
    bits = value.view(torch.int32)
    toward = bits & -0x10000
    away = torch.where(bits == toward, toward, toward + 0x10000)
    return tuple(b.view(torch.float32).to(torch.bfloat16) for b in (toward, away))  # type: ignore


# Slerp


@pytest.mark.parametrize("omega", [1e-3, 0.5, math.pi / 2, 3.0])
def test_slerp_starts_at_the_base_and_ends_at_the_donor(omega: float) -> None:
    base, donor = at_angle(omega)
    assert torch.allclose(slerp(base, 3 * donor, 0.0), base, rtol=0, atol=1e-12)
    assert torch.allclose(slerp(base, 3 * donor, 1.0), 3 * donor, rtol=0, atol=1e-12)


@steady
@given(omega=st.floats(0.05, 3.0), t=st.floats(0, 1))
def test_slerp_keeps_the_norm_and_turns_by_its_share_of_the_angle(omega: float, t: float) -> None:
    base, donor = at_angle(omega)
    mixed = slerp(base, donor, t)
    assert float(mixed.norm()) == pytest.approx(1.0, rel=1e-9)
    assert float(base @ mixed) == pytest.approx(math.cos(t * omega), abs=1e-9)


@steady
@given(t=st.floats(0, 1))
def test_nearly_parallel_vectors_are_mixed_linearly(t: float) -> None:
    base, donor = at_angle(math.acos(SLERP_PARALLEL) * 0.99)
    assert torch.allclose(slerp(base, donor, t), base + t * (donor - base), rtol=0, atol=1e-15)


def test_the_linear_branch_begins_above_the_published_cosine() -> None:
    assert SLERP_PARALLEL == 0.9995
    base, donor = at_angle(math.acos(SLERP_PARALLEL) * 1.01)
    middle = slerp(base, donor, 0.5)
    assert float(middle.norm()) == pytest.approx(1.0, rel=1e-12)
    assert float((base + donor).norm() / 2) < 1 - 1e-4


def test_slerp_of_equal_or_zero_tensors_is_finite() -> None:
    base = normal(4, 5)
    assert torch.equal(slerp(base, base, 0.3), base)
    assert torch.equal(slerp(base, torch.zeros_like(base), 0.5), base / 2)
    assert not slerp(torch.zeros_like(base), torch.zeros_like(base), 0.5).any()


def test_slerp_takes_the_tensor_as_one_vector_and_keeps_its_shape_and_dtype() -> None:
    base, donor = normal(3, 4, dtype=torch.float32), normal(3, 4, seed=1, dtype=torch.float32)
    mixed = slerp(base, donor, 0.25)
    assert mixed.shape == (3, 4) and mixed.dtype == torch.float32
    assert torch.equal(mixed.flatten(), slerp(base.flatten(), donor.flatten(), 0.25))


# Stochastic rounding

FINITE = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@steady
@given(values=st.lists(FINITE, min_size=1, max_size=50), seed=st.integers(0, 2**62 - 1))
def test_the_result_is_one_of_the_two_neighbours(values: list[float], seed: int) -> None:
    value = torch.tensor(values, dtype=torch.float32)
    low, high = neighbours(value)
    got = round_stochastic(value, seed=seed)
    assert got.dtype == torch.bfloat16
    assert bool(((got == low) | (got == high)).all())


@steady
@given(values=st.lists(FINITE, min_size=1, max_size=50), seed=st.integers(0, 2**62 - 1))
def test_what_bfloat16_can_hold_is_kept_exactly(values: list[float], seed: int) -> None:
    value = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    got = round_stochastic(value.float(), seed=seed)
    assert torch.equal(got.view(torch.int16), value.view(torch.int16))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [1 / 65536, 0.01, 0.25, 0.5, 0.9])
def test_the_mean_is_unbiased(sign: float, share: float) -> None:
    count = 400_000
    low, step = 1.5, 2.0**-7  # neighbouring bfloat16 values are 1/128 apart here
    value = torch.full((count,), sign * (low + share * step))
    exact = float(value[0].double())
    got = round_stochastic(value, seed=seed_of(0, "model.w"))
    error = float(got.double().mean()) - exact
    deviation = step * math.sqrt(share * (1 - share) / count)
    assert abs(error) < 4.5 * deviation + 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("low", [1.5, 2.0**-14 + 2.0**-24, 3 * 2.0**-24, 0.0, 65472.0])
def test_float16_is_rounded_to_a_neighbour_with_an_unbiased_mean(low: float, sign: float) -> None:
    count, share = 200_000, 0.3
    step = {1.5: 2.0**-10, 65472.0: 32.0}.get(low, 2.0**-24)  # also of those that are subnormal
    value = torch.full((count,), sign * (low + share * step))
    got = round_stochastic(value, seed=seed_of(0, "model.w"), dtype=torch.float16)
    assert got.dtype == torch.float16
    assert set(got.double().abs().unique().tolist()) == {low, low + step}
    deviation = step * math.sqrt(share * (1 - share) / count)
    assert abs(float(got.double().mean()) - float(value[0].double())) < 4.5 * deviation


def test_what_float16_can_hold_is_kept_and_what_it_cannot_is_infinite() -> None:
    held = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    held = held[held.isfinite()]
    got = round_stochastic(held.float(), seed=3, dtype=torch.float16)
    assert torch.equal(got.view(torch.int16), held.view(torch.int16))
    far = torch.tensor([1e5, -1e5])
    assert round_stochastic(far, seed=3, dtype=torch.float16).tolist() == [math.inf, -math.inf]


def test_rounding_errors_of_neighbours_are_uncorrelated() -> None:
    value = torch.full((200_000,), 1.0 + 2.0**-8)  # half way
    up = (round_stochastic(value, seed=7).float() > 1.0).double() - 0.5
    for lag in (1, 2, 64, 4096):
        correlation = float((up[lag:] * up[:-lag]).mean()) / 0.25
        assert abs(correlation) < 0.015


@steady
@given(cut=st.integers(1, 999), seed=st.integers(0, 2**62 - 1))
def test_rounding_in_blocks_is_rounding_at_once(cut: int, seed: int) -> None:
    value = normal(1000, dtype=torch.float32)
    whole = round_stochastic(value, seed=seed)
    head = round_stochastic(value[:cut], seed=seed)
    tail = round_stochastic(value[cut:], seed=seed, offset=cut)
    assert torch.equal(torch.cat([head, tail]), whole)


def test_shape_and_strides_do_not_matter_only_the_position() -> None:
    value = normal(20, 30, dtype=torch.float32)
    flat = round_stochastic(value.flatten(), seed=3)
    assert torch.equal(round_stochastic(value, seed=3).flatten(), flat)
    copied = round_stochastic(value.T.contiguous(), seed=3)
    assert torch.equal(round_stochastic(value.T, seed=3), copied)


def test_seed_and_tensor_name_both_matter_and_nothing_else_does() -> None:
    value = normal(5000, dtype=torch.float32)
    first = round_stochastic(value, seed=seed_of(0, "a.weight"))
    assert torch.equal(first, round_stochastic(value, seed=seed_of(0, "a.weight")))
    assert not torch.equal(first, round_stochastic(value, seed=seed_of(1, "a.weight")))
    assert not torch.equal(first, round_stochastic(value, seed=seed_of(0, "b.weight")))


@steady
@given(seed=st.integers(0, 2**40), name=st.text(max_size=20))
def test_a_seed_leaves_room_for_positions_in_64_bits(seed: int, name: str) -> None:
    assert 0 <= seed_of(seed, name) < 2**62


def splitmix64(counter: int) -> int:
    """The finaliser of splitmix64, in unbounded integers."""
    x = counter & (2**64 - 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)


@steady
@given(seed=st.integers(0, 2**62 - 1), offset=st.integers(0, 2**40))
def test_the_random_bits_are_those_of_splitmix64_at_seed_plus_position(
    seed: int, offset: int
) -> None:
    value = normal(16, dtype=torch.float32)
    wanted = [
        (bits + (splitmix64(seed + offset + i) & 0xFFFF)) & -0x10000
        for i, bits in enumerate(value.view(torch.int32).tolist())
    ]
    got = round_stochastic(value, seed=seed, offset=offset)
    assert got.float().view(torch.int32).tolist() == wanted


def test_a_stochastic_edit_survives_in_the_mean_where_the_nearest_erases_it() -> None:
    base = torch.ones(100_000)
    edit = 2.0**-11  # a sixteenth of the distance to the next bfloat16
    nearest = (base + edit).to(torch.bfloat16)
    assert torch.equal(nearest, base.to(torch.bfloat16))
    moved = round_stochastic(base + edit, seed=0).double().mean() - 1.0
    assert float(moved) == pytest.approx(edit, rel=0.1)


# What survives


def sums_of(base: Tensor, intended: Tensor, stored: Tensor) -> EditSums:
    return edit_sums(base, intended, stored, intended)


def test_an_edit_that_is_stored_exactly_survives_whole() -> None:
    base, edit = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0.5, 0.0, -1.0])
    sums = sums_of(base, edit, (base + edit).to(torch.bfloat16))
    assert sums.survived == 1.0
    assert sums.cosine == pytest.approx(1.0, abs=1e-15)
    assert (sums.changed, sums.numel) == (2.0, 3.0)
    assert sums.base2 == 21.0 and sums.intended2 == 1.25


def test_an_edit_that_rounding_erased_survives_not_at_all() -> None:
    base = torch.ones(4, dtype=torch.bfloat16)
    sums = sums_of(base, torch.full((4,), 1e-4), base)
    assert (sums.survived, sums.cosine, sums.changed) == (0.0, 0.0, 0.0)


def test_no_edit_intended_and_none_made_is_all_that_was_wanted() -> None:
    base = torch.ones(4, dtype=torch.bfloat16)
    sums = sums_of(base, torch.zeros(4), base)
    assert (sums.survived, sums.cosine) == (1.0, 1.0)
    assert (EditSums().survived, EditSums().cosine) == (1.0, 1.0)


def test_survived_and_cosine_are_the_norm_ratio_and_the_cosine_of_the_edits() -> None:
    base = normal(200, seed=1, dtype=torch.float32).to(torch.bfloat16)
    edit = 0.01 * normal(200, seed=2, dtype=torch.float32)
    stored = (base.float() + edit).to(torch.bfloat16)
    realised = stored.double() - base.double()
    sums = sums_of(base, edit, stored)
    wide = edit.double()
    assert sums.survived == pytest.approx(float(realised.norm() / wide.norm()), rel=1e-6)
    cosine = float(realised @ wide / realised.norm() / wide.norm())
    assert sums.cosine == pytest.approx(cosine, rel=1e-6)
    assert sums.changed == int((realised != 0).sum())


def test_the_sums_of_blocks_add_up_to_those_of_the_whole() -> None:
    base = normal(300, seed=3, dtype=torch.float32).to(torch.bfloat16)
    edit, delta = (0.01 * normal(300, seed=s, dtype=torch.float32) for s in (4, 5))
    stored = (base.float() + edit).to(torch.bfloat16)
    whole = edit_sums(base, edit, stored, delta)
    total = EditSums()
    for part in zip(*(x.split(77) for x in (base, edit, stored, delta)), strict=True):
        total = total + edit_sums(*part)
    assert astuple(total) == pytest.approx(astuple(whole), rel=1e-6)  # float32 within a block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sums_leave_their_inputs_alone(dtype: torch.dtype) -> None:
    base, stored = (normal(40, seed=s, dtype=dtype)[None] for s in (1, 2))
    edit = normal(40, seed=3, dtype=torch.float32)[None]
    before = [x.clone() for x in (base, edit, stored)]
    stacked_edit_sums(base, edit, stored)
    assert all(torch.equal(x, y) for x, y in zip((base, edit, stored), before, strict=True))
