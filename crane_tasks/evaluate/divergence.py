"""How far models are from the base where it must emit a format token."""

from collections.abc import Mapping
from functools import cache, partial

import torch
from torch import Tensor

from artifacts.memo import DigestMemo
from artifacts.store import Artifact
from crane_tasks.evaluate.models import Model
from crane_tasks.session import Context

POSITION_BLOCK = 64
KEPT_BYTES = 2**28  # of the base's log-probabilities


@torch.no_grad()
def divergences(
    ctx: Context, models: Mapping[str, Model], opened: Mapping[str, Artifact]
) -> dict[str, float]:
    """Mean KL(base ‖ model) of the next token where the agent targets have format tokens."""
    if not opened["base"].has("agent", "format_states"):
        return dict.fromkeys(models, float("nan"))
    states = {name: artifact.read("agent", "format_states") for name, artifact in opened.items()}
    count, kept = states["base"].shape[0], ctx.session.kept
    if not count:
        return dict.fromkeys(models, float("nan"))
    base = opened["base"].path

    def probabilities(name: str) -> list[Tensor]:
        return _log_probabilities(ctx, models[name], states[name])

    @cache
    def reference() -> list[Tensor]:
        # Of a sweep's points the base is the same one; of a large vocabulary it is made anew.
        few = 4 * count * int(ctx.pair().base.config["vocab_size"]) <= KEPT_BYTES
        own = partial(probabilities, "base")
        return kept.one("probabilities of the base", base, own) if few else own()

    def divergence(name: str) -> float:
        total = 0.0
        for ours, other in map(_over_common, reference(), probabilities(name)):
            total += float((ours.exp() * (ours - other)).sum(dtype=torch.float64))
        # Rounding can leave the KL of equal distributions a hair below zero; NaN stays NaN.
        value = total / count
        return 0.0 if value < 0.0 else value

    return {
        name: divergence(name)
        if model.edit is not None
        else kept.one(f"divergence of {name}", (base, opened[name].path), partial(divergence, name))
        for name, model in models.items()
    }


def _over_common(base: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both over the rows of the vocabulary that both models have."""
    rows = min(base.shape[1], other.shape[1])
    if base.shape == other.shape:
        return base, other
    return base[:, :rows].log_softmax(-1), other[:, :rows].log_softmax(-1)


def _log_probabilities(ctx: Context, model: Model, states: Tensor) -> list[Tensor]:
    """Log-probabilities of the next token from last-layer states [n, d], in blocks."""
    blocks = []
    memo = DigestMemo(ctx.store.root)
    with model.proven(memo), model.stream(ctx) as stream, stream.head():
        for block in torch.split(states, POSITION_BLOCK):
            hidden = block[None].to(device=ctx.torch_device, dtype=ctx.compute_dtype)
            positions = torch.arange(block.shape[0], device=ctx.torch_device)
            blocks.append(stream.logits(hidden, positions).float().log_softmax(-1).cpu())
    return blocks
