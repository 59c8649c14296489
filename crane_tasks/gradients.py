"""The gradients that the gate reads: g_R and g_A, kept beside the scores.

Not a stage of its own: they are taken on the way to the scores and kept if the recipe says
`store_gradients`. Their key knows the base and the two sets alone, so that the scores of
another donor with the same targets need no pass through the model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Draft, Store
from crane_tasks.context import Context
from crane_tasks.models.files.layout import Slot

STAGE = "gradients"
VERSION = 1
SETS = ("reasoning", "agent")
SCHEMA = Schema(arrays={r"(reasoning|agent)\.losses": ("float64",), r".+": ("bfloat16",)})
# A gradient is rounded once, when its set is through the layer. The gate reads the rounded
# one whether it was kept or has just been taken, so that both give the same scores.
KEPT = torch.bfloat16


def gradients_ref(ctx: Context, reasoning: Ref, agent: Ref) -> Ref:
    """The key: the base, the two sets, and the dtype of the passes."""
    inputs = {"base": ctx.base_id, "reasoning": reasoning.key, "agent": agent.key}
    return Ref(STAGE, VERSION, {"compute": ctx.compute}, inputs)


def write_gradients(
    draft: Draft,
    slots: Sequence[Slot],
    name: str,
    gradients: Mapping[str, Mapping[str, Tensor]],
    losses: Mapping[str, Tensor],
) -> None:
    """One unit: both sets' gradients of its slots, stacks as [E, out, in]; the items' losses."""
    with draft.unit(name) as unit:
        for key, found in gradients.items():
            for slot in slots:
                array = f"{key}.{slot.array_name}"
                unit.write(array, found[slot.name], stacked=slot.stacked)
        for key, values in losses.items():
            unit.write(f"{key}.losses", values)


def read_gradient(artifact: Artifact, name: str, slot: Slot, experts: slice | int | None) -> Tensor:
    """g_R (`name` "reasoning") or g_A ("agent") in bf16: a tensor, or some of a stack."""
    index = ... if experts is None else experts
    return artifact.read(slot.unit, f"{name}.{slot.array_name}", index)


def open_gradients(store: Store, ref: Ref) -> Artifact | None:
    """The kept gradients, if there are any."""
    return store.open(ref) if store.has(ref) else None
