"""Stage `moments`: second moments of every weight's inputs, over all tokens of a target set.

    C = 1/n Σ x xᵀ

over the n tokens of a set, prompts and targets, in the base's forward pass. At an expert's own
input n are all the set's tokens, routed to it or not: what a set seldom sends there weighs little.
μ is not in it: the projection is solved for when the edit is applied.
"""

from collections.abc import Callable

import torch

from artifacts.schema import Schema
from artifacts.store import Draft, Unit
from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import AGENT, REASONING
from crane_tasks.models.walk.activations import Sum
from crane_tasks.numerics.projector import gram
from crane_tasks.session import Context
from crane_tasks.site_walk import site_widths, sites_in_use, walk_needs, walk_sites, write_means
from crane_tasks.stage import BASE, Keys, Needs, Stage

NAME = "moments"
VERSION = 1


def _writer(tokens: Stage) -> Callable[[Context, Keys, Draft], None]:
    def write_moments(ctx: Context, keys: Keys, draft: Draft) -> None:
        sequences = read_set(ctx.store.open(keys[tokens])).sequences
        count = sum(ids.numel() for ids in sequences)

        def write(unit: Unit, site: str, sums: dict[int, Sum], experts: int | None) -> None:
            means = {e: (s.total / count).float().cpu() for e, s in sums.items()}
            write_means(unit, site, means, experts)

        walk_sites(
            ctx,
            draft,
            [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in sequences],
            sites_in_use(ctx.pair().base.layout, "all"),
            stage=NAME,
            reduce=gram,
            write=write,
        )

    return write_moments


def _needs(ctx: Context, keys: Keys) -> Needs:
    walk = walk_needs(ctx, keys)
    widths = site_widths(ctx).items()
    by_layer: dict[int, int] = {}
    for (layer, _), (experts, width) in widths:
        by_layer[layer] = by_layer.get(layer, 0) + experts * width**2
    sums = 8 * max(by_layer.values())  # float64, of the layer at hand
    return Needs(
        store=4 * sum(by_layer.values()),
        memory=walk.memory + (sums if ctx.device == "cpu" else 0),
        device_memory=walk.device_memory + sums,
        seconds=walk.seconds,
    )


def _moments_of(tokens: Stage) -> Stage:
    return Stage(
        name=NAME,
        role=f"{NAME}_{tokens.role}",
        version=VERSION,
        schema=Schema(arrays={r".+": ("float32",)}),
        inputs={"base": BASE, "tokens": tokens},
        fields=("gate.compute",),
        write=_writer(tokens),
        needs=_needs,
    )


REASONING_MOMENTS, AGENT_MOMENTS = _moments_of(REASONING), _moments_of(AGENT)


def _both(ctx: Context, keys: Keys) -> Needs:
    one = _needs(ctx, keys)
    return Needs(2 * one.store, 0, one.memory, one.device_memory, 2 * one.seconds)


# Those of both sets under one name.
MOMENTS = Stage(
    name=NAME,
    version=VERSION,
    schema=None,
    inputs={"reasoning": REASONING_MOMENTS, "agent": AGENT_MOMENTS},
    config=lambda ctx: {"kind": "both"},
    needs=_both,
)
