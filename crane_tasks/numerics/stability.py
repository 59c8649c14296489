"""How alike the scores of two halves of the items are: the dealing, the sums, the correlation.

Items are dealt into groups once, and a gradient is taken per group. A union of groups has the
gradient of the mean over its items,

    g_U = Σ_k n_k g_k / Σ_k n_k        over its groups k of n_k items,

so that any number of unions costs no further pass (docs/method.md, "How steady S is").
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crane_tasks.numerics.hashing import seed_of

# Products of unions and coordinates held at once, as `BLOCK` of the scores, for all unions.
BLOCK = {"cpu": 2**18, "cuda": 2**26}


def dealt(count: int, groups: int, seed: int, name: str) -> list[list[int]]:
    """The items 0 to count - 1 in groups whose sizes differ by at most one, by seed and name."""
    order = _shuffled(count, seed, f"{name}.item")
    return [sorted(order[k::groups]) for k in range(groups)]


def halves(groups: int, draws: int, seed: int, name: str) -> Bool[Tensor, "unions groups"]:
    """Which groups each union has: row 0 all, then per draw a half of them and the other half."""
    masks = torch.ones(1 + 2 * draws, groups, dtype=torch.bool)
    for draw in range(draws):
        chosen = _shuffled(groups, seed, f"{name}.draw.{draw}")[: groups // 2]
        masks[1 + 2 * draw] = torch.isin(torch.arange(groups), torch.tensor(chosen))
        masks[2 + 2 * draw] = ~masks[1 + 2 * draw]
    return masks


def _shuffled(count: int, seed: int, name: str) -> list[int]:
    """0 to count - 1 in an order that is the same on every machine."""
    return sorted(range(count), key=lambda i: seed_of(seed, f"{name}.{i}"))


def union_weights(
    masks: Bool[Tensor, "unions groups"], sizes: Sequence[int]
) -> Float[Tensor, "unions groups"]:
    """Each group's share in the mean over a union's items; rows sum to 1, float32."""
    counts = masks.double() * torch.tensor(sizes, dtype=torch.float64)
    return (counts / counts.sum(1, keepdim=True)).float()


def union_gains(
    delta: Float[Tensor, " n"],
    grads_r: Sequence[Float[Tensor, " n"]],
    grads_a: Sequence[Float[Tensor, " n"]],
    weights_r: Float[Tensor, "unions groups"],
    weights_a: Float[Tensor, "unions groups"],
) -> Float[Tensor, " unions"]:
    """Σ max(0, min(s_R, s_A)) of every union over n coordinates, in nats; float64.

    `grads_*` are a tensor per group, of any float dtype. Products in float32, added up in it
    within blocks and in float64 across them; on the inputs' device.
    """
    unions, device = weights_r.shape[0], delta.device
    gains = torch.zeros(unions, dtype=torch.float64, device=device)
    width = max(1, BLOCK[device.type] // unions)
    for first in range(0, delta.numel(), width):
        block = slice(first, first + width)
        step = delta[block].float()
        a, b = (
            weights @ (torch.stack([g[block] for g in grads]).float() * step)
            for weights, grads in ((weights_r, grads_r), (weights_a, grads_a))
        )
        # s_K = -g_K δ, with the signs put to the sum: see `scores._block_sums`.
        gains -= torch.maximum(a, b).clamp_max_(0).sum(1).double()
    return gains


def ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 for the least to n for the largest; equal values share the mean of their ranks."""
    less = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return less + (equal + 1).double() / 2


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, in [-1, 1]; NaN if either is constant (or has one value)."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    norm = float((x @ x) * (y @ y))
    return max(-1.0, min(1.0, float(x @ y) / math.sqrt(norm))) if norm > 0 else math.nan
