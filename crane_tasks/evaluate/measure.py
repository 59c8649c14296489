"""One model's measurements: losses on every set, and answers to the held-out prompts.

Each model is measured once and kept under its content, so a sweep measures base and donor
never again.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from artifacts.memo import DigestMemo
from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from crane_tasks.calibration.format import format_mask
from crane_tasks.calibration.sets import TokenSet, offsets_of, read_set
from crane_tasks.calibration.stages import AGENT, HELDOUT_AGENT, HELDOUT_REASONING, REASONING
from crane_tasks.edit import edit_of
from crane_tasks.evaluate.models import Model
from crane_tasks.models.decoding.greedy import decode_by_draws, decode_greedily
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.walk.losses import SetLosses, losses_of_sets
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.recipe import Recipe, Sampling, field_of
from crane_tasks.rendering import own_ends
from crane_tasks.session import Context
from crane_tasks.stage import TOKENIZER, Keys, Stage

HELDOUT = {"reasoning": HELDOUT_REASONING, "agent": HELDOUT_AGENT}
# On the calibration sets the gate's prediction is made.
SETS = {"calibration_reasoning": REASONING, "calibration_agent": AGENT, **HELDOUT}
GENERATE_BATCH = 32
NAME = "evaluate"  # whose work a person sees


def unmeasured(recipe: Recipe) -> Collection[str]:
    """The names of the sets that a recipe does not have, or has no use for."""
    absent = {name for name in HELDOUT if getattr(recipe.evaluate, name) is None}
    if edit_of(recipe).gate is None:
        absent |= {"calibration_reasoning", "calibration_agent"}
    return absent


def measure_config(ctx: Context) -> Mapping[str, Any]:
    """What decides measurements besides the model and the sets."""
    settings = ctx.recipe.evaluate
    return {
        "compute": ctx.compute,
        "generate": settings.generate,
        "max_new_tokens": settings.max_new_tokens if settings.generate else 0,
        "patterns": list(patterns_of(ctx)),
    } | ({"sampling": field_of(ctx.recipe, "evaluate.sampling")} if _draws(ctx) else {})


def _draws(ctx: Context) -> bool:
    settings = ctx.recipe.evaluate
    return bool(settings.generate) and settings.sampling is not None


def samples_of(recipe: Recipe) -> int:
    """How many answers each prompt gets."""
    sampling = recipe.evaluate.sampling
    return 1 if sampling is None else sampling.samples


FIELDS = (
    "gate.compute",
    "evaluate.generate",
    "evaluate.max_new_tokens",
    "evaluate.sampling",
    "calibration.format.patterns",
)
# One artifact per model, whose identity is given with the key.
MEASURE = Stage(
    name="measure",
    version=1,
    schema=Schema(
        arrays={
            "losses": ("float64",),
            "format_states": ("float32",),
            "token_ids": ("int64",),
            "offsets": ("int64",),
        }
    ),
    inputs={"tokenizer": TOKENIZER, **SETS},
    fields=FIELDS,
    config=measure_config,
    without=unmeasured,
)


def patterns_of(ctx: Context) -> tuple[str, ...]:
    """The texts whose tokens hold the format, as the recipe or the chat template has them."""
    return ctx.settled.calibration.format.patterns or ()


def measured_sets(ctx: Context, keys: Keys) -> dict[str, Ref]:
    """The sets that models are measured on, by name."""
    absent = unmeasured(ctx.recipe)
    return {name: keys[stage] for name, stage in SETS.items() if name not in absent}


def heldout_sets(ctx: Context, keys: Keys) -> dict[str, Ref]:
    """Those of them that are held out."""
    return {n: ref for n, ref in measured_sets(ctx, keys).items() if n in HELDOUT}


def measure_ref(ctx: Context, keys: Keys, model: Model) -> Ref:
    """The key of one model's measurements."""
    return MEASURE.ref(ctx, keys, model=model.identity)


def measured(ctx: Context, keys: Keys, model: Model) -> Artifact:
    """A model's measurements, made if they are missing."""
    ref = measure_ref(ctx, keys, model)

    def write(draft: Draft) -> None:
        with model.proven(DigestMemo(ctx.store.root)):
            write_measurements(ctx, keys, model, draft)

    assert MEASURE.schema is not None
    ctx.store.build(ref, MEASURE.schema, write, waiting=ctx.notice)
    return ctx.store.open(ref)


