"""Who continues the prompts of a target set: a checkpoint held here, or a running server."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_tasks.ends import ends_of
from crane_tasks.errors import CheckpointError, EndpointError
from crane_tasks.models.decoding.greedy import decode, load_resident
from crane_tasks.models.decoding.server import Answer, asked
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.wording import listed
from crane_tasks.recipe import TargetSet
from crane_tasks.rendering import CLOSING, OPENING, own_ends, turn_end
from crane_tasks.rows import RowSet
from crane_tasks.section import Endpoint
from crane_tasks.session import Context

# Per batch its targets, and what else is to be noted of it.
Decoded = Generator[dict[str, Any], None, None]


@dataclass(frozen=True)
class Decoding:
    """A target set that is being decoded.

    Attributes:
        tokenizer: the base's.
        prompts: token ids per row.
    """

    ctx: Context
    section: TargetSet
    tokenizer: Any
    rows: RowSet
    prompts: Sequence[list[int]]


def check_donor_reads(ctx: Context, prompts: Sequence[Sequence[int]]) -> None:
    """The donor knows the markers of the base's prompts and answers, and the base those of its own.

    Raises:
        CheckpointError: one that decoding would need is only in one side's vocabulary.
    """
    unlike, base = ctx.unlike(), load_tokenizer(ctx.base)
    if not unlike:
        return
    written = {i for prompt in prompts for i in prompt} | own_ends(base)
    template = str(load_tokenizer(ctx.donor).chat_template or "")
    needed = [t for t, i in unlike.base.items() if i in written or t in (OPENING, CLOSING)]
    needed += [t for t in unlike.donor if t in template or t in (OPENING, CLOSING)]
    if needed:
        raise CheckpointError(
            f"{ctx.donor}: cannot decode targets from prompts by the base's tokenizer: only one "
            f"side has {listed(map(repr, needed))}. Let a server that speaks text decode them "
            "beforehand and give each row its `completion`."
        )


def decoded_batches(work: Decoding, batches: Sequence[Sequence[int]]) -> Decoded:
    """The targets of each batch of rows, in order.

    Raises:
        CheckpointError: the decoding checkpoint cannot be loaded.
        EndpointError: the server fails, or what it gives is no target; names the row.
    """
    server = work.section.targets
    if isinstance(server, Endpoint):
        return _by_server(work, server, batches)
    return _by_checkpoint(work, batches)


def _by_checkpoint(work: Decoding, batches: Sequence[Sequence[int]]) -> Decoded:
    ctx, section, model = work.ctx, work.section, None
    for batch in batches:
        if model is None:
            folder = ctx.donor if section.targets == "donor" else ctx.base
            model = load_resident(folder, ctx.torch_device, ctx.compute_dtype)
        targets = decode(
            model,
            [work.prompts[i] for i in batch],
            max_new_tokens=section.max_new_tokens,
            pad=work.tokenizer.pad_token_id,
            eos=work.tokenizer.eos_token_id,
            also=own_ends(work.tokenizer),
        )
        _require_rows(work, folder, targets)
        yield {"targets": targets}


def _require_rows(work: Decoding, folder: Path, targets: Sequence[Sequence[int]]) -> None:
    """A donor may have rows that the base lacks.

    Raises:
        CheckpointError: it gave a token without a row in the base's embedding.
    """
    rows, last = work.ctx.pair().rows[0], max(max(ids, default=0) for ids in targets)
    if last >= rows:
        raise CheckpointError(
            f"{folder}: decoded token {last}, the base's embedding has {rows} rows. Give each row "
            "its `completion`."
        )


def _by_server(work: Decoding, server: Endpoint, batches: Sequence[Sequence[int]]) -> Decoded:
    """While one batch is waited for, the server works on the next ones."""
    section, order = work.section, [i for batch in batches for i in batch]
    if not order:
        return
    prompts = [work.prompts[i] for i in order]
    limits = [section.max_new_tokens] * len(prompts)
    ends = ends_of(work.ctx, work.tokenizer)
    with asked(server, prompts, limits) as futures:
        coming = iter(futures)
        for batch in batches:
            targets, exact = [], True
            for index in batch:
                try:
                    answer = next(coming).result()
                    targets.append(_target_of(work, server, answer, ends))
                except EndpointError as error:
                    raise EndpointError(f"{work.rows.rows[index].place}: {error}") from error
                exact &= answer.ids is not None
            yield {"targets": targets, "token_exact": exact}


def _target_of(work: Decoding, server: Endpoint, answer: Answer, ends: set[int]) -> list[int]:
    """The token ids of an answer, its end token included if the model came to its end.

    Raises:
        EndpointError: the ids are not of the base's vocabulary.
    """
    ids = answer_ids(work.tokenizer, answer, ends)
    rows = work.ctx.pair().base.config["vocab_size"]
    if max(ids) >= rows:
        raise EndpointError(
            f"{server.endpoint}, model {server.model}: gave token {max(ids)}, the base's "
            f"vocabulary has {rows}. Only a model with the base's tokenizer can give its targets."
        )
    return ids


def answer_ids(tokenizer: Any, answer: Answer, ends: set[int]) -> list[int]:
    """The token ids of a server's answer, its end token included if the model came to its end.

    Where the server gives text alone, it is cut into tokens anew.
    """
    ids = answer.ids
    if ids is None:
        found: list[int] = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = found
    # vLLM's ids hold the end token, its text does not; as `decode` keeps it, so here.
    if answer.ended and ids[-1] not in ends:
        ids = [*ids, turn_end(tokenizer)]
    return ids
