"""The difference of two tensors in the bits of their dtype, from which either gives the other."""

import torch
from jaxtyping import Shaped
from torch import Tensor

_SIGNED = {2: torch.int16, 4: torch.int32}
_UNSIGNED = {2: torch.uint16, 4: torch.uint32}


def encode(base: Shaped[Tensor, "..."], donor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The stored form: bits of donor minus bits of base, wrapping; or float32 delta.

    Of unlike dtypes the float32 delta itself is kept.
    """
    if base.dtype != donor.dtype:
        return donor.float() - base.float()
    signed, unsigned = _SIGNED[base.element_size()], _UNSIGNED[base.element_size()]
    return (donor.view(signed) - base.view(signed)).view(unsigned)


def decode(
    base: Shaped[Tensor, "..."], code: Shaped[Tensor, "..."], *, wide: Tensor | None = None
) -> Shaped[Tensor, "..."]:
    """The float32 delta from a base tensor and its stored form, new memory.

    `wide` is the base in float32, where the caller has it already.
    """
    if code.dtype == torch.float32:
        return code.clone()
    signed = _SIGNED[base.element_size()]
    donor = (base.view(signed) + code.view(signed)).view(base.dtype)
    return donor.float() - (base.float() if wide is None else wide)