def write_measurements(ctx: Context, keys: Keys, model: Model, draft: Draft) -> None:
    """Unit of work: one set's losses, one set's answers."""
    with model.stream(ctx) as stream:
        _write_losses(ctx, stream, measured_sets(ctx, keys), draft)
        if not ctx.recipe.evaluate.generate or stream.resident:
            _write_answers(ctx, stream, heldout_sets(ctx, keys), draft)
            return
    # Decoding holds the whole model: in place of the walk, not beside it.
    with model.stream(ctx, resident=True) as stream:
        _write_answers(ctx, stream, heldout_sets(ctx, keys), draft)


def _write_losses(ctx: Context, stream: LayerStream, sets: Mapping[str, Ref], draft: Draft) -> None:
    """All sets that are missing, in one walk."""
    missing = {n: read_set(ctx.store.open(r)) for n, r in sets.items() if not draft.done(n)}
    if not missing:
        return
    items = [tokens.items() for tokens in missing.values()]
    found = losses_of_sets(stream, items, lambda step: ctx.show_step(NAME, step))
    keep_losses(ctx, missing, found, draft)


def keep_losses(
    ctx: Context, sets: Mapping[str, TokenSet], found: Sequence[SetLosses], draft: Draft
) -> None:
    """Write what a walk has found of the sets, a unit each."""
    tokenizer, patterns = load_tokenizer(ctx.base), patterns_of(ctx)
    for (name, tokens), (losses, states) in zip(sets.items(), found, strict=True):
        with draft.unit(name) as unit:
            unit.write("losses", torch.tensor(losses, dtype=torch.float64))
            if name == "agent":
                chosen = format_positions(patterns, tokenizer, tokens)
                # Batches may have waited on several devices.
                rows = [s[p].cpu() for s, p in zip(states, chosen, strict=True)]
                unit.write("format_states", torch.cat(rows).float())


def format_positions(patterns: Sequence[str], tokenizer: Any, tokens: TokenSet) -> list[Tensor]:
    """Per item the positions whose next token is a format token of the target: int64 [n]."""
    positions = []
    for ids, length in zip(tokens.sequences, tokens.target_lengths, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] == ids.tolist():
            mask = format_mask(text, encoded["offset_mapping"], patterns, radius=0)
        else:
            # A decoded target need not be how the tokenizer would cut its text; then
            # only patterns that are tokens of their own can be placed.
            singles = torch.tensor(tokenizer.convert_tokens_to_ids(list(patterns)))
            mask = torch.isin(ids, singles)
        mask[: ids.numel() - length] = False
        positions.append(mask.nonzero().flatten() - 1)
    return positions


def _write_answers(
    ctx: Context, stream: LayerStream, heldout: Mapping[str, Ref], draft: Draft
) -> None:
    settings = ctx.recipe.evaluate
    missing = [name for name in heldout if not draft.done(f"answers.{name}")]
    if not (settings.generate and missing):
        return
    tokenizer = load_tokenizer(ctx.base)
    with stream.whole() as model:
        for name in missing:
            asked = read_set(ctx.store.open(heldout[name])).prompts()[: settings.generate]
            prompts = [prompt for prompt in asked for _ in range(samples_of(ctx.recipe))]
            answers: list[list[int]] = []
            for first in range(0, len(prompts), GENERATE_BATCH):
                answers += _decoder(settings.sampling, first)(
                    model,
                    prompts[first : first + GENERATE_BATCH],
                    max_new_tokens=settings.max_new_tokens,
                    pad=tokenizer.pad_token_id,
                    eos=tokenizer.eos_token_id,
                    also=own_ends(tokenizer),
                )
                ctx.progress(NAME, len(answers), len(prompts), f"{name} answers")
            with draft.unit(f"answers.{name}") as unit:
                unit.write("token_ids", torch.tensor([i for a in answers for i in a]))
                unit.write("offsets", offsets_of(answers))


def _decoder(sampling: Sampling | None, first: int) -> Callable[..., list[list[int]]]:
    """What decodes a batch whose first answer has this number."""
    if sampling is None:
        return decode_greedily
    how = sampling.model_dump(include={"temperature", "top_p", "top_k"})
    return partial(decode_by_draws, seed=sampling.seed * 1_000_003 + first, **how)


def mean_loss(artifact: Artifact, name: str) -> float:
    """A model's mean item loss on a set."""
    return float(artifact.read(name, "losses").mean())


def read_answers(artifact: Artifact, name: str) -> list[list[int]]:
    """The token ids of a model's answers to a held-out set."""
    ids = artifact.read(f"answers.{name}", "token_ids")
    ends = artifact.read(f"answers.{name}", "offsets").tolist()
    return [ids[a:b].tolist() for a, b in pairwise(ends)]
