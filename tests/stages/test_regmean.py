"""Merges by RegMean and AIM are their formulas, from hooks on the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyPair, load_tensors
from tiny_merge import PlainMerge, component_of, merged, statuses
from torch import Tensor

from crane_tasks.numerics.regression import SHRINKAGE

Pairs = Callable[[str], TinyPair]
Inputs = dict[str, Tensor]
PROTECT, OMEGA = 0.7, 0.3
OUTSIDE = ("embedding", "lm_head", "carried")


def regressed(plain: PlainMerge, name: str, sets: dict[str, tuple[Inputs, int]]) -> Tensor:
    """δ C_R (C_R + μ C_A)⁻¹ of one tensor, float64; δ / (1 + μ) where nothing is known."""
    moments = []
    for inputs, count in sets.values():
        plain.inputs = inputs
        rows = plain.site(name)
        moments.append(None if rows is None else rows.T @ rows / count)
    delta = plain.delta(name).double()
    r, a = moments
    if r is None or a is None or float(r.trace() + a.trace()) == 0:
        return delta / (1 + PROTECT)
    ridge = SHRINKAGE * (r.trace() + a.trace()) / (2 * len(r)) * torch.eye(len(r)).double()
    return delta @ (r + ridge) @ torch.linalg.inv(r + PROTECT * a + (1 + PROTECT) * ridge)


def assert_is(plain: PlainMerge, found: dict[str, Tensor], edit: Callable[[str], Tensor]) -> None:
    for name, base in plain.base.items():
        if component_of(name) in OUTSIDE:
            continue
        wanted = edit(name)
        realised = found[name].double() - base.double()
        room = 2**-8 * found[name].double().abs() + 2e-4 * wanted.abs().max()
        assert bool(((realised - wanted).abs() <= room).all()), name


@pytest.mark.parametrize("which", ["qwen3", "qwen3_moe", "qwen3_next"])
def test_a_merge_by_regmean_is_its_formula(which: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(which)
    place = (pair, tmp_path / "store", tmp_path / "out")
    merged(*place, "merge.method=regmean", f"merge.protect={PROTECT}", "alpha=1.2")
    plain = PlainMerge(pair, alpha=1.2, tau=0.03, sites="all")
    sets = {}
    for kind in ("reasoning", "agent"):
        items = plain.whole(kind)
        sets[kind] = plain.inputs_of(items), sum(len(ids) for ids, _ in items)
    found = load_tensors(tmp_path / "out")
    assert_is(plain, found, lambda name: 1.2 * regressed(plain, name, sets))
    # It is no plain factor.
    name = next(n for n in plain.base if n.endswith("up_proj.weight"))
    edit, delta = regressed(plain, name, sets), plain.delta(name).double()
    assert float(
        (edit - delta * (edit * delta).sum() / delta.square().sum()).norm()
    ) > 0.05 * float(edit.norm())


def test_a_merge_by_aim_is_its_formula(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3_moe")
    place = (pair, tmp_path / "store", tmp_path / "out")
    merged(*place, "merge.method=aim", f"merge.omega={OMEGA}", "alpha=0.5")
    plain = PlainMerge(pair, alpha=0.5, tau=0.03, sites="all")

    def relaxed(name: str) -> Tensor:
        rows, step = plain.site(name), 0.5 * plain.delta(name).double()
        if rows is None or not len(rows):
            return step
        mean = rows.abs().mean(0)
        return step * (1 - mean / mean.max() * (1 - OMEGA))

    assert_is(plain, load_tensors(tmp_path / "out"), relaxed)


def test_another_weight_of_the_agent_set_reads_the_same_moments(
    pairs: Pairs, tmp_path: Path
) -> None:
    place = (pairs("qwen3"), tmp_path / "store")
    first = merged(*place, tmp_path / "a", "merge.method=regmean")
    assert statuses(first)["moments"] == "computed"
    again = merged(*place, tmp_path / "b", "merge.method=regmean", "merge.protect=3", "alpha=1.1")
    found = statuses(again)
    assert (found["moments"], found["apply"]) == ("reused", "computed")
    assert not {"threshold", "scores", "projector"} & found.keys()
    card = (tmp_path / "b" / "README.md").read_text()
    assert "RegMean" in card and "protect" in card
    # Crane reads none of it.
    assert "moments" not in statuses(merged(*place, tmp_path / "c"))


def test_the_regression_may_stand_behind_other_thresholds_and_gates(
    pairs: Pairs, tmp_path: Path
) -> None:
    result = merged(pairs("qwen3_moe"), tmp_path / "store", tmp_path / "out",
                    "merge.projection=regression", "merge.router=gated-projected")  # fmt: skip
    assert {"threshold", "scores", "moments"} <= statuses(result).keys()
    # What such an edit should change is not foretold, and not made up.
    assert "gate" not in result.evaluation
