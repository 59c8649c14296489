"""What the targets are that the gate and the evaluation were made from."""

from collections.abc import Mapping
from typing import Any

from crane_tasks.calibration.sets import TokenSet, read_set
from crane_tasks.calibration.stages import AGENT, HELDOUT_AGENT, HELDOUT_REASONING, REASONING
from crane_tasks.models.files.wording import listed
from crane_tasks.rendering import CLOSING
from crane_tasks.report.tables import NONE, Cells
from crane_tasks.session import Context
from crane_tasks.stage import Keys

TITLES = {
    REASONING: "reasoning",
    AGENT: "agent",
    HELDOUT_REASONING: "held-out reasoning",
    HELDOUT_AGENT: "held-out agent",
}


def target_sets(ctx: Context, keys: Keys) -> dict[str, TokenSet]:
    """The finished target sets of a run, by what people call them."""
    refs = {title: keys[stage] for stage, title in TITLES.items() if stage in keys}
    return {t: read_set(ctx.store.open(ref)) for t, ref in refs.items() if ctx.store.has(ref)}


def target_table(sets: Mapping[str, TokenSet], tokenizer: Any) -> Cells:
    """Rows, numbers of tokens, lengths, and the shares that end their thinking and that end."""
    rows = []
    for title, tokens in sets.items():
        lengths, count = tokens.target_lengths, len(tokens.sequences)
        texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in tokens.targets()]
        cut = tokens.unended
        ended = [NONE, NONE] if cut is None else [f"{1 - len(cut) / count:.1%}", str(len(cut))]
        whole = sum(ids.numel() for ids in tokens.sequences)
        thought = sum(CLOSING in text for text in texts) / count
        mean = f"{sum(lengths) / count:.1f}"
        rows.append([title, str(count), f"{whole:,}", f"{sum(lengths):,}", mean,
                     str(max(lengths)), f"{thought:.1%}", *ended])  # fmt: skip
    head = ["set", "rows", "tokens", "target tokens", "mean target", "longest",
            f"with `{CLOSING}`", "ended by itself", "cut"]  # fmt: skip
    return head, rows


def unended_note(sets: Mapping[str, TokenSet]) -> str:
    """The places of the targets that came to no end, set by set."""
    cut = {title: tokens.unended for title, tokens in sets.items() if tokens.unended}
    if not cut:
        return ""
    parts = (f"{title}: {listed(places)}" for title, places in cut.items())
    return f"Came to no end within `max_new_tokens`: {'; '.join(parts)}."
