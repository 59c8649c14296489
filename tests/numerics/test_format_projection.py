"""P_τ, the Graduated Sigmoidal Projection: its basis, its weights, and what it removes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crane_tasks.numerics.projector import (
    STEEPNESS,
    Basis,
    basis_from_gram,
    gram,
    hard_protection,
    project,
    protection,
    ridge_protection,
)

steady = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns, float64."""
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q


@st.composite
def decaying_features(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """H [n, d] with known right singular vectors [d, r] and values [r], well apart."""
    d = draw(st.integers(2, 24))
    n = draw(st.integers(d, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Neighbours at least 3 % apart, the weakest well above the cutoff.
    decay = draw(st.floats(0.70, 0.97))
    sigma = draw(st.floats(1e-3, 1e3)) * decay ** torch.arange(d, dtype=torch.float64)
    left, right = orthonormal(n, d, generator), orthonormal(d, d, generator)
    return left * sigma @ right.T, right, sigma


def basis_of(rows: Tensor, *, rank: int = 256, cutoff: float = 1e-5) -> Basis:
    return basis_from_gram(gram(rows), rows.shape[0], rank=rank, cutoff=cutoff)


@steady
@given(features=decaying_features())
def test_the_gram_basis_has_the_singular_values_of_the_exact_svd(
    features: tuple[Tensor, Tensor, Tensor],
) -> None:
    rows, _, sigma = features
    exact = torch.linalg.svdvals(rows)
    found = basis_of(rows)
    assert found.sigma.numel() == sigma.numel()
    assert float((found.sigma - exact).abs().max()) < 1e-8 * float(sigma[0])
    assert torch.equal(found.sigma, found.sigma.sort(descending=True).values)


@steady
@given(features=decaying_features(), data=st.data())
def test_the_gram_basis_spans_the_strongest_directions_of_the_exact_svd(
    features: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    rows, right, sigma = features
    rank = data.draw(st.integers(1, sigma.numel()))
    found = basis_of(rows, rank=rank).directions.double()
    exact = torch.linalg.svd(rows, full_matrices=False).Vh[:rank].T
    projector = found @ found.T
    # Directions are stored in float32.
    assert float((projector - exact @ exact.T).norm()) < 1e-5
    assert float((projector - right[:, :rank] @ right[:, :rank].T).norm()) < 1e-5


def test_in_float64_the_span_agrees_to_eight_digits() -> None:
    generator = torch.Generator().manual_seed(3)
    d = 20
    sigma = 0.8 ** torch.arange(d, dtype=torch.float64)
    rows = orthonormal(50, d, generator) * sigma @ orthonormal(d, d, generator).T
    total = gram(rows)
    assert total.dtype == torch.float64
    # The same decomposition that `basis_from_gram` makes, before it narrows V to float32.
    _, vectors = torch.linalg.eigh(total)
    for rank in (1, 5, 12):
        ours = vectors.flip(1)[:, :rank]
        exact = torch.linalg.svd(rows, full_matrices=False).Vh[:rank].T
        assert float((ours @ ours.T - exact @ exact.T).norm()) < 1e-8
    narrow = basis_of(rows).directions
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, vectors.flip(1).float())


@steady
@given(features=decaying_features())
def test_directions_are_orthonormal(features: tuple[Tensor, Tensor, Tensor]) -> None:
    found = basis_of(features[0]).directions.double()
    assert float((found.T @ found - torch.eye(found.shape[1])).abs().max()) < 1e-6


def test_gram_matrices_add_up_over_blocks_of_rows_in_float64() -> None:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    total = sum((gram(part) for part in rows.split(7)), torch.zeros(8, 8).double())
    assert total.dtype == torch.float64
    assert float((total - rows.double().T @ rows.double()).abs().max()) < 1e-12


def test_no_more_directions_than_the_rank_the_rows_or_the_cutoff_allow() -> None:
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([1.0, 0.5, 0.1, 1e-3, 1e-7], dtype=torch.float64)
    rows = orthonormal(9, 5, generator) * sigma @ orthonormal(5, 5, generator).T
    assert basis_of(rows).sigma.numel() == 4
    assert basis_of(rows, rank=2).sigma.numel() == 2
    assert basis_of(rows, cutoff=0.2).sigma.numel() == 2
    assert basis_of(rows, cutoff=0.5).sigma.numel() in (1, 2)
    assert basis_of(rows[:3]).sigma.numel() == 3
    assert basis_of(rows[:1]).sigma.numel() == 1
    assert basis_of(rows).rows == 9


def test_rows_that_are_absent_or_zero_give_an_empty_basis() -> None:
    for rows in (torch.zeros(0, 6), torch.zeros(4, 6)):
        found = basis_of(rows)
        assert found.directions.shape == (6, 0)
        assert found.sigma.shape == (0,)
        assert found.rows == rows.shape[0]


def test_the_basis_is_deterministic() -> None:
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(4))
    first, second = basis_of(rows), basis_of(rows)
    assert torch.equal(first.directions, second.directions)
    assert torch.equal(first.sigma, second.sigma)


SIGMA = st.lists(st.floats(min_value=1e-6, max_value=1.0), min_size=1, max_size=30).map(
    lambda v: torch.tensor(sorted(v, reverse=True), dtype=torch.float64)
)
TAU = st.floats(min_value=1e-3, max_value=1.0)


@steady
@given(sigma=SIGMA, tau=TAU)
def test_protection_is_the_sigmoid_of_the_relative_strength(sigma: Tensor, tau: float) -> None:
    for s, w in zip(sigma.tolist(), protection(sigma, tau).tolist(), strict=True):
        wanted = 1 / (1 + math.exp(-4.6 / tau * (s / float(sigma[0]) - tau)))
        assert w == pytest.approx(wanted, rel=1e-12)


@steady
@given(tau=st.floats(min_value=1e-3, max_value=1.0), scale=st.floats(1e-3, 1e3))
def test_protection_is_one_half_at_tau_whatever_the_scale(tau: float, scale: float) -> None:
    sigma = scale * torch.tensor([1.0, tau], dtype=torch.float64)
    assert float(protection(sigma, tau)[1]) == pytest.approx(0.5, abs=1e-9)


@steady
@given(tau=TAU)
def test_the_weakest_direction_keeps_a_floor_of_one_percent(tau: float) -> None:
    weakest = float(protection(torch.tensor([1.0, 0.0], dtype=torch.float64), tau)[1])
    assert weakest == pytest.approx(1 / (1 + math.exp(STEEPNESS)))
    assert weakest == pytest.approx(0.01, abs=1e-4)


@steady
@given(sigma=SIGMA, tau=TAU)
def test_stronger_directions_are_protected_more(sigma: Tensor, tau: float) -> None:
    weight = protection(sigma, tau)
    assert bool((weight[:-1] >= weight[1:]).all())
    assert bool((weight > 0).all()) and bool((weight <= 1).all())


@pytest.mark.parametrize("tau", [0.0, -0.03, math.nan])
def test_a_tau_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        protection(torch.ones(2), tau)


@pytest.fixture
def update() -> Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def directions() -> Tensor:
    return orthonormal(12, 4, torch.Generator().manual_seed(6))


def test_full_protection_leaves_nothing_in_the_protected_directions(
    update: Tensor, directions: Tensor
) -> None:
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.2], dtype=torch.float64)
    weight = protection(sigma, 1e-6)
    left = project(update, directions, weight)
    assert float((left @ directions).abs().max()) < 1e-12
    # And nothing is taken from the others.
    others = torch.eye(12).double() - directions @ directions.T
    assert float((left @ others - update @ others).abs().max()) < 1e-12


