"""The first-order change of loss that an edit should make, for any alpha and tau.

    Σ g · edit = Σ_tensors α S ( Σ g T(δ)  -  Σ_i w_i(τ) Σ_rows (g V)_i (T(δ) V)_i )

Both inner sums know neither α nor τ. They are taken once from kept gradients, a few numbers
per layer, component and basis; a rerun reads those instead of twice the model's size. What
the gate predicts is reported beside what came of it; nothing is decided by it.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from crane_tasks.apply.editor import SLERP_SHARE
from crane_tasks.delta import DELTA, read_stacks
from crane_tasks.edit import OpenEdit, edit_of, edit_stages, not_of_edit, open_edit
from crane_tasks.models.files.layout import Slot, layer_of_unit, unit_name
from crane_tasks.parts import OpenSpectral
from crane_tasks.projector import PROJECTOR
from crane_tasks.scores.gradients import GRADIENTS, SETS, read_gradient
from crane_tasks.scores.reading import layer_sums
from crane_tasks.scores.stage import SCORES, portions
from crane_tasks.session import Context
from crane_tasks.sizes import gated
from crane_tasks.stage import Keys, Stage

Group = tuple[str, str, int]  # component, site ("" without one), expert that owns the basis


@torch.no_grad()
def write_forecast(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Unit of work: a decoder layer. Each group's sums are a row [1 + rank]: Σ g T(δ), and
    per direction Σ (g V)(T(δ) V)."""
    gradients, delta = ctx.store.open(keys[GRADIENTS]), ctx.store.open(keys[DELTA])
    edit = open_edit(ctx, keys)
    units = list(ctx.pair().base.layers())
    for number, (layer, slots) in enumerate(units):
        name = unit_name(layer)
        if not draft.done(name):
            groups: dict[Group, Tensor] = {}
            for slot in gated(slots):
                for group, row in _slot_sums(ctx, edit, slot, gradients, delta):
                    groups[group] = groups[group] + row if group in groups else row
            with draft.unit(name) as unit:
                width = max(row.shape[1] for row in groups.values())
                rows = [
                    torch.nn.functional.pad(r, (0, width - r.shape[1])) for r in groups.values()
                ]
                for index, key in enumerate(SETS):
                    sums = torch.stack([row[index] for row in rows]).cpu()
                    unit.write(key, sums, attributes={"groups": [list(g) for g in groups]})
        ctx.progress("apply", number + 1, len(units), "layers of the forecast")


FORECAST = Stage(
    name="forecast",
    version=1,
    schema=Schema(arrays={r"reasoning|agent": ("float64",)}),
    # The gate is not in it: S is a factor that is known when it is read.
    inputs={
        "gradients": GRADIENTS,
        "delta": DELTA,
        **{role: stage for role, stage in edit_stages().items() if role != SCORES.role},
    },
    without=lambda recipe: set(not_of_edit(recipe)) - {GRADIENTS.role},
    # Its groups are components: it knows nothing of scores that are finer.
    used=lambda recipe: edit_of(recipe).foretold and recipe.gate.per == "component",
    possible=lambda ctx, keys: ctx.store.has(keys[GRADIENTS]),
    write=write_forecast,
)


def _slot_sums(
    ctx: Context, edit: OpenEdit, slot: Slot, gradients: Artifact, delta: Artifact
) -> Iterator[tuple[Group, Tensor]]:
    """The slot's sums by group: [sets, 1 + rank] in float64, on the device."""
    base, device = ctx.pair().base, ctx.torch_device
    width = (base.pieces[slot.name][0].shape or (1,))[-1]
    projection = _spectral(edit)
    site = projection.site(slot, width) if projection else None
    routed = site is not None and site.side == "routed"
    wanted = ((slot, experts) for experts in portions(base, slot))
    for _, experts, _, change in read_stacks(delta, base, wanted, device):
        numbers = range(experts.start, experts.stop)
        step = edit.kept(slot, numbers, 0, change)
        grads = [
            read_gradient(gradients, k, slot, experts if slot.stacked else None)
            .to(device)
            .reshape(step.shape)
            .float()
            for k in SETS
        ]
        for some in [slice(i, i + 1) for i in range(len(numbers))] if routed else [slice(None)]:
            own = numbers[some.start] if routed else 0
            directions = None
            if site is not None and projection is not None:
                directions = projection.directions(slot, site, own)
            rows = [group_row(step[some], g[some], directions) for g in grads]
            name = site.name if site is not None and directions is not None else ""
            yield (slot.component, name, own), torch.stack(rows)


def _spectral(edit: OpenEdit) -> OpenSpectral | None:
    """P of an edit that is foretold."""
    return cast("OpenSpectral | None", edit.projection)


def group_row(step: Tensor, gradient: Tensor, directions: Tensor | None) -> Tensor:
    """Σ g T(δ) of some tensors, and per direction Σ (g V)(T(δ) V): float64 [1 + rank]."""
    whole = (step * gradient).sum(dtype=torch.float64)[None]
    if directions is None:
        return whole
    along = ((step @ directions) * (gradient @ directions)).flatten(0, -2)
    return torch.cat([whole, along.sum(0, dtype=torch.float64)])


def predicted_changes(ctx: Context, keys: Keys) -> dict[str, float]:
    """Σ g · edit for both sets at the recipe's alpha and tau, in nats of loss.

    Before rounding; NaN where no gradients were kept. A router under slerp counts as the
    fraction of δ that it moves by. Empty for an edit that makes no prediction.
    """
    if FORECAST not in keys:
        return {}
    if not ctx.store.has(keys[FORECAST]):
        return dict.fromkeys(SETS, math.nan)
    changes = dict.fromkeys(SETS, 0.0)
    forecast, edit = ctx.store.open(keys[FORECAST]), open_edit(ctx, keys)
    projector = ctx.store.open(keys[PROJECTOR]) if PROJECTOR in keys else None
    slerped = ctx.recipe.merge.router.startswith("slerp")
    for unit in forecast.units():
        layer = layer_of_unit(unit)
        sigmas: dict[str, Tensor] = {}  # read once, whatever number of experts has one
        for name in SETS:
            rows = forecast.read(unit, name)
            groups: list[Group] = forecast.attributes(unit, name)["groups"]
            for (component, site, own), row in zip(groups, rows, strict=True):
                if component == "router" and slerped:
                    continue
                change = float(row[0])
                if site and projector is not None:
                    if site not in sigmas:
                        sigmas[site] = projector.read(unit, f"{site}.sigma")
                    change -= _removed(edit, sigmas[site], own, row[1:])
                changes[name] += edit.factor(layer, component) * change
    if slerped:
        _add_slerped(changes, ctx, keys)
    return changes


def _removed(edit: OpenEdit, sigma: Tensor, own: int, along: Tensor) -> float:
    """Σ_i w_i of what lies along each direction."""
    projection = _spectral(edit)
    assert projection is not None
    sigma = sigma[own] if sigma.dim() > 1 else sigma
    weight = projection.weights(sigma[sigma > 0])
    return float(along[: weight.numel()] @ weight)


def _add_slerped(changes: dict[str, float], ctx: Context, keys: Keys) -> None:
    """The router's share under slerp, from the gate's own sums."""
    share = ctx.recipe.alpha * SLERP_SHARE
    for parts in layer_sums(ctx.store.open(keys[SCORES])).values():
        if "router" in parts:
            changes["reasoning"] -= share * parts["router"].s_r
            changes["agent"] -= share * parts["router"].s_a
