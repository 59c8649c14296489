"""Small deterministic cases of every formula, whose results lie in `*.json` beside this file.

The inputs are coarse sines, not random numbers: the same on every machine and release.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from conftest import write_tokenizer
from plain_sums import edit_sums, gain_sums
from torch import Tensor, nn

from crane_tasks.apply.editor import SLERP_SHARE
from crane_tasks.apply.forecast import group_row
from crane_tasks.apply.rows import row_factors
from crane_tasks.calibration.format import format_mask
from crane_tasks.calibration.sets import TokenSet
from crane_tasks.evaluate.answers import Answers, Asked
from crane_tasks.evaluate.measure import format_positions
from crane_tasks.evaluate.metrics import METRICS, Measured, table_identity
from crane_tasks.evaluate.uncertainty import intervals_of, mean
from crane_tasks.magnitudes import absolute_sums
from crane_tasks.merge_section import LmHead, TokenRows
from crane_tasks.method import ARTIFACTS
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.walk.gradients import Accumulator
from crane_tasks.numerics.bits import decode, encode
from crane_tasks.numerics.hashing import seed_of
from crane_tasks.numerics.projector import basis_from_gram, gram, project, protection
from crane_tasks.numerics.regression import regression, relaxed
from crane_tasks.numerics.rounding import round_stochastic
from crane_tasks.numerics.scores import GainSums, normalised, pooled
from crane_tasks.numerics.slerp import slerp
from crane_tasks.numerics.stability import dealt, halves, spearman, union_gains, union_weights
from crane_tasks.numerics.threshold import keep_above, median_magnitude
from crane_tasks.scores.gradients import KEPT

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
        f"radius {radius}": format_mask(text, offsets, patterns, radius).int().tolist()
        for radius in (0, 1, 3)
    }


def delta_case() -> Numbers:
    """The stored code, and the delta it gives back."""
    base = wave(6, seed=0.1).to(torch.bfloat16)
    donor = (base.float() + wave(6, seed=0.2, scale=0.02)).to(torch.bfloat16)
    code = encode(base, donor)
    mixed = encode(base, donor.float())
    return {
        "code": code.view(torch.int16).tolist(),
        "delta": decode(base, code).tolist(),
        "delta of unlike dtypes": decode(base, mixed).tolist(),
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


def moments_case() -> Numbers:
    """The moments of two sets, and what the regression keeps of an update by them."""
    sets = [gram(wave(12, 4, seed=s) * 0.4 ** torch.arange(4)) / 12 for s in (2.1, 2.2)]
    update = wave(2, 4, seed=2.3).double()
    kept = {f"protect {m:g}": regression(*sets, m) for m in (0.3, 3.0)}
    return {
        "moments": [c.tolist() for c in sets],
        "kept": {name: (update @ m).tolist() for name, m in kept.items() if m is not None},
    }


def magnitudes_case() -> Numbers:
    """The mean absolute inputs of channels, and what AIM leaves of an update by them."""
    rows = format_rows()
    mean = (absolute_sums(rows) / rows.shape[0]).float()
    return {"mean": mean.tolist(), "relaxed": relaxed(wave(2, 6, seed=2.3), mean, 0.4).tolist()}


def apply_case() -> Numbers:
    """Protection, projection, the router's slerp, rows, rounding, and what survives it."""
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
        "rows": rows_case(),
        "seed": seed_of(0, "model.norm.weight"),
        "stochastic": bits(round_stochastic(base, seed=seed_of(7, "a.weight"), offset=1000)),
        "nearest": bits(stored),
        "edit": asdict(edit_sums(start, protected, stored, update)),
    }


def rows_case() -> Numbers:
    """By what the rows of nine added tokens move, of one plain token, and of one beyond."""
    tokenizer, named = tiny_tokenizer(), {"<think>": 0.8}
    sections = {
        "kept": LmHead(rows=named),
        "moved": TokenRows(scale=0.03, rows=named, keep_special=False),
    }
    chosen = [*range(10), len(tokenizer)]
    return {
        name: row_factors(rows, len(tokenizer) + 1, tokenizer, name)[chosen].tolist()
        for name, rows in sections.items()
    }


def tiny_tokenizer() -> Any:
    """The tests' tokenizer: three special tokens, six other added ones, then bytes."""
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return load_tokenizer(Path(folder))


def apply_share() -> float:
    """The share of alpha by which a router moves under slerp."""
    return SLERP_SHARE


