"""By how much of the delta each row of embedding and lm_head moves."""

from typing import Any

import torch
from torch import Tensor

from crane_tasks.errors import RecipeError
from crane_tasks.models.files.tokenizer import added_ids, load_tokenizer
from crane_tasks.recipe import TokenRows
from crane_tasks.session import Context
from crane_tasks.sizes import PLAIN


def row_factors(rows: TokenRows, count: int, tokenizer: Any, where: str) -> Tensor:
    """The fraction of the delta that each of `count` rows moves by: float32 [count].

    `scale` everywhere, also beyond the tokenizer (the vocabulary's padding); 0 at added tokens,
    special or not, if they are kept; and the rows named by token on top of both.

    Raises:
        RecipeError: `rows` names a token that is not in the vocabulary.
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
        row_factors(getattr(ctx.recipe.merge, name), len(tokenizer), tokenizer, f"merge.{name}")
