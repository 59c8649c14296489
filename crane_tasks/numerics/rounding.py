"""Stochastic rounding, whose random bits depend on names and positions alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crane_tasks.numerics.hashing import mixed

ROUNDED = (torch.bfloat16, torch.float16)


def round_stochastic(
    value: Float[Tensor, "*shape"],
    *,
    seed: int,
    offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "*shape"]:
    """float32 to bfloat16 or float16, up or down with the probability that keeps the mean exact.

    The random bits are a hash of `seed` and the element's flat position (`offset` plus its
    index), so neither order, blocks, threads nor device change the result.
    """
    index = torch.arange(value.numel(), device=value.device, dtype=torch.int64) + offset
    noise = (mixed(index + seed) & 0xFFFF).to(torch.int32).view(value.shape)
    if dtype == torch.float16:
        return _half(value.float(), noise)
    # bfloat16 is the upper half of a float32: adding 16 random bits to the lower half and
    # cutting it off carries into the upper half with just that probability. The sign bit
    # takes no part, as the magnitude of a finite weight never overflows into it.
    bits = value.float().contiguous().view(torch.int32) + noise
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


def _half(value: Float[Tensor, "*shape"], noise: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """To one of the two float16 around each value. Their steps are unlike where it is subnormal,
    so the share of the step is taken, not bits. Infinite where the nearest is."""
    magnitude = value.abs()
    near = magnitude.to(torch.float16)
    below = near.view(torch.int16) - (near.float() > magnitude).to(torch.int16)
    low, high = (bits.view(torch.float16).float() for bits in (below, below + 1))
    up = noise < (magnitude - low) / (high - low) * 2**16
    found = torch.where(up, below + 1, below).to(torch.int16).view(torch.float16)
    return torch.where(near.isinf(), near, found).copysign(value.to(torch.float16))
