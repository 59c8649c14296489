"""How large a model and its calibration are, from headers and rows alone, and what is free."""

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from artifacts.ref import digest_of
from crane_tasks.errors import OutputError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Slot
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe import TargetSet
from crane_tasks.rendering import completion_ids, prompt_ids
from crane_tasks.rows import load_rows
from crane_tasks.session import Context

# Rough rates: bytes of weights a second from disk through memory, and multiply-adds a second.
DISK_RATE = 4e8
FLOPS = {"cpu": 5e10, "cuda": 1e14}
COPIES = 16  # bytes in flight per weight of the largest tensor: a few float32 copies
# Moved by a plain fraction of the delta, so they have no threshold and no score (docs/method.md).
PLAIN = ("embedding", "lm_head")
# Tokens that a target is reckoned with which is still to be decoded. Up to 8,192 are allowed and
# few become so long: with that bound, disks would be refused that suffice.
RECKONED = 2048


def gated(slots: Iterable[Slot]) -> list[Slot]:
    """Those that the threshold and the gate are for."""
    return [slot for slot in slots if slot.component not in PLAIN]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint as stored, and what follows for a stage in a context.

    Attributes:
        total: all tensors.
        gated: those that have gradients.
        layer: the largest decoder layer.
        outside: what lies in no layer.
        largest: weights of the largest single tensor.
        parameters: all weights.
        wide: bytes of a weight in the compute dtype.
        tokens: of the gate's sets; targets that must be decoded are reckoned (`RECKONED`).
        boundary: bytes of all their hidden states between two layers.
        layers: decoder layers.
        rate: multiply-adds a second.
    """

    total: int
    gated: int
    layer: int
    outside: int
    largest: int
    parameters: int
    wide: int
    tokens: int
    boundary: int
    layers: int
    rate: float

    @property
    def reading(self) -> float:
        """Seconds to read or write the checkpoint once."""
        return self.total / DISK_RATE

    @property
    def passes(self) -> float:
        """Seconds of one forward pass over the gate's sets."""
        return 2 * self.parameters * self.tokens / self.rate

    @property
    def buffer(self) -> int:
        """Bytes that a stage holds that goes tensor by tensor."""
        return COPIES * self.largest

    @property
    def ends(self) -> int:
        """Bytes of what lies outside the layers in the compute dtype."""
        return self.outside // 2 * self.wide

    @property
    def one_layer(self) -> int:
        """Bytes of a decoder layer in the compute dtype."""
        return self.layer // 2 * self.wide

    @property
    def on_host(self) -> int:
        """Bytes of the next layer, read while one runs, and of the ends."""
        return self.layer + self.ends

    @property
    def kept_states(self) -> int:
        """Bytes of the hidden states that the gate's walk leaves on disk."""
        return self.boundary * (self.layers + 3)


def sizes_of(ctx: Context) -> Sizes:
    """The sizes of a run's base and sets; reads headers and rows only."""
    key = (ctx.base_id, ctx.compute, ctx.device, repr(ctx.recipe.calibration))
    return ctx.session.kept.one("sizes", key, lambda: _sizes(ctx))


def _sizes(ctx: Context) -> Sizes:
    base = ctx.pair().base
    groups = {layer: sum(_nbytes(base, s) for s in slots) for layer, slots in base.layers()}
    counts = [math.prod(p.shape) for pieces in base.pieces.values() for p in pieces]
    tokens = count_tokens(ctx)
    return Sizes(
        total=sum(e.nbytes for e in base.entries.values()),
        gated=sum(_nbytes(base, s) for s in gated(base.slots.values())),
        layer=max(size for layer, size in groups.items() if layer is not None),
        outside=groups[None],
        largest=max(counts),
        parameters=sum(counts),
        wide=ctx.compute_dtype.itemsize,
        tokens=tokens,
        boundary=tokens * base.config["hidden_size"] * ctx.compute_dtype.itemsize,
        layers=base.num_layers,
        rate=FLOPS["cpu" if ctx.device == "cpu" else "cuda"],
    )


def _nbytes(base: Checkpoint, slot: Slot) -> int:
    return sum(math.prod(p.shape) * p.dtype.itemsize for p in base.pieces[slot.name])


def count_tokens(ctx: Context) -> int:
    """The gate's tokens: of prompts and given targets counted, of those to be decoded reckoned.

    Raises:
        DataError: the chat template refuses a row.
    """
    sets = ctx.recipe.calibration
    return sum(_tokens_of(ctx, s) for s in (sets.reasoning, sets.agent))


def _tokens_of(ctx: Context, section: TargetSet) -> int:
    rows = load_rows(ctx.recipe, section.data)

    def count() -> int:
        tokenizer = load_tokenizer(ctx.base)
        texts = (row.completion for row in rows.rows if row.completion is not None)
        given = sum(len(completion_ids(tokenizer, text)) for text in texts)
        options = section.chat_template_kwargs
        return given + sum(len(prompt_ids(tokenizer, row, options)) for row in rows.rows)

    key = (ctx.tokenizer_id, rows.digest, digest_of(section.chat_template_kwargs))
    known = ctx.session.kept.one(f"tokens of {section.data}", key, count)
    waiting = sum(row.completion is None for row in rows.rows)
    return known + waiting * min(section.max_new_tokens, RECKONED)


def check_disk_space(wanted: Iterable[tuple[Path, int, str]]) -> None:
    """Refuse work whose results cannot fit: (place, bytes, what) each, added up per disk.

    Raises:
        OutputError: a disk has less free than will be written to it.
    """
    disks: dict[int, list[tuple[Path, int, str]]] = defaultdict(list)
    for place, count, what in wanted:
        existing = next(p for p in (place, *place.parents) if p.exists())
        disks[existing.stat().st_dev].append((existing, count, what))
    for parts in disks.values():
        free = shutil.disk_usage(parts[0][0]).free
        total = sum(count for _, count, _ in parts)
        if total > free:
            listed = ", ".join(f"{what} {count / 1e9:.1f} GB" for _, count, what in parts)
            raise OutputError(
                f"{parts[0][0]}: the disk has {free / 1e9:.1f} GB free, the merge will write "
                f"{total / 1e9:.1f} GB: {listed}. Free some, or move --store or --output."
            )
