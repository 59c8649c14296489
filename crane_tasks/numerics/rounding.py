"""Stochastic rounding to bfloat16, whose random bits depend on names and positions alone."""

from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor


def seed_of(seed: int, name: str) -> int:
    """A 62-bit number that depends on the recipe's seed and the tensor's name alone."""
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _mix(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """splitmix64's finaliser on int64 lanes: a counter in, 64 well-mixed bits out."""
    # torch has no logical right shift on int64: shift, then clear the copied sign bits.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))


def round_stochastic(
    value: Float[Tensor, "*shape"], *, seed: int, offset: int = 0
) -> Float[Tensor, "*shape"]:
    """float32 to bfloat16, up or down with the probability that keeps the mean exact.

    The random bits are a hash of `seed` and the element's flat position (`offset` plus its
    index), so neither order, blocks, threads nor device change the result.
    """
    index = torch.arange(value.numel(), device=value.device, dtype=torch.int64) + offset
    noise = (_mix(index + seed) & 0xFFFF).to(torch.int32).view(value.shape)
    # bfloat16 is the upper half of a float32: adding 16 random bits to the lower half and
    # cutting it off carries into the upper half with just that probability. The sign bit
    # takes no part, as the magnitude of a finite weight never overflows into it.
    bits = value.float().contiguous().view(torch.int32) + noise
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
