"""Stage `calibration`: token ids of the calibration and evaluation sets.

A target set holds prompts with their targets: the row's `completion` and EOS, or else the
greedy continuation by donor, base or a running server. A format set holds complete
conversations with a mask of the format tokens and their neighbours. Each set is an artifact of
its own, so that a new reasoning set leaves the projector alone.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft
from crane_tasks.check import load_tokenizer
from crane_tasks.context import Context
from crane_tasks.data import Row, Rows, load_rows
from crane_tasks.decoding import Work, decoded_batches
from crane_tasks.errors import DataError
from crane_tasks.models.decoding.server import check_server
from crane_tasks.models.walk.losses import Item
from crane_tasks.recipe import Endpoint, FormatSet, TargetSet

STAGE = "calibration"
VERSION = 1
SCHEMA = Schema(
    arrays={
        "token_ids": ("int64",),
        "offsets": ("int64",),
        "target_lengths": ("int64",),
        "format_mask": ("bool",),
    },
    meta=("places",),
)
# Rows decoded together. Part of no key: padding on the left with a mask changes rounding
# only, and the decoded ids are what is stored.
DECODE_BATCH = 16


def target_ref(ctx: Context, section: TargetSet, rows: Rows) -> Ref:
    """The key of a target set; who decodes is an input only if something is decoded."""
    config: dict[str, Any] = {"kind": "targets", "max_length": section.max_length}
    inputs = {"data": rows.digest, "tokenizer": ctx.tokenizer_id}
    if not _waiting(rows):
        return Ref(STAGE, VERSION, config, inputs)
    config["max_new_tokens"] = section.max_new_tokens
    if isinstance(section.targets, Endpoint):
        # By its name alone: a server that moves to another URL has the same model.
        config["model"] = section.targets.model
        inputs["stops"] = digest_of(ctx.stops)
    else:
        inputs["decoder"] = ctx.donor_id if section.targets == "donor" else ctx.base_id
        inputs["stops"] = ctx.stops[section.targets]
        config["compute"] = ctx.compute
    return Ref(STAGE, VERSION, config, inputs)


def _waiting(rows: Rows) -> list[int]:
    """The rows whose target must be decoded."""
    return [i for i, row in enumerate(rows.rows) if row.completion is None]


def format_ref(ctx: Context, section: FormatSet, rows: Rows) -> Ref:
    """The key of a format set."""
    config = {"kind": "format", **section.model_dump(exclude={"data"}, mode="json")}
    return Ref(STAGE, VERSION, config, {"data": rows.digest, "tokenizer": ctx.tokenizer_id})


def build_targets(ctx: Context, section: TargetSet, ref: Ref) -> Built:
    """Make or find a target set."""

    def write(draft: Draft) -> None:
        write_targets(ctx, section, _rows_of(ctx, section.data, ref), draft)

    return ctx.store.build(ref, SCHEMA, write)


def build_format(ctx: Context, section: FormatSet, ref: Ref) -> Built:
    """Make or find a format set."""

    def write(draft: Draft) -> None:
        write_format(ctx, section, _rows_of(ctx, section.data, ref), draft)

    return ctx.store.build(ref, SCHEMA, write)


def _rows_of(ctx: Context, data: str, ref: Ref) -> Rows:
    """The rows that a key was made of.

    Raises:
        DataError: the file was changed since: its rows would be stored under others' key.
    """
    rows = load_rows(ctx.recipe, data)
    if rows.digest != ref.inputs["data"]:
        raise DataError(f"{data}: was changed while the run was under way. Run it again.")
    return rows


def render(tokenizer: Any, row: Row, *, prompt: bool) -> str:
    """The conversation as text by the chat template; `prompt` adds the assistant header.

    Raises:
        DataError: the template refuses the conversation.
    """
    if prompt and row.messages[-1]["role"] == "assistant":
        raise DataError(
            f"{row.place}: ends with the assistant's turn; put that text into `completion`"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(row.messages), tools=row.tools, add_generation_prompt=prompt, tokenize=False
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{row.place}: the chat template refuses it: {error}") from error
    return text


def check_targets(tokenizer: Any, section: TargetSet, rows: Rows) -> list[list[int]]:
    """The prompts' token ids.

    Raises:
        DataError: a prompt leaves no room for a target, or a completion is empty. A long
            prompt is refused: cut on the right it would lose its assistant header.
    """
    prompts = []
    for row in rows.rows:
        ids = tokenizer(render(tokenizer, row, prompt=True), add_special_tokens=False)["input_ids"]
        if len(ids) >= section.max_length:
            raise DataError(
                f"{row.place}: the prompt has {len(ids)} tokens, max_length is "
                f"{section.max_length}. Raise max_length or shorten the prompt."
            )
        if row.completion is not None and not row.completion.strip():
            raise DataError(f"{row.place}: `completion` is empty")
        ours = row.completion is not None or isinstance(section.targets, Endpoint)
        if ours and tokenizer.eos_token_id is None:
            raise DataError(
                f"{row.place}: a `completion` and a server's answer end with EOS, and the base's "
                "tokenizer names none"
            )
        prompts.append(ids)
    return prompts


def write_targets(ctx: Context, section: TargetSet, rows: Rows, draft: Draft) -> None:
    """Unit of work: one batch of rows to decode, then the whole set.

    The metadata of a set that a server decoded says by which `model`, and whether the targets
    are `token_exact`: what the model emitted, not its text cut into tokens anew.
    """
    tokenizer = load_tokenizer(ctx.base)
    prompts = check_targets(tokenizer, section, rows)
    targets: list[list[int]] = [[] for _ in prompts]
    for index, row in enumerate(rows.rows):
        if row.completion is not None:
            ids = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
            targets[index] = [*ids, tokenizer.eos_token_id]
    for index, found in _decoded(ctx, section, tokenizer, rows, prompts, draft):
        targets[index] = found
    empty = [row.place for row, ids in zip(rows.rows, targets, strict=True) if not ids]
    if empty:
        raise DataError(f"{', '.join(empty)}: the {section.targets} gave an empty target")
    if isinstance(section.targets, Endpoint) and _waiting(rows):
        _note_server(ctx, section, section.targets, draft)
    sequences = [(p + t)[: section.max_length] for p, t in zip(prompts, targets, strict=True)]
    with draft.unit("set") as unit:
        unit.write("token_ids", torch.tensor([i for s in sequences for i in s]))
        unit.write("offsets", offsets_of(sequences))
        lengths = [len(s) - len(p) for s, p in zip(sequences, prompts, strict=True)]
        unit.write("target_lengths", torch.tensor(lengths))
        unit.meta["places"] = [row.place for row in rows.rows]


def _decoded(
    ctx: Context,
    section: TargetSet,
    tokenizer: Any,
    rows: Rows,
    prompts: Sequence[list[int]],
    draft: Draft,
) -> Iterator[tuple[int, list[int]]]:
    """(row, target ids) of the rows without completion, batch by batch, resumable."""
    # Longest first: out of memory shows at once, and batches hold like lengths.
    waiting = sorted(_waiting(rows), key=lambda i: (-len(prompts[i]), i))
    batches = [waiting[i : i + DECODE_BATCH] for i in range(0, len(waiting), DECODE_BATCH)]
    missing = [b for number, b in enumerate(batches) if not draft.done(f"decoded.{number}")]
    work = Work(ctx, section, tokenizer, rows, prompts)
    # Closed at an error, too: the server must not go on with what nobody waits for.
    with closing(decoded_batches(work, missing)) as found:
        for number, batch in enumerate(batches):
            name = f"decoded.{number}"
            if not draft.done(name):
                record = next(found)
                with draft.unit(name) as unit:
                    unit.meta |= {"places": [rows.rows[i].place for i in batch], **record}
            yield from zip(batch, draft.units[name]["meta"]["targets"], strict=True)
            ctx.progress(STAGE, number + 1, len(batches), "batches decoded")


def _note_server(ctx: Context, section: TargetSet, server: Endpoint, draft: Draft) -> None:
    """Say in the set's metadata, and if need be to the user, what the targets are."""
    exact = all(record["meta"].get("token_exact", True) for record in draft.units.values())
    draft.meta |= {"model": server.model, "token_exact": exact}
    if not exact:
        ctx.notice(
            f"{section.data}: {server.model} was served without token ids, so its text was cut "
            "into tokens anew. These need not be those that it emitted."
        )


