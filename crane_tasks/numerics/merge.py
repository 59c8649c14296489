"""Edits to weights: interpolation of the router, rounding, and what survives it."""

import math
from dataclasses import dataclass, fields
from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Above this cosine the two vectors are parallel for slerp, whose sin(Ω) would vanish.
SLERP_PARALLEL = 0.9995


def slerp(
    base: Float[Tensor, "*shape"], donor: Float[Tensor, "*shape"], t: float
) -> Float[Tensor, "*shape"]:
    """Spherical interpolation from base (t = 0) to donor (t = 1), each a flat vector.

    sin((1-t)Ω)/sin Ω · base + sin(tΩ)/sin Ω · donor with cos Ω the cosine of the two;
    linear when that exceeds 0.9995. Computed in float64, returned in the dtype of `base`.
    """
    a, b = base.double(), donor.double()
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if float(norms) > 0 else 1.0
    if cosine > SLERP_PARALLEL:
        mixed = a + t * (b - a)
    else:
        omega = math.acos(max(-1.0, cosine))
        mixed = (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)
    return mixed.to(base.dtype)


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


@dataclass(frozen=True)
class EditSums:
    """Additive sums from which norms and cosines of an edit follow; float64 each.

    Attributes:
        intended2, realised2, dot: Σ e², Σ r² and Σ e r of the intended edit e = θ - θ_base
            and the realised r = round(θ) - θ_base.
        delta2, base2: Σ δ² and Σ θ_base².
        changed, numel: coordinates whose stored value changed, and all of them.
    """

    intended2: float = 0.0
    realised2: float = 0.0
    dot: float = 0.0
    delta2: float = 0.0
    base2: float = 0.0
    changed: float = 0.0
    numel: float = 0.0

    def __add__(self, other: "EditSums") -> "EditSums":
        return EditSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def survived(self) -> float:
        """Norm of the realised edit over that of the intended; 1 where none was intended."""
        return math.sqrt(self.realised2 / self.intended2) if self.intended2 > 0 else 1.0

    @property
    def cosine(self) -> float:
        """Cosine of the realised and the intended edit; 0 when rounding erased all of it."""
        if self.intended2 == 0:
            return 1.0
        norms = math.sqrt(self.intended2) * math.sqrt(self.realised2)
        return self.dot / norms if norms > 0 else 0.0


def stacked_edit_sums(
    base: Float[Tensor, "n ..."],
    intended: Float[Tensor, "n ..."],
    stored: Float[Tensor, "n ..."],
) -> Float[Tensor, "n 4"]:
    """intended2, realised2, dot and changed of n tensors (or blocks of them), a row each.

    `intended` is the edit in float32, `stored` the rounded result. Products in float32,
    added up in it within a row and returned in float64; on the inputs' device.
    """
    count = base.shape[0]
    wanted = intended.reshape(count, -1)
    # Not in place: of a float32 tensor `float` gives the tensor itself.
    realised = (stored.float() - base).reshape(count, -1)
    if count == 1 and base.device.type == "cpu":
        # BLAS makes a product and its sum in one pass.
        e, r = wanted[0], realised[0]
        found = [torch.dot(e, e), torch.dot(r, r), torch.dot(e, r), r.ne_(0).sum()]
        return torch.stack([x.double() for x in found])[None]
    columns = [
        wanted.square().sum(1),
        realised.square().sum(1),
        (wanted * realised).sum(1),
        realised.count_nonzero(dim=1),
    ]
    return torch.stack([c.double() for c in columns], dim=1)


def edit_sums(
    base: Float[Tensor, "*shape"],
    intended: Float[Tensor, "*shape"],
    stored: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
) -> EditSums:
    """All sums of one tensor."""
    found = stacked_edit_sums(base[None], intended[None], stored[None])[0].tolist()

    def square(x: Tensor) -> float:
        return float(x.float().square().sum(dtype=torch.float64))

    intended2, realised2, dot, changed = found
    return EditSums(
        intended2, realised2, dot, square(delta), square(base), changed, float(base.numel())
    )
