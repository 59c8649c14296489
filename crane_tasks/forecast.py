"""The first-order change of loss that an edit should make, for any alpha and tau.

    Σ g · edit = Σ_tensors α S ( Σ g T(δ)  -  Σ_i w_i(τ) Σ_rows (g V)_i (T(δ) V)_i )

Both inner sums know neither α nor τ. They are taken once from kept gradients, a few numbers
per layer, component and basis; a rerun reads those instead of twice the model's size. What
the gate predicts is reported beside what came of it; nothing is decided by it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft
from crane_tasks.context import Context
from crane_tasks.delta import read_stacked_delta
from crane_tasks.edit import SLERP_SHARE
from crane_tasks.gradients import SETS, read_gradient
from crane_tasks.models.files.layout import Slot, layer_of_unit, unit_name
from crane_tasks.numerics.projector import protection
from crane_tasks.numerics.threshold import keep_above
from crane_tasks.projector import basis_site, read_basis
from crane_tasks.recipe import Recipe
from crane_tasks.scores import Scores, layer_sums, portions
from crane_tasks.threshold import gated, read_thresholds

STAGE = "forecast"
VERSION = 1
SCHEMA = Schema(arrays={r"reasoning|agent": ("float64",)})
Group = tuple[str, str, int]  # component, site ("" without one), expert that owns the basis


def forecast_ref(gradients: Ref, delta: Ref, threshold: Ref, projector: Ref) -> Ref:
    """The key: what the sums are made of."""
    inputs = {
        "gradients": gradients.key,
        "delta": delta.key,
        "threshold": threshold.key,
        "projector": projector.key,
    }
    return Ref(STAGE, VERSION, {}, inputs)


def build_forecast(
    ctx: Context, ref: Ref, gradients: Ref, delta: Ref, threshold: Ref, projector: Ref
) -> Built:
    """Make or find the sums; the gradients must have been kept."""
    opened = [ctx.store.open(r) for r in (gradients, delta, threshold, projector)]
    return ctx.store.build(ref, SCHEMA, lambda draft: _write(ctx, draft, *opened))


@torch.no_grad()
def _write(
    ctx: Context,
    draft: Draft,
    gradients: Artifact,
    delta: Artifact,
    threshold: Artifact,
    projector: Artifact,
) -> None:
    """Unit of work: a decoder layer. Each group's sums are a row [1 + rank]: Σ g T(δ), and
    per direction Σ (g V)(T(δ) V)."""
    base = ctx.pair().base
    groups = list(base.layers())
    for number, (layer, slots) in enumerate(groups):
        name = unit_name(layer)
        if not draft.done(name):
            found: dict[Group, Tensor] = {}
            thresholds = read_thresholds(threshold, name)
            for slot in gated(slots):
                for group, row in _slot_sums(ctx, slot, thresholds, gradients, delta, projector):
                    found[group] = _added(found.get(group), row)
            with draft.unit(name) as unit:
                width = max(row.shape[1] for row in found.values())
                rows = [torch.nn.functional.pad(r, (0, width - r.shape[1])) for r in found.values()]
                for index, key in enumerate(SETS):
                    sums = torch.stack([row[index] for row in rows]).cpu()
                    unit.write(key, sums, attributes={"groups": [list(g) for g in found]})
        ctx.progress(STAGE, number + 1, len(groups), "layers of the forecast")


def _added(before: Tensor | None, row: Tensor) -> Tensor:
    return row if before is None else before + row


def _slot_sums(
    ctx: Context,
    slot: Slot,
    thresholds: dict[str, float],
    gradients: Artifact,
    delta: Artifact,
    projector: Artifact,
) -> Iterator[tuple[Group, Tensor]]:
    """The slot's sums by group: [sets, 1 + rank] in float64, on the device."""
    base, device = ctx.pair().base, ctx.torch_device
    site = basis_site(projector, slot, (base.pieces[slot.name][0].shape or (1,))[-1])
    routed = site is not None and site.side == "routed"
    for experts in portions(base, slot):
        weight = base.read_stack(slot.name, experts).to(device)
        step = read_stacked_delta(delta, slot, weight, experts)
        numbers = range(experts.start, experts.stop)
        m = step.new_tensor([thresholds[slot.tensor_name(e)] for e in numbers])
        step = keep_above(step, m.view(-1, *[1] * (step.dim() - 1)))
        grads = [
            read_gradient(gradients, k, slot, experts if slot.stacked else None)
            .to(device)
            .reshape(step.shape)
            .float()
            for k in SETS
        ]
        for some in [slice(i, i + 1) for i in range(len(numbers))] if routed else [slice(None)]:
            own = numbers[some.start] if routed else 0
            basis = read_basis(projector, slot, site, own) if site else None
            directions = None if basis is None else basis[0].to(device)
            rows = [_row(step[some], g[some], directions) for g in grads]
            yield (slot.component, site.name if site and basis else "", own), torch.stack(rows)


def _row(step: Tensor, gradient: Tensor, directions: Tensor | None) -> Tensor:
    whole = (step * gradient).sum(dtype=torch.float64)[None]
    if directions is None:
        return whole
    along = ((step @ directions) * (gradient @ directions)).flatten(0, -2)
    return torch.cat([whole, along.sum(0, dtype=torch.float64)])


def predicted_changes(
    recipe: Recipe, forecast: Artifact, scores: Scores, gains: Artifact, projector: Artifact
) -> dict[str, float]:
    """Σ g · edit for both sets at the recipe's alpha and tau, in nats of loss.

    Before rounding. A router under slerp counts as the fraction of δ that it moves by.
    """
    found = dict.fromkeys(SETS, 0.0)
    slerped = recipe.merge.router == "slerp"
    for unit in forecast.units():
        layer = layer_of_unit(unit)
        factors = scores.per_component if layer is None else scores.per_layer[layer]
        sigmas: dict[str, Tensor] = {}  # read once, whatever number of experts has one
        for name in SETS:
            rows = forecast.read(unit, name)
            groups: list[Group] = forecast.attributes(unit, name)["groups"]
            for (component, site, own), row in zip(groups, rows, strict=True):
                if component == "router" and slerped:
                    continue
                change = float(row[0])
                if site:
                    if site not in sigmas:
                        sigmas[site] = projector.read(unit, f"{site}.sigma")
                    sigma = sigmas[site]
                    sigma = sigma[own] if sigma.dim() > 1 else sigma
                    weight = protection(sigma[sigma > 0], recipe.tau)
                    change -= float(row[1 : 1 + weight.numel()] @ weight)
                found[name] += recipe.alpha * factors[component] * change
    if slerped:
        for parts in layer_sums(gains).values():
            if "router" in parts:
                share = recipe.alpha * SLERP_SHARE
                found["reasoning"] -= share * parts["router"].s_r
                found["agent"] -= share * parts["router"].s_a
    return found


def unknown_changes() -> dict[str, float]:
    """What is reported where no gradients were kept."""
    return dict.fromkeys(SETS, math.nan)
