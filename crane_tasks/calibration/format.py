"""Format sets: complete conversations, and which of their tokens hold the format."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from artifacts.store import Draft
from crane_tasks.calibration.sets import offsets_of
from crane_tasks.calibration.shown import texts_of
from crane_tasks.errors import DataError
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe import FormatSet
from crane_tasks.rows import RowSet
from crane_tasks.session import Context, no_notice


def format_rows(
    tokenizer: Any,
    section: FormatSet,
    rows: RowSet,
    notice: Callable[[str], None] = no_notice,
    *,
    named: bool = False,
) -> tuple[list[list[int]], list[Tensor]]:
    """Token ids and masks of the rows, each cut to its first `max_length` tokens.

    Args:
        named: whether the recipe names the patterns, or they are the chat template's.

    Raises:
        DataError: the template refuses a row, or no row holds any of the patterns, or one that
            the recipe names. Of the template's own it is a notice.
    """
    patterns = section.patterns or ()
    if not patterns:
        raise DataError(
            "calibration.format.patterns: the base's chat template sets no marks that could be "
            "protected; name the texts that hold its format, e.g. ['<|im_start|>', '<tool_call>']"
        )
    sequences, masks, missing = [], [], dict.fromkeys(patterns)
    for text in texts_of(tokenizer, section, rows, False, notice):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = format_mask(text, encoded["offset_mapping"], patterns, section.radius)
        sequences.append(encoded["input_ids"][: section.max_length])
        masks.append(mask[: section.max_length])
        end = encoded["offset_mapping"][: section.max_length][-1:] or [(0, 0)]
        for pattern in [p for p in missing if p in text[: end[0][1]]]:
            del missing[pattern]
    if not any(bool(mask.any()) for mask in masks):
        raise DataError(
            f"{section.data}: no row holds any of the format patterns "
            f"{', '.join(patterns)} within {section.max_length} tokens"
        )
    if missing:
        _say_missing(section, list(missing), notice, named)
    return sequences, masks


def _say_missing(
    section: FormatSet, missing: list[str], notice: Callable[[str], None], named: bool
) -> None:
    text = f"{section.data}: no row holds the format patterns {', '.join(missing)}"
    if named:
        raise DataError(
            f"{text} within {section.max_length} tokens, so nothing protects them. Correct "
            "calibration.format.patterns, or add rows that hold them."
        )
    notice(
        f"{text}. They are what the chat template sets; add rows that hold them, or name "
        "those that matter in calibration.format.patterns."
    )


def write_format(ctx: Context, section: FormatSet, rows: RowSet, draft: Draft) -> None:
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
