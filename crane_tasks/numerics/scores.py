"""S, the Conservative Taylor Gate (docs/method.md, "S").

Per coordinate `s_K = -g_K δ` is the first-order gain of moving along the delta for
calibration set K, and `p = max(0, min(s_R, s_A))` what both sets agree on. Per component c
and layer l

    S_raw(c, l) = Σ p / sqrt(Σ θ_base²),     S(c, l) = S_raw(c, l) / S_raw(baseline, l)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

# Coordinates worked on at once: on a CPU few enough to stay in its cache, on a GPU enough to
# fill it.
BLOCK = {"cpu": 2**17, "cuda": 2**25}


@dataclass(frozen=True)
class GainSums:
    """Additive sums over the coordinates of one or more tensors; float64 each.

    Attributes:
        p: Σ max(0, min(s_R, s_A)), in nats of loss.
        s_r, s_a: Σ s_R and Σ s_A: minus the first-order change of each set's loss.
        s_r2, s_a2: Σ s_R² and Σ s_A².
        base2, delta2: Σ θ_base² and Σ δ².
        numel: number of coordinates.
    """

    p: float = 0.0
    s_r: float = 0.0
    s_a: float = 0.0
    s_r2: float = 0.0
    s_a2: float = 0.0
    base2: float = 0.0
    delta2: float = 0.0
    numel: float = 0.0

    def __add__(self, other: "GainSums") -> "GainSums":
        return GainSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(GainSums)))


def stacked_gain_sums(
    base: Float[Tensor, "n ..."],
    delta: Float[Tensor, "n ..."],
    grad_r: Float[Tensor, "n ..."],
    grad_a: Float[Tensor, "n ..."],
) -> Float[Tensor, "n 8"]:
    """The sums of n tensors of one shape, a row each in the order of `GainSums`; float64.

    Products in float32 (or wider), added up in it within blocks and in float64 across
    them; on the inputs' device.
    """
    count, device = base.shape[0], base.device
    flat = [x.reshape(count, -1) for x in (base, delta, grad_r, grad_a)]
    numel = flat[0].shape[1]
    sums = torch.zeros(count, 7, dtype=torch.float64, device=device)
    width = max(1, BLOCK[device.type] // count)
    for first in range(0, numel, width):
        sums += _block_sums(*(x[:, first : first + width] for x in flat))
    return torch.cat([sums, torch.full_like(sums[:, :1], numel)], dim=1)


def _block_sums(base: Tensor, delta: Tensor, grad_r: Tensor, grad_a: Tensor) -> Tensor:
    """All sums but the count, for [n, width] coordinates."""
    step = delta.to(torch.promote_types(delta.dtype, torch.float32))
    # s_K = -g_K δ. The signs are put to the sums, which spares a pass over the weights:
    # Σ max(0, min(-a, -b)) = -Σ min(0, max(a, b)).
    a, b = grad_r * step, grad_a * step
    columns = [
        -torch.maximum(a, b).clamp_max_(0).sum(1),
        -a.sum(1),
        -b.sum(1),
        a.square_().sum(1),
        b.square_().sum(1),
        base.to(step.dtype).square().sum(1),
        step.square().sum(1),
    ]
    return torch.stack(columns, dim=1).double()


def raw_score(sums: GainSums) -> float:
    """S_raw = Σ p / sqrt(Σ θ_base²); 0 for a component whose base is all zeros."""
    return sums.p / math.sqrt(sums.base2) if sums.base2 > 0 else 0.0


class NoGain(ValueError):
    """The baseline component has no positive gain, so nothing can be divided by it."""

    def __init__(self, baseline: str, place: str) -> None:
        super().__init__(f"{place}: baseline '{baseline}' has no positive gain")
        self.baseline = baseline
        self.place = place


def normalised(sums: Mapping[str, GainSums], baseline: str, place: str) -> dict[str, float]:
    """S(c) = S_raw(c) / S_raw(baseline) for the components of one layer, or of all layers.

    Raises:
        NoGain: the baseline is absent or its gain is not positive.
    """
    reference = raw_score(sums[baseline]) if baseline in sums else 0.0
    # A baseline of 1e-12 would inflate every score a trillionfold: refuse, never clamp.
    if not reference > 0 or not math.isfinite(reference):
        raise NoGain(baseline, place)
    return {component: raw_score(s) / reference for component, s in sums.items()}


def refined(score: float, parts: Sequence[GainSums]) -> list[float]:
    """S of the parts that a component of score S is made of, in the proportions of their S_raw.

    Scaled so that the scored delta is as long as it was: Σ_j S_j² Σ δ_j² = S² Σ δ². Of one part
    it is S.
    """
    raw = [raw_score(part) for part in parts]
    whole = sum(part.delta2 for part in parts)
    weighted = sum(r * r * part.delta2 for r, part in zip(raw, parts, strict=True))
    if not weighted > 0:  # no part that moves gains anything: S is 0 already
        return [score] * len(parts)
    return [score * r * math.sqrt(whole / weighted) for r in raw]


def pooled(parts: Iterable[Mapping[str, GainSums]]) -> dict[str, GainSums]:
    """Component by component the sum over several layers."""
    total: dict[str, GainSums] = {}
    for part in parts:
        for component, sums in part.items():
            total[component] = total.get(component, GainSums()) + sums
    return total
