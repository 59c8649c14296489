"""How alike two rankings are, and the gains of unions of groups by the groups' gradients."""

import math

import pytest
import torch
from plain_sums import gain_sums

from crane_tasks.numerics.stability import (
    dealt,
    halves,
    ranks,
    spearman,
    union_gains,
    union_weights,
)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks(vector(10, 20, 20, 5)).tolist() == [2, 3.5, 3.5, 1]
    assert ranks(vector(7, 7, 7)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ((1, 2, 3), (10, 100, 1000), 1.0),
        ((1, 2, 3), (3, 2, 1), -1.0),
        # Without ties 1 - 6 Σ d² / (n (n² - 1)); these are Wikipedia's IQ and hours of TV.
        ((86, 97, 99, 100, 101, 103, 106, 110, 112, 113), (2, 20, 28, 27, 50, 29, 7, 17, 6, 12),
         -29 / 165),
        # With ties: Pearson's of the ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
        ((1, 2, 2, 3), (1, 3, 2, 4), 4.5 / math.sqrt(4.5 * 5)),
    ],
)  # fmt: skip
def test_spearman_of_known_rankings(
    one: tuple[float, ...], other: tuple[float, ...], wanted: float
) -> None:
    assert spearman(vector(*one), vector(*other)) == pytest.approx(wanted, abs=1e-12)
    assert spearman(vector(*other), vector(*one)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("constant", [(1.0, 1.0, 1.0), (1.0,)])
def test_what_cannot_be_ranked_has_no_correlation(constant: tuple[float, ...]) -> None:
    other = vector(*range(len(constant)))
    assert math.isnan(spearman(vector(*constant), other))
    assert math.isnan(spearman(other, vector(*constant)))


def test_every_item_is_dealt_once_into_groups_of_like_size() -> None:
    groups = dealt(21, 8, 3, "reasoning")
    assert sorted(i for group in groups for i in group) == list(range(21))
    assert {len(group) for group in groups} == {2, 3}
    assert groups == dealt(21, 8, 3, "reasoning")
    assert groups != dealt(21, 8, 4, "reasoning") and groups != dealt(21, 8, 3, "agent")


def test_the_first_union_is_all_and_the_others_are_halves_and_what_they_leave() -> None:
    masks = halves(8, 50, 0, "agent")
    assert masks.shape == (101, 8) and masks[0].all()
    assert (masks[1:].sum(1) == 4).all()
    assert torch.equal(masks[1::2], ~masks[2::2])
    assert len({tuple(row) for row in masks[1:].tolist()}) > 30
    assert not torch.equal(masks, halves(8, 50, 0, "reasoning"))


def test_a_unions_gains_are_those_of_the_mean_gradient_of_its_items() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    count, groups = 3000, [[0, 3], [1, 4], [2, 5], [6]]
    delta, items_r, items_a = random(count), random(7, count), random(7, count)
    masks = halves(4, 6, 1, "reasoning")
    weights = union_weights(masks, [len(group) for group in groups])
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 13)
    means = [[items[group].mean(0) for group in groups] for items in (items_r, items_a)]
    found = union_gains(delta, means[0], means[1], weights, weights.flip(0))
    for union in range(13):
        grads = []
        for items, mask in ((items_r, masks[union]), (items_a, masks.flip(0)[union])):
            chosen = [i for k in mask.nonzero().flatten().tolist() for i in groups[k]]
            grads.append(items[chosen].double().mean(0))
        wanted = gain_sums(delta.double(), delta.double(), *grads).p
        assert float(found[union]) == pytest.approx(wanted, rel=1e-5)
