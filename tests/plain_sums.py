"""The sums of one tensor, by the stacked ones that the stages take."""

import torch
from torch import Tensor

from crane_tasks.numerics.edit import EditSums, stacked_edit_sums
from crane_tasks.numerics.scores import GainSums, stacked_gain_sums


def gain_sums(
    base: Tensor,
    delta: Tensor,
    grad_r: Tensor,
    grad_a: Tensor,
) -> GainSums:
    """The sums of one tensor."""
    rows = stacked_gain_sums(base[None], delta[None], grad_r[None], grad_a[None])
    return GainSums(*rows[0].tolist())


def edit_sums(
    base: Tensor,
    intended: Tensor,
    stored: Tensor,
    delta: Tensor,
) -> EditSums:
    """All sums of one tensor."""
    stacked = stacked_edit_sums(base[None], intended[None], stored[None])[0].tolist()

    def square(x: Tensor) -> float:
        return float(x.float().square().sum(dtype=torch.float64))

    intended2, realised2, dot, changed = stacked
    return EditSums(
        intended2, realised2, dot, square(delta), square(base), changed, float(base.numel())
    )
