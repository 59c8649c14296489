"""One model's measurements: losses on every set, and answers to the held-out prompts.

Each model is measured once and kept under its content, so a sweep measures base and donor
never again.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from itertools import islice, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from artifacts.memo import DigestMemo
from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from crane_tasks.calibration.decoding import answer_ids
from crane_tasks.calibration.format import format_mask
from crane_tasks.calibration.sets import TokenSet, offsets_of, read_set
from crane_tasks.calibration.stages import AGENT, HELDOUT_AGENT, HELDOUT_REASONING, REASONING
from crane_tasks.edit import edit_of
from crane_tasks.ends import ends_of
from crane_tasks.evaluate.engine import served_answers
from crane_tasks.evaluate.models import Model
from crane_tasks.evaluate_section import Engine, Sampling
from crane_tasks.models.decoding.greedy import Draws, OnStep, decode
from crane_tasks.models.files.memory import give_back_gpu_memory
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.walk.losses import SetLosses, losses_of_sets
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.recipe import Recipe, field_of
from crane_tasks.rendering import own_ends
from crane_tasks.session import Context
from crane_tasks.stage import TOKENIZER, Keys, Stage

T = TypeVar("T")
HELDOUT = {"reasoning": HELDOUT_REASONING, "agent": HELDOUT_AGENT}
# On the calibration sets the gate's prediction is made.
SETS = {"calibration_reasoning": REASONING, "calibration_agent": AGENT, **HELDOUT}
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
    return (
        {
            "compute": ctx.compute,
            "generate": settings.generate,
            "max_new_tokens": settings.max_new_tokens if settings.generate else 0,
            "patterns": list(patterns_of(ctx)),
        }
        | {
            # Keys are older than these.
            name: field_of(ctx.recipe, f"evaluate.{name}")
            for name in ("engine", "sampling")
            if settings.generate and getattr(settings, name) is not None
        }
        | ({"draws": "by answer"} if settings.generate and settings.sampling else {})
    )


def samples_of(recipe: Recipe) -> int:
    """How many answers each prompt gets."""
    sampling = recipe.evaluate.sampling
    return 1 if sampling is None else sampling.samples


def repeated(rows: Sequence[T], count: int) -> list[T]:
    """Each of them so many times: a prompt's answers follow one another."""
    return [row for row in rows for _ in range(count)]


FIELDS = (
    "gate.compute",
    "evaluate.generate",
    "evaluate.max_new_tokens",
    "evaluate.engine",
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
    engine = ctx.recipe.evaluate.engine
    with model.stream(ctx) as stream:
        _write_losses(ctx, stream, measured_sets(ctx, keys), draft)
        if not ctx.recipe.evaluate.generate or (engine is None and stream.resident):
            _write_answers(ctx, stream, heldout_sets(ctx, keys), draft)
            return
    # Whoever decodes holds the whole model: in place of the walk, not beside it.
    del stream
    if engine is not None:
        give_back_gpu_memory()
        _write_served(ctx, engine, model, heldout_sets(ctx, keys), draft)
        return
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
        if broken := sum(not math.isfinite(loss) for loss in losses):
            ctx.notice(
                f"{broken} of {len(losses)} losses on {name} are no numbers: the weights measured "
                "hold NaN or Inf, or the edit is far too strong."
            )
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
    missing = _unanswered(ctx, heldout, draft)
    if not missing:
        return
    tokenizer = load_tokenizer(ctx.base)
    with stream.whole() as model:
        for name, prompts in missing.items():
            answers = decode(
                model,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                pad=tokenizer.pad_token_id,
                eos=tokenizer.eos_token_id,
                also=own_ends(tokenizer),
                draws=_draws(settings.sampling),
                on_step=_shown(ctx, name, len(prompts)),
            )
            _keep_answers(draft, name, answers)


def _write_served(
    ctx: Context, engine: Engine, model: Model, heldout: Mapping[str, Ref], draft: Draft
) -> None:
    """The answers of a server that holds the model.

    Raises:
        EndpointError: it does not start, ends early, or refuses a prompt.
    """
    missing = _unanswered(ctx, heldout, draft)
    tokenizer, limit = load_tokenizer(ctx.base), ctx.recipe.evaluate.max_new_tokens
    if not missing:
        return
    ends = ends_of(ctx, tokenizer)
    prompts = [prompt for own in missing.values() for prompt in own]
    coming = served_answers(
        engine.serve, model.folder, prompts, limit, draft.scratch / "engine.log"
    )
    with closing(coming):
        for name, own in missing.items():
            answers = []
            for number, answer in enumerate(islice(coming, len(own)), start=1):
                answers.append(answer_ids(tokenizer, answer, ends))
                ctx.progress(NAME, number, len(own), f"{name} answers")
            _keep_answers(draft, name, answers)


def _unanswered(
    ctx: Context, heldout: Mapping[str, Ref], draft: Draft
) -> dict[str, list[list[int]]]:
    """The prompts of the sets whose answers are missing, each as often as it is answered."""
    settings, count = ctx.recipe.evaluate, samples_of(ctx.recipe)
    names = [n for n in heldout if settings.generate and not draft.done(f"answers.{n}")]
    asked = {n: read_set(ctx.store.open(heldout[n])).prompts()[: settings.generate] for n in names}
    return {n: repeated(own, count) for n, own in asked.items()}


def _keep_answers(draft: Draft, name: str, answers: list[list[int]]) -> None:
    with draft.unit(f"answers.{name}") as unit:
        unit.write("token_ids", torch.tensor([i for a in answers for i in a]))
        unit.write("offsets", offsets_of(answers))


def _draws(sampling: Sampling | None) -> Draws | None:
    return None if sampling is None else Draws(**sampling.model_dump(exclude={"samples"}))


def _shown(ctx: Context, name: str, count: int) -> OnStep:
    """Shows how far the answers to a set are, and how fast they come."""
    began = time.monotonic()

    def show(finished: int, tokens: int) -> None:
        rate = tokens / (time.monotonic() - began)
        ctx.progress(NAME, finished, count, f"{name} answers, {rate:,.0f} tokens/s")

    return show


def mean_loss(artifact: Artifact, name: str) -> float:
    """A model's mean item loss on a set."""
    return float(artifact.read(name, "losses").mean())


def read_answers(artifact: Artifact, name: str) -> list[list[int]]:
    """The token ids of a model's answers to a held-out set."""
    ids = artifact.read(f"answers.{name}", "token_ids")
    ends = artifact.read(f"answers.{name}", "offsets").tolist()
    return [ids[a:b].tolist() for a, b in pairwise(ends)]
