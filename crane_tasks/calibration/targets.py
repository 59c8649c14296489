"""Target sets: prompts with their targets, the data's own or decoded greedily."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch

from artifacts.ref import Ref
from artifacts.store import Draft
from crane_tasks.calibration.decoding import Decoding, decoded_batches
from crane_tasks.calibration.rendering import render
from crane_tasks.calibration.sets import NAME, offsets_of
from crane_tasks.errors import DataError
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe import Endpoint, TargetSet
from crane_tasks.rows import RowSet
from crane_tasks.session import Context

# Rows decoded together. Part of no key: padding on the left with a mask changes rounding
# only, and the decoded ids are what is stored.
DECODE_BATCH = 16


def waiting(rows: RowSet) -> list[int]:
    """The rows whose target must be decoded."""
    return [i for i, row in enumerate(rows.rows) if row.completion is None]


def check_targets(tokenizer: Any, section: TargetSet, rows: RowSet) -> list[list[int]]:
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


def write_targets(ctx: Context, section: TargetSet, rows: RowSet, draft: Draft) -> None:
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
    for index, ids in _decoded(Decoding(ctx, section, tokenizer, rows, prompts), draft):
        targets[index] = ids
    empty = [row.place for row, ids in zip(rows.rows, targets, strict=True) if not ids]
    if empty:
        raise DataError(f"{', '.join(empty)}: the {section.targets} gave an empty target")
    if isinstance(section.targets, Endpoint) and waiting(rows):
        _note_server(ctx, section, section.targets, draft)
    sequences = [(p + t)[: section.max_length] for p, t in zip(prompts, targets, strict=True)]
    with draft.unit("set") as unit:
        unit.write("token_ids", torch.tensor([i for s in sequences for i in s]))
        unit.write("offsets", offsets_of(sequences))
        lengths = [len(s) - len(p) for s, p in zip(sequences, prompts, strict=True)]
        unit.write("target_lengths", torch.tensor(lengths))
        unit.meta["places"] = [row.place for row in rows.rows]


def _decoded(work: Decoding, draft: Draft) -> Iterator[tuple[int, list[int]]]:
    """(row, target ids) of the rows without completion, batch by batch, resumable."""
    rows, prompts = work.rows.rows, work.prompts
    # Longest first: out of memory shows at once, and batches hold like lengths.
    order = sorted(waiting(work.rows), key=lambda i: (-len(prompts[i]), i))
    batches = [order[i : i + DECODE_BATCH] for i in range(0, len(order), DECODE_BATCH)]
    missing = [b for number, b in enumerate(batches) if not draft.done(f"decoded.{number}")]
    # Closed at an error, too: the server must not go on with what nobody waits for.
    with closing(decoded_batches(work, missing)) as decoded:
        for number, batch in enumerate(batches):
            name = f"decoded.{number}"
            if not draft.done(name):
                record = next(decoded)
                with draft.unit(name) as unit:
                    unit.meta |= {"places": [rows[i].place for i in batch], **record}
            yield from zip(batch, draft.units[name]["meta"]["targets"], strict=True)
            work.ctx.progress(NAME, number + 1, len(batches), "batches decoded")


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
