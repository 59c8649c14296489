"""Random bits that depend on a seed, a tensor's name and a position alone."""

from hashlib import blake2b

from jaxtyping import Int
from torch import Tensor


def seed_of(seed: int, name: str) -> int:
    """A 62-bit number that depends on the recipe's seed and the tensor's name alone."""
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """splitmix64's finaliser on int64 lanes: a counter in, 64 well-mixed bits out."""
    # torch has no logical right shift on int64: shift, then clear the copied sign bits.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
