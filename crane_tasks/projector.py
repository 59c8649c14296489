"""Stage `projector`: the base's format directions V and their strengths σ at every site.

τ is not in it: the weights w(σ, τ) are made when the edit is applied.
"""

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact, Draft, Unit
from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import FORMAT
from crane_tasks.errors import CraneError
from crane_tasks.models.files.layout import Site, Slot
from crane_tasks.models.walk.activations import Sum
from crane_tasks.numerics.projector import Basis, basis_from_gram, gram
from crane_tasks.session import Context
from crane_tasks.site_walk import sites_in_use, walk_needs, walk_sites
from crane_tasks.stage import BASE, Keys, Stage


def write_projector(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Unit of work: a decoder layer."""
    settings = ctx.recipe.projector
    tokens = read_set(ctx.store.open(keys[FORMAT]))

    def write(unit: Unit, site: str, sums: dict[int, Sum], experts: int | None) -> None:
        bases = {e: _basis(rows, settings.rank, settings.cutoff) for e, rows in sums.items()}
        _write_site(unit, site, bases, experts)

    walk_sites(
        ctx,
        draft,
        list(zip(tokens.sequences, tokens.masks, strict=True)),
        sites_in_use(ctx.pair().base.layout, settings.sites),
        stage=PROJECTOR.name,
        reduce=gram,
        write=write,
    )


PROJECTOR = Stage(
    name="projector",
    version=1,
    schema=Schema(
        arrays={
            r".+\.directions": ("float32",),
            r".+\.sigma": ("float64",),
            r".+\.rows": ("int64",),
        }
    ),
    inputs={"base": BASE, "format": FORMAT},
    fields=("projector.rank", "projector.cutoff", "projector.sites", "gate.compute"),
    write=write_projector,
    needs=walk_needs,
)


def _basis(rows: Sum, rank: int, cutoff: float) -> Basis:
    return basis_from_gram(rows.total, rows.rows, rank=rank, cutoff=cutoff)


def _write_site(unit: Unit, site: str, bases: dict[int, Basis], experts: int | None) -> None:
    """One site; the bases of experts are stacked, padded with zero directions."""
    if experts is None:
        basis = bases[0]
        unit.write(f"{site}.directions", basis.directions)
        unit.write(f"{site}.sigma", basis.sigma)
        unit.write(f"{site}.rows", torch.tensor([basis.rows]))
        return
    width = next(iter(bases.values())).directions.shape[0]
    rank = max(b.sigma.numel() for b in bases.values())
    directions, sigma = torch.zeros(experts, width, rank), torch.zeros(experts, rank).double()
    rows = torch.zeros(experts, dtype=torch.int64)
    for expert, basis in bases.items():
        r = basis.sigma.numel()
        directions[expert, :, :r], sigma[expert, :r] = basis.directions.cpu(), basis.sigma.cpu()
        rows[expert] = basis.rows
    unit.write(f"{site}.directions", directions, stacked=True)
    unit.write(f"{site}.sigma", sigma, stacked=True)
    unit.write(f"{site}.rows", rows)


def basis_site(artifact: Artifact, slot: Slot, width: int) -> Site | None:
    """The site whose basis protects a tensor with inputs of `width`, or None.

    Its own where the artifact has it; else the one it borrows, if that is as wide.
    """
    if slot.site is None:
        return None
    if artifact.has(slot.unit, f"{slot.site.name}.sigma"):
        return slot.site
    if not slot.site.extended:
        raise CraneError(f"{artifact.path}: no basis of {slot.site.name} in {slot.unit}")
    borrowed = slot.borrows
    if borrowed is None or not artifact.has(slot.unit, f"{borrowed.name}.sigma"):
        return None
    return (
        borrowed if artifact.shape(slot.unit, f"{borrowed.name}.directions")[0] == width else None
    )


def read_basis(
    artifact: Artifact, slot: Slot, site: Site, expert: int
) -> tuple[Tensor, Tensor] | None:
    """V float32 [d, r] and σ float64 [r] of a site; None for an expert no format token reached."""
    index = expert if site.side == "routed" else ...
    directions = artifact.read(slot.unit, f"{site.name}.directions", index)
    sigma = artifact.read(slot.unit, f"{site.name}.sigma", index)
    kept = int((sigma > 0).sum())
    return (directions[:, :kept], sigma[:kept]) if kept else None
