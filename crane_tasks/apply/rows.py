"""By how much of the delta each row of embedding and lm_head moves."""

from typing import Any

import torch
from torch import Tensor

from crane_tasks.errors import RecipeError
from crane_tasks.merge_section import TokenRows
from crane_tasks.models.files.tokenizer import added_ids, load_tokenizer
from crane_tasks.models.files.vocabularies import Unlike
from crane_tasks.session import Context
from crane_tasks.sizes import PLAIN

SAME = Unlike({}, {})


def row_factors(
    rows: TokenRows, count: int, tokenizer: Any, where: str, unlike: Unlike = SAME
) -> Tensor:
    """The fraction of the delta that each of `count` rows moves by: float32 [count].

    `scale` everywhere, also beyond the tokenizer (the vocabulary's padding); 0 at added tokens,
    special or not, if they are kept; and the rows named by token on top of both. A row that is
    another token in the donor stays the base's.

    Raises:
        RecipeError: `rows` names a token that is not in the vocabulary, or not the donor's.
    """
    factors = torch.full((count,), float(rows.scale))
    vocabulary = tokenizer.get_vocab()
    if rows.keep_special:
        factors[sorted(i for i in added_ids(tokenizer) if i < count)] = 0.0
    unknown = [token for token in rows.rows if token not in vocabulary]
    if unknown:
        raise RecipeError(
            f"{where}.rows: no single token in the base's vocabulary: "
            f"{', '.join(map(repr, unknown))}"
        )
    foreign = [token for token in rows.rows if vocabulary[token] in unlike.ids]
    if foreign:
        raise RecipeError(
            f"{where}.rows: the donor's tokenizer has no such token, so its row is another's: "
            f"{', '.join(map(repr, foreign))}. Leave it out."
        )
    factors[sorted(i for i in unlike.ids if i < count)] = 0.0
    for token, fraction in rows.rows.items():
        factors[vocabulary[token]] = fraction
    return factors


def check_rows(ctx: Context) -> None:
    """Every row named in `merge` is a token of the base.

    Raises:
        RecipeError: with the unknown ones.
    """
    tokenizer = load_tokenizer(ctx.base)
    for name in PLAIN:
        rows, where = getattr(ctx.recipe.merge, name), f"merge.{name}"
        row_factors(rows, len(tokenizer), tokenizer, where, ctx.unlike())
    if ctx.unlike():
        ctx.notice(unlike_words(ctx.unlike()))


def unlike_words(unlike: Unlike) -> str:
    """What a person should know of tokens that differ; empty where none do."""
    if not unlike:
        return ""
    return (
        f"Tokens that base and donor do not share ({unlike}): their rows of embedding and lm_head "
        "are the base's."
    )
