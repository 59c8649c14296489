"""Stage `magnitudes`: the mean absolute input of every weight's channels, at format tokens."""

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Draft, Unit
from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import FORMAT
from crane_tasks.models.walk.activations import Sum
from crane_tasks.session import Context
from crane_tasks.site_walk import sites_in_use, walk_needs, walk_sites, write_means
from crane_tasks.stage import BASE, Keys, Stage


def absolute_sums(rows: Tensor) -> Tensor:
    """Σ |x| of some rows [n, d], float64 [d]."""
    return rows.abs().sum(0, dtype=torch.float64)


def write_magnitudes(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Unit of work: a decoder layer."""
    tokens = read_set(ctx.store.open(keys[FORMAT]))
    walk_sites(
        ctx,
        draft,
        list(zip(tokens.sequences, tokens.masks, strict=True)),
        sites_in_use(ctx.pair().base.layout, "all"),
        stage=MAGNITUDES.name,
        reduce=absolute_sums,
        write=_write_site,
    )


def _write_site(unit: Unit, site: str, sums: dict[int, Sum], experts: int | None) -> None:
    """One site, float32; those of experts stacked, zero where no token was routed."""
    means = {e: (s.total / s.rows).float().cpu() for e, s in sums.items()}
    write_means(unit, site, means, experts)


MAGNITUDES = Stage(
    name="magnitudes",
    version=1,
    schema=Schema(arrays={r".+": ("float32",)}),
    inputs={"base": BASE, "format": FORMAT},
    fields=("gate.compute",),
    write=write_magnitudes,
    needs=walk_needs,
)
