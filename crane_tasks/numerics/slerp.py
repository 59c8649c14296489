"""Interpolation of the router between base and donor, on the sphere."""

import math

from jaxtyping import Float
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