def retokenised(ctx: Context, refs: Mapping[str, Ref]) -> list[str]:
    """The finished sets whose targets a server gave as text alone."""
    metas = {name: ctx.store.open(ref).meta for name, ref in refs.items() if ctx.store.has(ref)}
    return [name for name, meta in metas.items() if not meta.get("token_exact", True)]


def check_format(ctx: Context, section: FormatSet, ref: Ref) -> None:
    """Render and place the patterns of a format set that is still to be made.

    Raises:
        DataError: the template refuses a row, or no row holds any of the patterns.
    """
    if not ctx.store.has(ref):
        rows = load_rows(ctx.recipe, section.data)
        format_rows(load_tokenizer(ctx.base), section, rows)


def format_rows(
    tokenizer: Any, section: FormatSet, rows: Rows
) -> tuple[list[list[int]], list[Tensor]]:
    """Token ids and masks of the rows, each cut to its first `max_length` tokens.

    Raises:
        DataError: the template refuses a row, or no row holds any of the patterns.
    """
    sequences, masks = [], []
    for row in rows.rows:
        text = render(tokenizer, row, prompt=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = format_mask(text, encoded["offset_mapping"], section.patterns, section.radius)
        sequences.append(encoded["input_ids"][: section.max_length])
        masks.append(mask[: section.max_length])
    if not any(bool(mask.any()) for mask in masks):
        raise DataError(
            f"{section.data}: no row holds any of the format patterns "
            f"{', '.join(section.patterns)} within {section.max_length} tokens"
        )
    return sequences, masks


def write_format(ctx: Context, section: FormatSet, rows: Rows, draft: Draft) -> None:
    """Token ids and the mask of format tokens and their neighbours."""
    sequences, masks = format_rows(load_tokenizer(ctx.base), section, rows)
    with draft.unit("set") as unit:
        unit.write("token_ids", torch.tensor([i for s in sequences for i in s]))
        unit.write("offsets", offsets_of(sequences))
        unit.write("format_mask", torch.cat(masks))
        unit.meta["places"] = [row.place for row in rows.rows]


def format_mask(
    text: str, offsets: Sequence[tuple[int, int]], patterns: Sequence[str], radius: int
) -> Tensor:
    """Which tokens overlap a pattern's characters, or stand within `radius` of one: bool [T]."""
    mask = torch.zeros(len(offsets), dtype=torch.bool)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for pattern in patterns:
        begin = text.find(pattern)
        while begin >= 0:
            first = bisect_right(ends, begin)  # the first token that ends after `begin`
            last = bisect_left(starts, begin + len(pattern))  # behind those that start before
            if first < last:
                mask[max(0, first - radius) : last + radius] = True
            begin = text.find(pattern, begin + 1)
    return mask


def offsets_of(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Where each sequence begins in their concatenation, and the end: int64 [n + 1]."""
    lengths = torch.tensor([0, *(len(s) for s in sequences)])
    return lengths.cumsum(0)


@dataclass(frozen=True)
class TokenSet:
    """A set read back from the store."""

    sequences: list[Tensor]
    target_lengths: list[int]
    masks: list[Tensor]
    places: list[str]

    def items(self) -> list[Item]:
        """The items of a target set, weighted so that their sum is the mean over items."""
        weight = 1.0 / len(self.sequences)
        return [
            Item(ids, int(ids.numel()) - length, weight)
            for ids, length in zip(self.sequences, self.target_lengths, strict=True)
        ]


def read_set(artifact: Artifact) -> TokenSet:
    """A calibration artifact as tensors."""
    ids, offsets = artifact.read("set", "token_ids"), artifact.read("set", "offsets").tolist()
    spans = list(pairwise(offsets))
    lengths, masks = [], []
    if artifact.has("set", "target_lengths"):
        lengths = artifact.read("set", "target_lengths").tolist()
    if artifact.has("set", "format_mask"):
        mask = artifact.read("set", "format_mask")
        masks = [mask[a:b] for a, b in spans]
    places = artifact.unit_meta("set")["places"]
    return TokenSet([ids[a:b] for a, b in spans], lengths, masks, places)


@dataclass(frozen=True)
class CalibrationRefs:
    """The three sets of a recipe."""

    reasoning: Ref
    agent: Ref
    format: Ref

    def targets(self) -> dict[str, Ref]:
        return {"reasoning": self.reasoning, "agent": self.agent}


def calibration_refs(ctx: Context) -> CalibrationRefs:
    """The keys of the recipe's sets; reads the rows, so that a broken file shows at once.

    Raises:
        DataError: a file is absent or broken.
    """
    sets = ctx.recipe.calibration
    return CalibrationRefs(
        reasoning=target_ref(ctx, sets.reasoning, load_rows(ctx.recipe, sets.reasoning.data)),
        agent=target_ref(ctx, sets.agent, load_rows(ctx.recipe, sets.agent.data)),
        format=format_ref(ctx, sets.format, load_rows(ctx.recipe, sets.format.data)),
    )


def check_prompts(ctx: Context, section: TargetSet, ref: Ref) -> None:
    """Render and measure every prompt of a set that is still to be made, and look who decodes.

    Raises:
        DataError: before any model is loaded, what `check_targets` refuses.
        EndpointError: the server that would decode is not there, or has no such model.
    """
    if not ctx.store.has(ref):
        rows = load_rows(ctx.recipe, section.data)
        check_targets(load_tokenizer(ctx.base), section, rows)
        if isinstance(section.targets, Endpoint) and _waiting(rows):
            check_server(section.targets)


def count_tokens(ctx: Context) -> int:
    """An upper bound of the gate's tokens: rows are counted, not tokenised."""
    sets = ctx.recipe.calibration
    return sum(
        len(load_rows(ctx.recipe, s.data).rows) * s.max_length for s in (sets.reasoning, sets.agent)
    )


def build_calibration(ctx: Context, refs: CalibrationRefs) -> Built:
    """All three sets as one stage; its key digests theirs."""
    sets = ctx.recipe.calibration
    built = [
        build_format(ctx, sets.format, refs.format),
        build_targets(ctx, sets.agent, refs.agent),
        build_targets(ctx, sets.reasoning, refs.reasoning),
    ]
    status = next(
        (s for s in ("resumed", "computed") if any(b.status == s for b in built)), "reused"
    )
    whole = calibration_ref(refs)
    seconds = sum(b.seconds for b in built)
    return Built(whole, status, seconds, ctx.store.root / STAGE)


def calibration_ref(refs: CalibrationRefs) -> Ref:
    """Names the three sets together; no artifact of its own."""
    keys = {"reasoning": refs.reasoning.key, "agent": refs.agent.key, "format": refs.format.key}
    return Ref(STAGE, VERSION, {"kind": "all"}, keys)
