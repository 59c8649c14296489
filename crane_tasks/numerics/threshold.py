"""T, the median magnitude threshold (docs/method.md, "T").

T(δ)_i = 2 δ_i  if |δ_i| > m  else 0,   m = the k-th smallest |δ|, k = max(1, n // 2)
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crane_tasks.numerics.hashing import mixed

THRESHOLD_SUMS = ["threshold", "kept", "numel", "norm", "delta_norm"]
BLOCK = 2**18  # weights whose passes stay in a core's cache


def median_magnitude(delta: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The k-th smallest |δ| with k = max(1, n // 2), exact for any n; dtype of `delta`.

    Not `torch.median`, which takes the (n + 1) // 2-th and so differs for odd n. Of an
    empty tensor it is 0, which keeps all of nothing.
    """
    magnitude = delta.abs().flatten()
    if magnitude.numel() == 0:
        return delta.new_zeros(())
    k = max(1, magnitude.numel() // 2)
    if magnitude.dtype == torch.float32 and magnitude.device.type == "cpu":
        # Non-negative floats order like their bit patterns, and numpy's introselect on
        # integers needs neither a full sort nor torch.kthvalue's index bookkeeping.
        bits = magnitude.view(torch.int32).numpy()
        bits.partition(k - 1)
        return torch.tensor(int(bits[k - 1]), dtype=torch.int32).view(torch.float32)
    return torch.kthvalue(magnitude, k).values


def top_magnitude(delta: Float[Tensor, "..."], density: float) -> Float[Tensor, ""]:
    """The m above which about a share `density` of the |δ| lies: the k-th smallest with
    k = n - round(density · n), exact; 0, which keeps all that is not 0, if that is none."""
    magnitude = delta.abs().flatten()
    k = magnitude.numel() - round(density * magnitude.numel())
    if k < 1:
        return delta.new_zeros(())
    return torch.kthvalue(magnitude, k).values


def keep_above(
    delta: Float[Tensor, "..."], threshold: Float[Tensor, "..."] | float, scale: float = 2.0
) -> Float[Tensor, "..."]:
    """T(δ) for a known m: entries with |δ| > m times `scale`, the others 0; shape and dtype of δ.

    A tensor of several m is broadcast over δ, e.g. [n, 1, 1] over a stack [n, out, in].
    """
    # Strictly greater: with >=, a constant delta would be doubled instead of dropped.
    if isinstance(threshold, float):
        # One vectorised pass; a comparison and `where` take twelve times as long on a CPU.
        return torch.nn.functional.hardshrink(delta, threshold).mul_(scale)
    return torch.where(delta.abs() > threshold, delta * scale, torch.zeros_like(delta))


def threshold_sums(delta: Float[Tensor, "..."], density: float | None = None) -> list[float]:
    """`THRESHOLD_SUMS` of one tensor: m; of T(δ) the number of entries, and its norm; of δ both.

    Args:
        density: the share that T keeps; by default the half above `median_magnitude`.
    """
    m = float(median_magnitude(delta) if density is None else top_magnitude(delta, density))
    scale = 2.0 if density is None else 1.0 / density
    kept, kept2, delta2 = 0, 0.0, 0.0
    for block in torch.split(delta.flatten(), BLOCK):
        above = keep_above(block, m, scale)
        # Several times as fast as torch's own on a CPU.
        kept += int(np.count_nonzero(above.cpu().numpy()))
        kept2 += float(above.square().sum())
        delta2 += float(block.square().sum())
    return [m, float(kept), float(delta.numel()), math.sqrt(kept2), math.sqrt(delta2)]


def stacked_threshold_sums(delta: Float[Tensor, "n m"]) -> Float[Tensor, "n 5"]:
    """`THRESHOLD_SUMS` at the median of each row, float64 on the rows' device.

    The medians are those of `median_magnitude` to the bit, the norms but for rounding.
    """
    count = delta.shape[1]
    magnitude = delta.abs()
    m = magnitude.kthvalue(max(1, count // 2), dim=1).values if count else magnitude.sum(1)
    above = magnitude > m[:, None]
    del magnitude
    squares = delta.square()
    delta2 = squares.sum(1, dtype=torch.float64)
    kept2 = 4.0 * squares.mul_(above).sum(1, dtype=torch.float64)
    kept = above.sum(1, dtype=torch.float64)
    columns = [m.double(), kept, torch.full_like(kept, count), kept2.sqrt(), delta2.sqrt()]
    return torch.stack(columns, dim=1)


def drop_at_random(
    delta: Float[Tensor, "..."], density: float, *, seed: int, offset: int = 0
) -> Float[Tensor, "..."]:
    """DARE (arXiv 2311.03099): each entry with probability `density` times 1 / density, else 0.

    Which ones is a hash of `seed` and the flat position (`offset` plus the index), so neither
    order, blocks, threads nor device change it.
    """
    index = torch.arange(delta.numel(), device=delta.device, dtype=torch.int64) + offset
    chance = (mixed(index + seed) & 0xFFFFFF).to(torch.float32).view(delta.shape) / 2.0**24
    return torch.where(chance < density, delta / density, torch.zeros_like(delta))


def keep_agreed(
    delta: Float[Tensor, "..."], grad_r: Float[Tensor, "..."], grad_a: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """The entries along which both sets' losses fall: min(-g_R δ, -g_A δ) > 0; the others 0."""
    agreed = torch.maximum(grad_r * delta, grad_a * delta) < 0
    return torch.where(agreed, delta, torch.zeros_like(delta))
