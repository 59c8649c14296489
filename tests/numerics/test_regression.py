"""P by regression and by AIM: what they minimise, and what they come to in known cases."""

import pytest
import torch
from torch import Tensor

from crane_tasks.numerics.projector import basis_from_gram, gram, project, ridge_protection
from crane_tasks.numerics.regression import SHRINKAGE, plain_share, regression, relaxed

D = 12


def rows(seed: int, count: int = 40, width: int = D) -> Tensor:
    """Inputs whose directions are unlike in strength, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    return mixed * 0.7 ** torch.arange(width) @ turned


def moments(inputs: Tensor) -> Tensor:
    return gram(inputs) / inputs.shape[0]


def matrix(r: Tensor, a: Tensor, protect: float) -> Tensor:
    found = regression(r, a, protect)
    assert found is not None
    return found


@pytest.mark.parametrize("protect", [0.1, 1.0, 7.0])
def test_no_other_edit_has_less_of_what_both_sets_lose(protect: float) -> None:
    reasoning, agent = rows(1), rows(2)
    delta = torch.randn(5, D, generator=torch.Generator().manual_seed(3)).double()
    r, a = moments(reasoning), moments(agent)
    ridge = SHRINKAGE * (r.trace() + a.trace()) / (2 * D)

    def lost(edit: Tensor) -> Tensor:
        wrong = (reasoning @ (delta - edit).T).square().sum() / len(reasoning)
        changed = (agent @ edit.T).square().sum() / len(agent)
        small = (delta - edit).square().sum() + protect * edit.square().sum()
        return wrong + protect * changed + ridge * small

    edit = (delta @ matrix(r, a, protect)).requires_grad_()
    lost(edit).backward()
    assert edit.grad is not None
    assert float(edit.grad.norm()) < 1e-10 * float(delta.norm())
    # It is convex, so this is the least; and neither end is.
    assert lost(edit) < lost(delta) and lost(edit) < lost(torch.zeros_like(delta))


@pytest.mark.parametrize("protect", [0.2, 3.0])
def test_of_alike_sets_it_is_plain_interpolation(protect: float) -> None:
    c = moments(rows(1))
    wanted = torch.eye(D, dtype=torch.float64) * plain_share(protect)
    assert torch.allclose(matrix(c, c, protect), wanted, atol=1e-12)


def test_directions_that_one_set_alone_uses_are_kept_or_removed() -> None:
    directions = torch.linalg.qr(rows(1, D)).Q
    r, a = (gram(directions[:, part].T) for part in (slice(0, 4), slice(4, 8)))
    found = matrix(r, a, 1.0)
    shares = torch.diagonal(directions.T @ found @ directions)
    near = 2 * SHRINKAGE  # its trace is less than the dimension
    assert torch.allclose(shares[:4], torch.ones(4).double(), atol=near)
    assert torch.allclose(shares[4:8], torch.zeros(4).double(), atol=near)
    # No set uses the others: the plain factor.
    assert torch.allclose(shares[8:], torch.full((4,), 0.5).double())


def test_of_reasoning_inputs_without_structure_it_is_the_ridge_projection() -> None:
    agent = rows(2)
    tau, count = 0.1, len(agent)
    basis = basis_from_gram(gram(agent), count, rank=D, cutoff=0.0)
    level = float(tau * basis.sigma[0]) ** 2 / count
    delta = rows(5, 3)
    ridge = project(delta, basis.directions.double(), ridge_protection(basis.sigma, tau))
    # C_R = λ I, and so little of C_A's own size that the shrinkage of both is nothing beside it.
    found = delta @ matrix(level * torch.eye(D).double(), moments(agent), 1.0)
    assert float((found - ridge).norm() / ridge.norm()) < 0.05


def test_the_more_is_protected_the_less_agents_outputs_change() -> None:
    reasoning, agent, delta = rows(1), rows(2), rows(5, 3)
    r, a = moments(reasoning), moments(agent)
    edits = [delta @ matrix(r, a, protect) for protect in (0.01, 0.1, 1.0, 10.0)]
    changed = [float((agent @ edit.T).norm()) for edit in edits]
    wrong = [float((reasoning @ (delta - edit).T).norm()) for edit in edits]
    assert changed == sorted(changed, reverse=True) and changed[0] > 3 * changed[-1]
    assert wrong == sorted(wrong) and wrong[-1] > 3 * wrong[0]


def test_without_moments_there_is_no_matrix() -> None:
    nothing = torch.zeros(D, D)
    assert regression(nothing, nothing, 1.0) is None


def test_moments_of_fewer_tokens_than_channels_are_solved() -> None:
    few = moments(rows(1, 3)).float()
    found = matrix(few, moments(rows(2, 2)).float(), 1.0)
    values = torch.linalg.eigvals(found).real
    assert bool(((values > -1e-6) & (values < 1 + 1e-6)).all())


def test_aim_leaves_omega_of_the_strongest_channel_and_all_of_silent_ones() -> None:
    update, magnitude = torch.ones(2, 3), torch.tensor([0.0, 1.0, 4.0])
    assert relaxed(update, magnitude, 0.4).tolist() == [pytest.approx([1.0, 0.85, 0.4])] * 2
    assert torch.equal(relaxed(update, torch.zeros(3), 0.4), update)
    assert torch.equal(relaxed(update, magnitude, 1.0), update)
