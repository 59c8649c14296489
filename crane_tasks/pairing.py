"""In what a pair is none of twins, and what the merge makes of it: for people, card and report."""

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.files.wording import listed
from crane_tasks.session import Context


def pair_notes(ctx: Context) -> list[str]:
    """A sentence for each way in which base and donor differ and are merged all the same."""
    pair = ctx.pair()
    return [
        *_config_notes(ctx),
        *_row_notes(pair),
        *_head_notes(pair),
        *_packed_notes(pair, in_fp8=ctx.recipe.merge.in_fp8),
        *_wrapper_notes(pair.base),
    ]


def _config_notes(ctx: Context) -> list[str]:
    unlike, notes = ctx.unlike_configs(), []
    if unlike.real:
        told = listed(map(unlike.told, unlike.real))
        notes.append(
            f"Configs of base and donor differ, as `pair.allow` says they may ({told}): the "
            "merge has the base's."
        )
    if unlike.ignored:
        notes.append(
            "Config keys that differ and that the model's class does not know: "
            f"{listed(unlike.ignored)}. The merge has the base's."
        )
    return notes


def _row_notes(pair: Pair) -> list[str]:
    ours, theirs = pair.rows
    if ours == theirs:
        return []
    rest = "the base's others stay as they are" if ours > theirs else "the donor's others are left"
    return [
        f"The base's embedding has {ours:,} rows, the donor's {theirs:,}: the first "
        f"{min(ours, theirs):,} are merged, {rest}."
    ]


def _head_notes(pair: Pair) -> list[str]:
    if pair.base.tied == pair.donor.tied:
        return []
    if pair.base.tied:
        return [
            "The base's head is its embedding, the donor has a head of its own: the merge's "
            "head is its embedding, made with the donor's; the donor's `lm_head.weight` is left."
        ]
    return [
        "The donor's head is its embedding, the base has a head of its own: the donor's embedding "
        "stands for its head, too."
    ]


def _packed_notes(pair: Pair, *, in_fp8: bool) -> list[str]:
    sides = {"base": pair.base.packed, "donor": pair.donor.packed}
    read = [f"the {name}'s weights are stored in FP8 and read as bfloat16" for name in sides]
    told = "; ".join(text for text, packed in zip(read, sides.values(), strict=True) if packed)
    if not told:
        return []
    written = ", and so the merge is written" if pair.base.packed else ""
    if pair.base.packed and in_fp8:
        written = "; the merge is written in FP8, blocks that it changed with scales of their own"
    return [f"Quantisation: {told}{written}."]


def _wrapper_notes(base: Checkpoint) -> list[str]:
    if not base.wrapper:
        return []
    return [
        f"The base is multimodal ({base.wrapper}): its language model is merged, and scored by "
        f"itself; its {len(base.carried)} other tensors are carried over."
    ]
