"""S, the Conservative Taylor Gate: what its sums mean, and when it refuses."""

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_sums import gain_sums
from torch import Tensor

from crane_tasks.numerics.scores import GainSums, NoGain, normalised, pooled, raw_score, refined

steady = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
NUMBERS = st.floats(min_value=-100, max_value=100, width=32)
QUADRUPLES = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=40)


def random_four(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """base, delta, g_R and g_A in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]


def loss(weight: Tensor) -> Tensor:
    """Some smooth function of a weight."""
    return (weight.sin() @ weight.T.cos()).square().mean() + weight.exp().sum()


def test_the_gain_is_minus_the_slope_of_the_loss_along_the_delta() -> None:
    base, delta, other, _ = random_four((3, 5))
    base.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(base), base)
    sums = gain_sums(base.detach(), delta, gradient, other)
    step = 1e-5
    with torch.no_grad():
        slope = float((loss(base + step * delta) - loss(base - step * delta)) / (2 * step))
    assert sums.s_r == pytest.approx(-slope, rel=1e-7)


def test_a_small_step_along_the_delta_lowers_the_loss_by_the_gain() -> None:
    base, delta, other, _ = random_four((4, 4), seed=1)
    base.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(base), base)
    gain = gain_sums(base.detach(), delta, gradient, other).s_r
    with torch.no_grad():
        errors = [
            abs(float(loss(base) - loss(base + step * delta)) - step * gain)
            for step in (1e-3, 1e-4)
        ]
    # What is left is of second order: a tenth of the step leaves a hundredth.
    assert errors[1] < errors[0] / 50


@steady
@given(rows=QUADRUPLES)
def test_p_is_the_positive_part_of_the_smaller_gain_of_each_coordinate(
    rows: list[tuple[float, float, float, float]],
) -> None:
    base, delta, g_r, g_a = torch.tensor(rows, dtype=torch.float64).T
    sums = gain_sums(base, delta, g_r, g_a)
    wanted = math.fsum(max(0.0, min(-r * d, -a * d)) for _, d, r, a in rows)
    assert sums.p == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert sums.s_r == pytest.approx(math.fsum(-r * d for _, d, r, _ in rows), rel=1e-9, abs=1e-9)
    assert sums.s_a == pytest.approx(math.fsum(-a * d for _, d, _, a in rows), rel=1e-9, abs=1e-9)
    assert sums.base2 == pytest.approx(math.fsum(b * b for b, *_ in rows), rel=1e-12)
    assert sums.delta2 == pytest.approx(math.fsum(d * d for _, d, _, _ in rows), rel=1e-12)
    assert sums.numel == len(rows)


@steady
@given(rows=QUADRUPLES)
def test_neither_set_can_raise_the_other_ones_gain(
    rows: list[tuple[float, float, float, float]],
) -> None:
    base, delta, g_r, g_a = torch.tensor(rows, dtype=torch.float64).T
    both = gain_sums(base, delta, g_r, g_a)
    assert both.p == gain_sums(base, delta, g_a, g_r).p
    for alone in (g_r, g_a):
        assert 0 <= both.p <= gain_sums(base, delta, alone, alone).p


def test_what_helps_one_set_and_harms_the_other_gains_nothing() -> None:
    base, delta, gradient, _ = random_four((6, 6), seed=2)
    assert gain_sums(base, delta, gradient, -gradient).p == 0.0


def test_the_gain_grows_with_the_delta_and_not_with_the_base() -> None:
    base, delta, g_r, g_a = random_four((5, 7), seed=3)
    once, twice = gain_sums(base, delta, g_r, g_a), gain_sums(base, 2 * delta, g_r, g_a)
    assert twice.p == pytest.approx(2 * once.p)
    assert raw_score(gain_sums(2 * base, delta, g_r, g_a)) == pytest.approx(raw_score(once) / 2)


def test_sums_of_parts_add_up_to_the_sums_of_the_whole() -> None:
    four = random_four((8, 6), seed=4)
    whole = gain_sums(*four)
    parts = GainSums()
    for first in range(0, 8, 3):
        parts = parts + gain_sums(*(x[first : first + 3] for x in four))
    assert astuple(parts) == pytest.approx(astuple(whole), rel=1e-12)


def test_float32_sums_of_many_coordinates_do_not_drift() -> None:
    # One after the other in float32 they would be off by a percent.
    count = 2**24
    ones = torch.ones(count)
    sums = gain_sums(ones, torch.full((count,), 0.1), -ones, -ones)
    assert sums.p == pytest.approx(count * float(torch.tensor(0.1).double()), rel=1e-6)


def test_the_raw_score_is_the_gain_over_the_norm_of_the_base() -> None:
    assert raw_score(GainSums(p=6.0, base2=9.0)) == 2.0
    assert raw_score(GainSums(p=6.0, base2=0.0)) == 0.0


def test_the_baseline_scores_one_and_the_others_relative_to_it() -> None:
    sums = {
        "ffn": GainSums(p=2.0, base2=4.0),
        "attention": GainSums(p=3.0, base2=1.0),
        "norm": GainSums(p=0.0, base2=5.0),
    }
    assert normalised(sums, "ffn", "layer 0") == {"ffn": 1.0, "attention": 3.0, "norm": 0.0}


@steady
@given(scale=st.floats(min_value=1e-6, max_value=1e6))
def test_the_scale_of_the_loss_cancels(scale: float) -> None:
    four = random_four((4, 4), seed=5)
    other = random_four((4, 4), seed=6)
    plain = {"ffn": gain_sums(*four), "attention": gain_sums(*other)}
    scaled = {
        "ffn": gain_sums(four[0], four[1], scale * four[2], scale * four[3]),
        "attention": gain_sums(other[0], other[1], scale * other[2], scale * other[3]),
    }
    before, after = normalised(plain, "ffn", "here"), normalised(scaled, "ffn", "here")
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize(
    "sums",
    [
        {"attention": GainSums(p=1.0, base2=1.0)},
        {"ffn": GainSums(p=0.0, base2=1.0), "attention": GainSums(p=1.0, base2=1.0)},
        {"ffn": GainSums(p=1.0, base2=0.0)},
        {"ffn": GainSums(p=math.nan, base2=1.0)},
        {"ffn": GainSums(p=math.inf, base2=1.0)},
        {},
    ],
    ids=["absent", "no gain", "zero base", "nan", "infinite", "empty layer"],
)
def test_a_baseline_without_a_positive_gain_is_refused_by_name(sums: dict[str, GainSums]) -> None:
    with pytest.raises(NoGain, match=r"layer 3: baseline 'ffn' has no positive gain") as caught:
        normalised(sums, "ffn", "layer 3")
    assert (caught.value.baseline, caught.value.place) == ("ffn", "layer 3")


def test_a_tiny_gain_is_divided_by_as_it_is_and_not_clamped() -> None:
    sums = {"ffn": GainSums(p=1e-30, base2=1.0), "attention": GainSums(p=3e-30, base2=1.0)}
    assert normalised(sums, "ffn", "layer 0")["attention"] == pytest.approx(3.0)


def test_pooling_adds_component_by_component_and_skips_no_layer() -> None:
    layers = [
        {"ffn": GainSums(p=1.0, base2=2.0, numel=3.0)},
        {"ffn": GainSums(p=4.0, base2=1.0, numel=3.0), "norm": GainSums(p=5.0)},
        {"norm": GainSums(p=7.0)},
    ]
    total = pooled(layers)
    assert total == {"ffn": GainSums(p=5.0, base2=3.0, numel=6.0), "norm": GainSums(p=12.0)}
    # Pooled first, divided after: not the mean of the layers' scores.
    assert raw_score(total["ffn"]) == pytest.approx(5 / math.sqrt(3))


def test_finer_scores_keep_their_proportions_and_the_length_of_the_scored_delta() -> None:
    parts = [gain_sums(*random_four((3, 5), seed)) for seed in range(4)]
    score = 0.7
    found = refined(score, parts)
    ratios = [s / raw_score(part) for s, part in zip(found, parts, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4)
    length = sum(s**2 * part.delta2 for s, part in zip(found, parts, strict=True))
    assert length == pytest.approx(score**2 * sum(part.delta2 for part in parts))
    assert len({round(s, 6) for s in found}) == 4
    assert refined(score, parts[:1]) == pytest.approx([score])


def test_parts_that_do_not_move_leave_the_score_to_those_that_do() -> None:
    moved = gain_sums(*random_four((3, 5)))
    still = GainSums(base2=2.0, numel=4.0)
    assert refined(0.7, [moved, still]) == pytest.approx([0.7, 0.0])
    assert refined(0.0, [still, still]) == [0.0, 0.0]
