"""Which tokens end an answer."""

import json
from collections.abc import Sequence
from typing import Any

from crane_tasks.identity import GENERATION
from crane_tasks.rendering import own_ends
from crane_tasks.session import Context


def ends_of(ctx: Context, tokenizer: Any) -> set[int]:
    """`own_ends`, and all that the generation configs of base and donor name.

    Llama's `<|eom_id|>` and gpt-oss's `<|call|>` end answers that are calls, and stand only there.
    """
    ends: set[Any] = set(own_ends(tokenizer))
    for file in (ctx.base / GENERATION, ctx.donor / GENERATION):
        named = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        ends |= set(named if isinstance(named, list) else [named])
    return ends - {None}


def without_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """An answer without the token that ended it."""
    return list(ids[:-1] if ids and ids[-1] in ends else ids)
