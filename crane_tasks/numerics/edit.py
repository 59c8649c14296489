"""What survives of an edit when its result is stored."""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor


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
        products = [torch.dot(e, e), torch.dot(r, r), torch.dot(e, r), r.ne_(0).sum()]
        return torch.stack([x.double() for x in products])[None]
    columns = [
        wanted.square().sum(1),
        realised.square().sum(1),
        (wanted * realised).sum(1),
        realised.count_nonzero(dim=1),
    ]
    return torch.stack([c.double() for c in columns], dim=1)
