"""Stochastic rounding to bfloat16, whose random bits depend on names and positions alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from crane_tasks.numerics.hashing import mixed


def round_stochastic(
    value: Float[Tensor, "*shape"], *, seed: int, offset: int = 0
) -> Float[Tensor, "*shape"]:
    """float32 to bfloat16, up or down with the probability that keeps the mean exact.

    The random bits are a hash of `seed` and the element's flat position (`offset` plus its
    index), so neither order, blocks, threads nor device change the result.
    """
    index = torch.arange(value.numel(), device=value.device, dtype=torch.int64) + offset
    noise = (mixed(index + seed) & 0xFFFF).to(torch.int32).view(value.shape)
    # bfloat16 is the upper half of a float32: adding 16 random bits to the lower half and
    # cutting it off carries into the upper half with just that probability. The sign bit
    # takes no part, as the magnitude of a finite weight never overflows into it.
    bits = value.float().contiguous().view(torch.int32) + noise
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