def test_a_format_state_meets_an_unchanged_weight_under_full_protection(
    update: Tensor, directions: Tensor
) -> None:
    state = directions @ torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    left = project(update, directions, torch.ones(4, dtype=torch.float64))
    assert float((left @ state).abs().max()) < 1e-12


def test_each_direction_keeps_just_what_its_weight_leaves(
    update: Tensor, directions: Tensor
) -> None:
    weight = torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    left = project(update, directions, weight)
    wanted = update @ directions * (1 - weight)
    assert float((left @ directions - wanted).abs().max()) < 1e-12


def test_without_a_basis_the_update_is_untouched(update: Tensor) -> None:
    empty = torch.zeros(12, 0, dtype=torch.float64)
    nothing = protection(torch.zeros(0, dtype=torch.float64), 0.03)
    assert nothing.numel() == 0
    assert torch.equal(project(update, empty, nothing), update)


def test_no_protection_leaves_the_update_untouched(update: Tensor, directions: Tensor) -> None:
    assert torch.equal(project(update, directions, torch.zeros(4).double()), update)


def test_full_protection_twice_is_full_protection_once(update: Tensor, directions: Tensor) -> None:
    ones = torch.ones(4, dtype=torch.float64)
    once = project(update, directions, ones)
    assert float((project(once, directions, ones) - once).abs().max()) < 1e-12


