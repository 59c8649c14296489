"""Metrics from numbers per row: means, their intervals, and models compared row by row."""

from collections.abc import Mapping, Sequence

import torch

from crane_tasks.evaluate.metrics import BY_NAME, SHARE
from crane_tasks.numerics.intervals import bootstrap_mean, mcnemar, wilson


def mean(each: Sequence[float]) -> float:
    """A metric's value."""
    return float(torch.tensor(each, dtype=torch.float64).mean())


def intervals_of(rows: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """By metric where its value lies at 95 %, given the rows that were asked."""
    found = {}
    for name, each in rows.items():
        metric = BY_NAME[name]
        if not metric.sampled:
            continue
        share = metric.unit == SHARE and _whole(each)
        found[name] = wilson(int(sum(each)), len(each)) if share else bootstrap_mean(each)
    return {name: ends for name, ends in found.items() if ends[0] == ends[0]}


def against(
    base: Mapping[str, Sequence[float]], rows: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """By metric a model's difference from the base on the same rows, with its interval; of a
    share also how many rows it lost and gained, and McNemar's p."""
    found: dict[str, dict[str, float]] = {}
    for name, each in rows.items():
        ours = base.get(name, ())
        if not BY_NAME[name].sampled or len(ours) != len(each):
            continue
        changes = [b - a for a, b in zip(ours, each, strict=True)]
        low, high = bootstrap_mean(changes)
        if low != low:
            continue
        found[name] = {"difference": mean(changes), "low": low, "high": high}
        if BY_NAME[name].unit == SHARE and _whole(ours) and _whole(each):
            lost, gained = changes.count(-1.0), changes.count(1.0)
            found[name] |= {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}
    return found


def _whole(each: Sequence[float]) -> bool:
    """Whether rows are right or wrong, and not right in some of several answers."""
    return all(value in (0.0, 1.0) for value in each)