def bits(values: Tensor) -> list[int]:
    """The bit patterns of bfloat16 values."""
    return list(values.flatten().view(torch.int16).tolist())


def gradients_case() -> Numbers:
    """A set's gradient over three batches, rounded once to the kept form."""
    weight = nn.Parameter(wave(3, 4, seed=4.0).to(torch.bfloat16))
    sums = Accumulator({"weight": weight})
    for batch in range(3):
        torch.autograd.backward((weight * wave(3, 4, seed=4.1 + batch, scale=1e-2)).sum())
    return {"kept": bits(sums.result(KEPT)["weight"])}


def forecast_case() -> Numbers:
    """Σ g T(δ), what of it lies along each direction, and what a projection takes of that."""
    step, gradient = wave(3, 6, seed=5.0, scale=0.02), wave(3, 6, seed=5.1, scale=1e-2)
    rows = format_rows()
    basis = basis_from_gram(gram(rows), rows.shape[0], rank=4, cutoff=1e-5)
    along = group_row(step, gradient, basis.directions)
    removed = float(along[1:] @ protection(basis.sigma, 0.03))
    return {"alone": group_row(step, gradient, None).tolist(), "along": along.tolist(),
            "removed": removed}  # fmt: skip


def measure_case() -> Numbers:
    """Which positions of a target predict a format token."""
    tokenizer = tiny_tokenizer()
    text = "<|im_start|>user\nadd<|im_end|>\n<tool_call>{}</tool_call> more<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    patterns = ["<tool_call>", "</tool_call>", "<|im_end|>"]
    found = {}
    for length in (4, 12, len(ids) - 1):
        tokens = TokenSet([torch.tensor(ids)], [length], [], [])
        found[f"target of {length}"] = format_positions(patterns, tokenizer, tokens)[0].tolist()
    return found


def evaluate_case() -> Numbers:
    """Every metric of a model with some right and some wrong answers."""
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    measured = Measured(
        {"reasoning": [0.5, 0.25], "agent": [0.25]},
        {
            "agent": Answers([call, call.replace("1", "2"), "no", call + "<think>"], [call] * 4,
                             [20, 20, 2, 21], [Asked(7)] * 4),
            "reasoning": Answers(["<think>a</think> 4", "5", "<think>b"], ["4", "4", "b"],
                                 [8, 2, 3], [Asked(5)] * 3),
        },
        0.125,
    )  # fmt: skip
    return {
        metric.name: [mean(each), *(intervals_of({metric.name: each}).get(metric.name, ()))]
        for metric in METRICS
        if (each := metric.each(measured))
    }


def stability_case() -> Numbers:
    """The dealing, the gains of unions of groups, and the correlation of two rankings."""
    groups = dealt(10, 4, 1, "reasoning")
    masks = {name: halves(4, 3, 1, name) for name in ("reasoning", "agent")}
    sizes = [len(group) for group in groups]
    weights = [union_weights(mask, sizes) for mask in masks.values()]
    grads = [[wave(40, seed=s + k, scale=1e-2) for k in range(4)] for s in (7.0, 7.5)]
    gains = union_gains(wave(40, seed=6.9, scale=0.1), *grads, *weights)
    return {
        "groups": groups,
        "halves": {name: mask.int().tolist() for name, mask in masks.items()},
        "gains": gains.tolist(),
        "spearman": spearman(wave(9, seed=8.0), wave(9, seed=8.3)),
        "spearman with ties": spearman((3 * wave(9, seed=8.0)).round(), wave(9, seed=8.3)),
    }


def version_of(name: str) -> Any:
    """What the keys of a stage carry of its formulas' versions."""
    versions = {stage.version for stage in ARTIFACTS if stage.name == name}
    assert len(versions) == 1, f"{name}: stages of one name have one version"
    # The metrics have versions of their own.
    return [*versions, *table_identity()] if name == "evaluate" else versions.pop()


CASES: dict[str, Callable[[], Numbers]] = {
    "calibration": calibration_case,
    "delta": delta_case,
    "threshold": threshold_case,
    "gradients": gradients_case,
    "scores": scores_case,
    "projector": projector_case,
    "moments": moments_case,
    "magnitudes": magnitudes_case,
    "forecast": forecast_case,
    "apply": apply_case,
    "stability": stability_case,
    "measure": measure_case,
    "evaluate": evaluate_case,
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
