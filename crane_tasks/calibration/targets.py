"""Target sets: prompts with their targets, the data's own or decoded greedily."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch

from artifacts.ref import Ref
from artifacts.store import Draft
from crane_tasks.calibration.decoding import Decoding, decoded_batches
from crane_tasks.calibration.sets import NAME, offsets_of
from crane_tasks.calibration.shown import texts_of
from crane_tasks.ends import ends_of
from crane_tasks.errors import DataError
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.wording import listed
from crane_tasks.recipe import TargetSet
from crane_tasks.rendering import (
    CLOSING,
    OPENING,
    completion_ids,
    ids_of,
    opens_thinking,
    turn_end,
)
from crane_tasks.rows import RowSet
from crane_tasks.section import Endpoint
from crane_tasks.session import Context, no_notice

# Rows decoded together, and kept together. Part of no key: padding on the left with a mask changes
# rounding only, and the decoded ids are what is stored.
DECODE_BATCH = {"cpu": 16, "cuda": 64}
DECODED = "decoded."


def waiting(rows: RowSet) -> list[int]:
    """The rows whose target must be decoded."""
    return [i for i, row in enumerate(rows.rows) if row.completion is None]


def check_targets(
    tokenizer: Any, section: TargetSet, rows: RowSet, notice: Callable[[str], None] = no_notice
) -> list[list[int]]:
    """The prompts' token ids.

    Raises:
        DataError: a prompt is longer than `max_prompt_length`, the template loses a part of it,
            or a completion is empty or never ends the thinking that its prompt begins. A long
            prompt is refused: cut on the right it would lose its assistant header.
    """
    prompts = []
    for row, text in zip(rows.rows, texts_of(tokenizer, section, rows, True, notice), strict=True):
        ids = ids_of(tokenizer, text)
        opened = opens_thinking(tokenizer, ids)
        if len(ids) > section.max_prompt_length:
            raise DataError(
                f"{row.place}: the prompt has {len(ids)} tokens, max_prompt_length is "
                f"{section.max_prompt_length}. Raise max_prompt_length or shorten the prompt."
            )
        if row.completion is not None and not row.completion.strip():
            raise DataError(f"{row.place}: `completion` is empty")
        if row.completion is not None and opened and CLOSING not in row.completion:
            raise DataError(
                f"{row.place}: the chat template begins a thinking block ({OPENING}) in the "
                f"prompt, and `completion` never ends it. Write the thoughts and {CLOSING} before "
                "the answer, or switch thinking off by `chat_template_kwargs`."
            )
        ours = row.completion is not None or isinstance(section.targets, Endpoint)
        if ours and turn_end(tokenizer) is None:
            raise DataError(
                f"{row.place}: a `completion` and a server's answer need an end, and neither the "
                "base's chat template nor its tokenizer (EOS) names one"
            )
        prompts.append(ids)
    return prompts


def write_targets(ctx: Context, section: TargetSet, rows: RowSet, draft: Draft) -> None:
    """Unit of work: one batch of rows to decode, then the whole set.

    No target is cut. The set's metadata names the places whose target is `unended`: decoding
    stopped at `max_new_tokens`. That of a set that a server decoded says by which `model`, and
    whether the targets are `token_exact`: what the model emitted, not its text cut into tokens
    anew.
    """
    tokenizer = load_tokenizer(ctx.base)
    prompts = check_targets(tokenizer, section, rows)
    targets: list[list[int]] = [[] for _ in prompts]
    work = Decoding(ctx, section, tokenizer, rows, prompts)
    for index, (row, prompt) in enumerate(zip(rows.rows, prompts, strict=True)):
        if row.completion is not None:
            opened = opens_thinking(tokenizer, prompt)
            targets[index] = completion_ids(tokenizer, row.completion, opened=opened)
    for index, ids in _decoded(work, draft):
        targets[index] = ids
    empty = [row.place for row, ids in zip(rows.rows, targets, strict=True) if not ids]
    if empty:
        raise DataError(f"{', '.join(empty)}: the {section.targets} gave an empty target")
    if isinstance(section.targets, Endpoint) and waiting(rows):
        _note_server(ctx, section, section.targets, draft)
    unended = _unended(work, targets)
    sequences = [p + t for p, t in zip(prompts, targets, strict=True)]
    with draft.unit("set") as unit:
        unit.write("token_ids", torch.tensor([i for s in sequences for i in s]))
        unit.write("offsets", offsets_of(sequences))
        unit.write("target_lengths", torch.tensor([len(target) for target in targets]))
        unit.meta["places"] = [row.place for row in rows.rows]
        unit.meta["unended"] = unended


def _decoded(work: Decoding, draft: Draft) -> Iterator[tuple[int, list[int]]]:
    """(row, target ids) of the rows without completion, batch by batch, resumable."""
    rows, prompts = work.rows.rows, work.prompts
    # Longest first: out of memory shows at once, and batches hold like lengths.
    order = sorted(waiting(work.rows), key=lambda i: (-len(prompts[i]), i))
    kept = [u["meta"] for name, u in draft.units.items() if name.startswith(DECODED)]
    for record in kept:
        yield from zip(record["rows"], record["targets"], strict=True)
    known = {index for record in kept for index in record["rows"]}
    missing, size = [i for i in order if i not in known], DECODE_BATCH[work.ctx.torch_device.type]
    batches = [missing[i : i + size] for i in range(0, len(missing), size)]
    # Closed at an error, too: the server must not go on with what nobody waits for.
    with closing(decoded_batches(work, batches)) as decoded:
        for number, batch in enumerate(batches, start=len(kept)):
            record = next(decoded)
            with draft.unit(f"{DECODED}{number}") as unit:
                unit.meta |= {"rows": batch, "places": [rows[i].place for i in batch], **record}
            yield from zip(batch, record["targets"], strict=True)
            known |= {*batch}
            work.ctx.progress(NAME, len(known), len(order), "targets decoded")


def _unended(work: Decoding, targets: list[list[int]]) -> list[str]:
    """The places whose target was decoded and ended for lack of room; the user hears of them."""
    decoded, ends = waiting(work.rows), ends_of(work.ctx, work.tokenizer)
    places = [work.rows.rows[i].place for i in decoded if targets[i][-1] not in ends]
    if places:
        work.ctx.notice(
            f"{work.section.data}: {len(places)} of {len(decoded)} decoded targets came to no end "
            f"within max_new_tokens ({work.section.max_new_tokens}): {listed(places)}"
        )
    return places


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
