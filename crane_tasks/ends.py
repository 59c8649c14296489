"""Which tokens end an answer."""

from collections.abc import Sequence
from typing import Any

from crane_tasks.models.files.generation import stops_of
from crane_tasks.rendering import own_ends
from crane_tasks.session import Context


def ends_of(ctx: Context, tokenizer: Any) -> set[int]:
    """`own_ends`, and all that the generation configs of base and donor name.

    Llama's `<|eom_id|>` and gpt-oss's `<|call|>` end answers that are calls, and stand only there.
    """
    ends = set(own_ends(tokenizer))
    return ends.union(*(stops_of(side) for side in (ctx.base, ctx.donor)))


def without_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """An answer without the token that ended it."""
    return list(ids[:-1] if ids and ids[-1] in ends else ids)
