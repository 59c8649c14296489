"""The gradients that the gate reads: g_R and g_A, kept beside the scores.

They are taken on the way to the scores and kept if the recipe says `store_gradients`. Their
key knows the base and the two sets alone, so that the scores of another donor with the same
targets need no pass through the model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from crane_tasks.calibration.stages import AGENT, REASONING
from crane_tasks.models.files.layout import Slot
from crane_tasks.stage import BASE, Stage

SETS = ("reasoning", "agent")
# A gradient is rounded once, when its set is through the layer. The gate reads the rounded
# one whether it was kept or has just been taken, so that both give the same scores.
KEPT = torch.bfloat16

# Written by the scores' walk, or not at all.
GRADIENTS = Stage(
    name="gradients",
    version=1,
    schema=Schema(arrays={r"(reasoning|agent)\.losses": ("float64",), r".+": ("bfloat16",)}),
    inputs={"base": BASE, "reasoning": REASONING, "agent": AGENT},
    fields=("gate.compute",),
)


def write_gradients(
    draft: Draft,
    slots: Sequence[Slot],
    name: str,
    gradients: Mapping[str, Mapping[str, Tensor]],
    losses: Mapping[str, Tensor],
) -> None:
    """One unit: both sets' gradients of its slots, stacks as [E, out, in]; the items' losses."""
    with draft.unit(name) as unit:
        for key, by_slot in gradients.items():
            for slot in slots:
                array = f"{key}.{slot.array_name}"
                unit.write(array, by_slot[slot.name], stacked=slot.stacked)
        for key, values in losses.items():
            unit.write(f"{key}.losses", values)


def read_gradient(artifact: Artifact, name: str, slot: Slot, experts: slice | int | None) -> Tensor:
    """g_R (`name` "reasoning") or g_A ("agent") in bf16: a tensor, or some of a stack."""
    index = ... if experts is None else experts
    return artifact.read(slot.unit, f"{name}.{slot.array_name}", index)
