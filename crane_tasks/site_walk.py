"""A stage that reads activations: sums over chosen tokens at every site, layer by layer."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from artifacts.store import Artifact, Draft, Unit
from crane_tasks.models.files.layout import Layout, Site, unit_name
from crane_tasks.models.walk.activations import Reduce, Sum, walk_activations
from crane_tasks.models.walk.states import States
from crane_tasks.session import Context
from crane_tasks.sizes import sizes_of
from crane_tasks.stage import Keys, Needs

# Writes one site: its sums by expert (0 if it has none), and over how many experts it is stacked.
WriteSite = Callable[[Unit, str, dict[int, Sum], int | None], None]


def sites_in_use(layout: Layout, sites: str) -> list[Site]:
    """The published sites, or with "all" the true inputs of o_proj and down_proj as well."""
    return [site for site in layout.sites if sites == "all" or not site.extended]


def walk_sites(
    ctx: Context,
    draft: Draft,
    items: list[tuple[Tensor, Tensor]],
    sites: Collection[Site],
    *,
    stage: str,
    reduce: Reduce,
    write: WriteSite,
) -> None:
    """Walk the base over items (token ids int64 [T], tokens taken bool [T]).

    Unit of work: a decoder layer. `reduce` gives what is added up of the rows [n, d] at a site.
    """
    base = ctx.pair().base

    def visit(layer: int, sums: dict[str, dict[int, Sum]]) -> None:
        with draft.unit(unit_name(layer)) as unit:
            for site, by_expert in sums.items():
                write(unit, site, by_expert, _experts(ctx, layer, site))

    walk_activations(
        ctx.walk_of(base),
        items,
        sites,
        reduce=reduce,
        states=States(draft.scratch, ctx.state_memory),
        done={i for i in range(base.num_layers) if draft.done(unit_name(i))},
        visit=visit,
        on_step=lambda step: ctx.show_step(stage, step),
    )


def write_means(unit: Unit, site: str, means: dict[int, Tensor], experts: int | None) -> None:
    """One array of a site, float32; those of experts stacked, zero where no token was routed."""
    if experts is None:
        unit.write(site, means[0])
        return
    nothing = torch.zeros_like(next(iter(means.values())))
    stacked = torch.stack([means.get(e, nothing) for e in range(experts)])
    unit.write(site, stacked, stacked=True)


def read_mean(artifact: Artifact, unit: str, site: Site, expert: int) -> Tensor | None:
    """That of an expert (0 if the site has none); None where no token of the set came by."""
    if not artifact.has(unit, site.name):
        return None
    return artifact.read(unit, site.name, expert if site.side == "routed" else ...)


def walk_needs(ctx: Context, keys: Keys) -> Needs:
    """What such a walk takes, without its artifact."""
    sizes = sizes_of(ctx)
    walk = sizes.one_layer + sizes.ends
    return Needs(
        memory=sizes.on_host + (walk if ctx.device == "cpu" else 0),
        device_memory=walk,
        seconds=sizes.passes + sizes.reading,
    )


def _experts(ctx: Context, layer: int, site: str) -> int | None:
    """How many experts a site is stacked over, None for a plain one."""
    base = ctx.pair().base
    for slot in base.slots.values():
        if slot.layer == layer and slot.site and slot.site.name == site:
            routed = slot.site.side == "routed"
            return len(base.pieces[slot.name]) if routed else None
    return None


def site_widths(ctx: Context) -> dict[tuple[int, str], tuple[int, int]]:
    """(layer, site) -> how many experts it is stacked over (1 for a plain one), and its width."""
    found: dict[tuple[int, str], tuple[int, int]] = {}
    base = ctx.pair().base
    for slot in base.slots.values():
        if slot.layer is not None and slot.site is not None:
            pieces = base.pieces[slot.name]
            experts = len(pieces) if slot.site.side == "routed" else 1
            found[slot.layer, slot.site.name] = experts, pieces[0].shape[-1]
    return found
