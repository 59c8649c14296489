"""Small deterministic cases of every formula, whose results lie in `*.json` beside this file.

The inputs are coarse sines, not random numbers: the same on every machine and release.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from plain_sums import edit_sums, gain_sums
from torch import Tensor

from crane_tasks import apply, calibration, delta, projector, scores, threshold
from crane_tasks.numerics.projector import basis_from_gram, gram, project, protection
from crane_tasks.numerics.rounding import round_stochastic, seed_of
from crane_tasks.numerics.scores import GainSums, normalised, pooled
from crane_tasks.numerics.slerp import slerp
from crane_tasks.numerics.threshold import keep_above, median_magnitude

Numbers = dict[str, Any]


def wave(*shape: int, seed: float, scale: float = 1.0) -> Tensor:
    """Well spread numbers in [-scale, scale], float32, cut to ten binary digits."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    waves = torch.sin(steps * steps * 0.37 + seed)
    return (scale * (waves * 1024).round() / 1024).float().view(shape)


def calibration_case() -> Numbers:
    """Which tokens are taken: those on or near a format pattern."""
    text = "<|im_start|>user\nadd<|im_end|>\n<tool_call>{}</tool_call> and more words"
    offsets = [(i, min(i + 3, len(text))) for i in range(0, len(text), 3)]
    patterns = ["<tool_call>", "</tool_call>", "<|im_end|>"]
    return {
        f"radius {radius}": calibration.format_mask(text, offsets, patterns, radius).int().tolist()
        for radius in (0, 1, 3)
    }


def delta_case() -> Numbers:
    """The stored code, and the delta it gives back."""
    base = wave(6, seed=0.1).to(torch.bfloat16)
    donor = (base.float() + wave(6, seed=0.2, scale=0.02)).to(torch.bfloat16)
    code = delta.encode(base, donor)
    mixed = delta.encode(base, donor.float())
    return {
        "code": code.view(torch.int16).tolist(),
        "delta": delta.decode(base, code).tolist(),
        "delta of unlike dtypes": delta.decode(base, mixed).tolist(),
    }


def threshold_case() -> Numbers:
    """m and T(δ) for an even and an odd number of entries, and with ties."""
    deltas = {
        "even": wave(8, seed=0.3),
        "odd": wave(9, seed=0.4),
        "ties": torch.tensor([1.0, -2.0, 2.0, 2.0, -3.0, 0.5, 2.0]),
        "one": torch.tensor([0.25]),
    }
    return {
        name: {
            "median": float(median_magnitude(values)),
            "kept": keep_above(values, median_magnitude(values)).tolist(),
        }
        for name, values in deltas.items()
    }


def gate_sums() -> dict[int, dict[str, GainSums]]:
    """The gate's sums of two layers with three components."""
    found: dict[int, dict[str, GainSums]] = {}
    for layer in range(2):
        found[layer] = {}
        for number, component in enumerate(("attention", "ffn", "norm")):
            seed = 1.0 + layer + 0.2 * number
            gradients = (wave(4, 5, seed=seed + s, scale=1e-2) for s in (2.4, 2.9))
            base, change = wave(4, 5, seed=seed), wave(4, 5, seed=seed + 0.3, scale=0.1)
            found[layer][component] = gain_sums(base, change, *gradients)
    return found


def scores_case() -> Numbers:
    """Sums per tensor, S per layer, and S over all layers."""
    sums = gate_sums()
    return {
        "sums": {str(i): {c: asdict(s) for c, s in row.items()} for i, row in sums.items()},
        "per layer": {str(i): normalised(row, "ffn", f"layer {i}") for i, row in sums.items()},
        "per component": normalised(pooled(sums.values()), "ffn", "all layers"),
    }


def format_rows() -> Tensor:
    """Activations [12, 6] whose directions decay fast enough to be told apart."""
    return wave(12, 6, seed=2.0) * 0.4 ** torch.arange(6)


def projector_case() -> Numbers:
    """σ and V; of V its projector, as the sign of a direction is free."""
    rows = format_rows()
    found: Numbers = {}
    for rank, cutoff in ((256, 1e-5), (3, 1e-5), (256, 0.1)):
        basis = basis_from_gram(gram(rows), rows.shape[0], rank=rank, cutoff=cutoff)
        wide = basis.directions.double()
        found[f"rank {rank} cutoff {cutoff:g}"] = {
            "sigma": basis.sigma.tolist(),
            "projector": (wide @ wide.T).tolist(),
            "rows": basis.rows,
        }
    return found


def apply_case() -> Numbers:
    """Protection, projection, the router's slerp, rounding, and what survives it."""
    rows = format_rows()
    basis = basis_from_gram(gram(rows), rows.shape[0], rank=4, cutoff=1e-5)
    base, donor = wave(3, 6, seed=3.0), wave(3, 6, seed=3.1)
    update = wave(3, 6, seed=3.2, scale=0.02)
    protected = project(update, basis.directions, protection(basis.sigma, 0.03).float())
    stored = (base + protected).to(torch.bfloat16)
    start = base.to(torch.bfloat16)
    return {
        "protection": {
            f"tau {tau}": protection(basis.sigma, tau).tolist() for tau in (0.003, 0.03, 0.3)
        },
        "projected": protected.tolist(),
        "slerp": slerp(base, donor, 0.5 * apply_share()).tolist(),
        "slerp of the nearly parallel": slerp(base, base + 0.01 * donor, 0.5).tolist(),
        "seed": seed_of(0, "model.norm.weight"),
        "stochastic": bits(round_stochastic(base, seed=seed_of(7, "a.weight"), offset=1000)),
        "nearest": bits(stored),
        "edit": asdict(edit_sums(start, protected, stored, update)),
    }


def apply_share() -> float:
    """The share of alpha by which a router moves under slerp."""
    from crane_tasks.edit import SLERP_SHARE

    return SLERP_SHARE


def bits(values: Tensor) -> list[int]:
    """The bit patterns of bfloat16 values."""
    return list(values.flatten().view(torch.int16).tolist())


# stage -> (the VERSION that its keys carry, its case)
CASES: dict[str, tuple[int, Callable[[], Numbers]]] = {
    "calibration": (calibration.VERSION, calibration_case),
    "delta": (delta.VERSION, delta_case),
    "threshold": (threshold.VERSION, threshold_case),
    "scores": (scores.VERSION, scores_case),
    "projector": (projector.VERSION, projector_case),
    "apply": (apply.VERSION, apply_case),
}


def differences(found: Any, wanted: Any, place: str = "") -> list[str]:
    """Where two results differ by more than other processors' rounding; integers not at all."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        names = list(wanted | found)
        missing = [f"{place}/{n}" for n in names if n not in found or n not in wanted]
        return missing + [
            d for n in names if n in found and n in wanted
            for d in differences(found[n], wanted[n], f"{place}/{n}")
        ]  # fmt: skip
    if isinstance(wanted, list) and isinstance(found, list):
        if len(found) != len(wanted):
            return [f"{place}: {len(found)} entries, not {len(wanted)}"]
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{place}/{i}")]
    if isinstance(wanted, float) and isinstance(found, float):
        close = abs(found - wanted) <= 1e-7 + 1e-5 * abs(wanted)
        return [] if close else [f"{place}: {found!r}, not {wanted!r}"]
    return [] if found == wanted else [f"{place}: {found!r}, not {wanted!r}"]