def test_two_partial_protections_leave_the_product_of_what_each_leaves(
    update: Tensor, directions: Tensor
) -> None:
    first, second = torch.rand(2, 4, generator=torch.Generator().manual_seed(7)).double()
    twice = project(project(update, directions, first), directions, second)
    once = project(update, directions, 1 - (1 - first) * (1 - second))
    assert float((twice - once).abs().max()) < 1e-12


def test_projection_is_linear_and_never_lengthens(update: Tensor, directions: Tensor) -> None:
    weight = torch.tensor([1.0, 0.7, 0.3, 0.01], dtype=torch.float64)
    left = project(update, directions, weight)
    assert float((project(3 * update, directions, weight) - 3 * left).abs().max()) < 1e-12
    assert float(left.norm()) <= float(update.norm())


def test_the_signs_of_the_directions_do_not_matter(update: Tensor, directions: Tensor) -> None:
    weight = torch.tensor([1.0, 0.7, 0.3, 0.01], dtype=torch.float64)
    flipped = directions * torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    assert torch.equal(project(update, directions, weight), project(update, flipped, weight))


def test_the_input_side_is_protected_also_of_a_vector_and_of_a_stack(
    update: Tensor, directions: Tensor
) -> None:
    weight = torch.tensor([1.0, 0.7, 0.3, 0.01], dtype=torch.float64)
    whole = project(update, directions, weight)
    assert torch.allclose(project(update[0], directions, weight), whole[0], rtol=0, atol=1e-14)
    stack = project(torch.stack([update, -update]), directions, weight)
    assert torch.allclose(stack, torch.stack([whole, -whole]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5])
def test_all_rules_protect_the_strongest_and_half_or_all_at_tau(tau: float) -> None:
    sigma = torch.tensor([2.0, 2.0 * tau, 2.0 * tau * 1e-3], dtype=torch.float64)
    at = {
        "sigmoid": protection(sigma, tau),
        "hard": hard_protection(sigma, tau),
        "ridge": ridge_protection(sigma, tau),
    }
    assert at["hard"].tolist() == [1.0, 1.0, 0.0]
    assert float(at["ridge"][1]) == pytest.approx(0.5) == float(at["sigmoid"][1])
    for weights in at.values():
        assert bool((weights.diff() <= 0).all()) and 0 <= float(weights[2]) < 0.02
    for rule in (hard_protection, ridge_protection):
        assert rule(sigma[:0], tau).numel() == 0


def test_the_ridge_rule_is_the_projection_of_ridge_regression() -> None:
    """P(D) = D (I - HᵀH (HᵀH + λ I)⁻¹): what the rows of H barely excite stays."""
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
    rows *= 0.4 ** torch.arange(8).double()
    basis = basis_from_gram(gram(rows), 40, rank=8, cutoff=1e-12)
    update = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
    tau = 0.05
    weights = ridge_protection(basis.sigma, tau)
    found = project(update, basis.directions.double(), weights)
    square, penalty = rows.T @ rows, (tau * basis.sigma[0]) ** 2
    wanted = update @ (torch.eye(8).double() - square @ (square + penalty * torch.eye(8)).inverse())
    assert torch.allclose(found, wanted, atol=1e-6)
