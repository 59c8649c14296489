"""A checkpoint folder seen in one canonical form.

Canonical is the published form: one tensor per expert and projection. A checkpoint that
stores its experts fused shows the same slots; only the bytes lie elsewhere.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.folder import read_config
from crane_tasks.models.files.layout import Layout, Slot, layout_of
from crane_tasks.models.files.packed import PackedEntry
from crane_tasks.models.files.safetensors_io import (
    DTYPES,
    MERGEABLE,
    Entry,
    Span,
    byte_view,
    read_rows,
    read_span,
)
from crane_tasks.models.files.stored import Stored
from crane_tasks.models.files.wording import listed
from crane_tasks.models.files.wrapped import canonical_name, language_values, wrapper_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """Where one canonical tensor lies: rows [first, last) of a stored tensor."""

    entry: Entry
    first: int
    last: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    @property
    def span(self) -> Span:
        """Its bytes in the file."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(self.shape) * self.dtype.itemsize
        return self.entry.span(self.first * width, count)

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor in its stored dtype, or rows [first, last) of it."""
        rows = self.last - self.first
        last = rows if last is None else last
        if (first, last) == (0, rows):
            return read_rows(self.entry, self.first, self.last, self.shape)
        shape = (last - first, *self.shape[1:])
        return read_rows(self.entry, self.first + first, self.first + last, shape)


@dataclass(frozen=True)
class Source:
    """Where a parameter's bytes lie: the spans one after the other are the whole of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.count for span in self.spans)


@dataclass
class Checkpoint:
    """Headers of a checkpoint folder; weights are read on demand.

    Attributes:
        files: its safetensors files, in the order of the index.
        entries: every stored tensor, in file order; of FP8 what it stands for (`packed.py`).
        metadata: each file's header metadata.
        config: its config.json, or that of the language model within a wrapper.
        wrapper: the model type of a multimodal wrapper (`wrapped.py`); empty without one.
        slots: canonical slots by name; `pieces` holds one piece per expert for each.
        carried: stored names that are copied from the base.
        named: the entries by canonical names, but for what only the wrapper has.
    """

    folder: Path
    config: dict[str, Any]
    layout: Layout
    files: list[Path]
    entries: dict[str, Entry]
    metadata: dict[Path, dict[str, str]]
    wrapper: str = ""
    slots: dict[str, Slot] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    named: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config, index and headers, and classify every tensor; no weights.

        Raises:
            CheckpointError: anything missing, truncated, unlisted or incomplete.
        """
        config = read_config(folder)
        stored, wrapper = Stored.read(folder, config), wrapper_of(config)
        if wrapper:
            config = language_values(folder, config, stored.entries)
        layout = layout_of(str(config.get("model_type", "")))
        parts = (stored.files, stored.entries, stored.metadata)
        checkpoint = cls(folder, config, layout, *parts, wrapper)
        checkpoint._classify()
        return checkpoint

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def packed(self) -> bool:
        """Whether its weights are stored in FP8."""
        return any(isinstance(entry, PackedEntry) for entry in self.entries.values())

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", self.layout.tied))

    def layers(self) -> Iterator[tuple[int | None, list[Slot]]]:
        """Slots grouped: each decoder layer in order, then (None, those outside)."""
        groups: dict[int | None, list[Slot]] = defaultdict(list)
        for slot in self.slots.values():
            groups[slot.layer].append(slot)
        for layer in range(self.num_layers):
            yield layer, groups[layer]
        yield None, groups[None]

    def read(self, slot: str, expert: int = 0) -> Tensor:
        """One tensor of a slot in its stored dtype."""
        return self.pieces[slot][expert].read()

    def read_stack(self, slot: str, experts: slice, *, pinned: bool = False) -> Tensor:
        """Some experts of a slot, [n, out, in], in their stored dtype; [1, ...] of a plain one.

        `pinned`: in page-locked memory.
        """
        pieces = self.pieces[slot][experts]
        shape = (len(pieces), *pieces[0].shape)
        out = torch.empty(shape, dtype=pieces[0].dtype, pin_memory=pinned)
        for row, piece in zip(out, pieces, strict=True):
            read_span(piece.span, byte_view(row))
        return out

    def canonical(self, stored: str) -> str | None:
        """The name that the language model has for a stored tensor; None if it has none."""
        return canonical_name(stored) if self.wrapper else stored

    def stored_parts(self, entry: Entry) -> list[tuple[str, int]]:
        """The (slot, expert) of a stored tensor's bytes, in the order of those bytes."""
        name = self.canonical(entry.name) or entry.name
        templates = self.layout.fused_match(name)
        if templates is None:
            classified = self.layout.classify(name)
            assert classified is not None, "the checkpoint was classified when it was opened"
            slot, expert = classified
            return [(slot.name, expert)]
        return [(t, expert) for expert in range(entry.shape[0]) for t in templates]

    def slots_of(self, name: str) -> tuple[str, ...]:
        """The slots that a parameter of the transformers module is made of, in order of rows.

        A fused parameter [E, rows, columns] has its slots one below the other in each expert.
        """
        if name == HEAD and self.tied:
            return (EMBEDDING,)
        return self.layout.fused_match(name) or (name,)

    def source(self, name: str) -> Source:
        """Where a parameter or buffer of the transformers module lies in the files.

        `name` is the module's name, whose experts are fused whatever the files do: then
        the bytes of all parts, one after the other, are those of the fused parameter.

        Raises:
            CheckpointError: no tensor holds it.
        """
        if name == HEAD and self.tied:
            return self.source(EMBEDDING)
        if name in self.named:
            entry = self.named[name]
            return Source(DTYPES[entry.dtype], entry.shape, (entry.span(),))
        templates = self.layout.fused_match(name)
        if templates is None:
            raise CheckpointError(f"{self.folder}: no tensor for {name}, which the model has")
        parts = [self.pieces[t] for t in templates]
        rows = sum(pieces[0].shape[0] for pieces in parts)
        shape = (len(parts[0]), rows, *parts[0][0].shape[1:])
        spans = tuple(pieces[e].span for e in range(shape[0]) for pieces in parts)
        return Source(parts[0][0].dtype, shape, spans)

    def _classify(self) -> None:
        by_slot: dict[str, dict[int, Piece]] = defaultdict(dict)
        unlisted: list[str] = []
        for stored, entry in self.entries.items():
            name = self.canonical(stored)
            if name is None:
                self.carried.append(stored)
                continue
            self.named[name] = entry
            templates = self.layout.fused_match(name)
            if self.layout.is_carried(name, self.config):
                self.carried.append(stored)
            elif templates is not None:
                self._add_fused(entry, templates, by_slot)
            elif classified := self.layout.classify(name):
                slot, expert = classified
                self.slots[slot.name] = self._adjusted(slot)
                piece = Piece(entry, 0, _rows(entry.shape), entry.shape)
                self._keep(by_slot[slot.name], expert, piece)
            else:
                unlisted.append(name)
        if unlisted:
            raise CheckpointError(
                f"{self.folder}: the layout of {self.layout.model_type} lists no tensor "
                f"{listed(unlisted)}. Add a row to crane_tasks/models/files/layouts."
            )
        self._check_complete(by_slot)
        self.pieces = {
            name: [p for _, p in sorted(experts.items())] for name, experts in by_slot.items()
        }

    def _adjusted(self, slot: Slot) -> Slot:
        """A stored head that is tied to the embedding must stay equal to it."""
        if slot.name == HEAD and self.tied:
            return Slot(slot.name, None, "embedding")
        return slot

    def _add_fused(
        self,
        entry: Entry,
        templates: tuple[str, ...],
        by_slot: dict[str, dict[int, Piece]],
    ) -> None:
        if len(entry.shape) != 3 or entry.shape[1] % len(templates):
            raise CheckpointError(
                f"{entry.file}: {entry.name} should be [experts, rows, columns], is "
                f"{list(entry.shape)}"
            )
        experts, rows, columns = entry.shape
        height = rows // len(templates)
        for index, template in enumerate(templates):
            self.slots[template] = self.layout.classify_slot(template)
            for expert in range(experts):
                first = expert * rows + index * height
                piece = Piece(entry, first, first + height, (height, columns))
                self._keep(by_slot[template], expert, piece)

    def _keep(self, pieces: dict[int, Piece], expert: int, piece: Piece) -> None:
        if expert in pieces:
            raise CheckpointError(
                f"{self.folder}: {pieces[expert].entry.name} and {piece.entry.name} hold the "
                "same weights; remove one of them"
            )
        pieces[expert] = piece

    def _check_complete(self, by_slot: dict[str, dict[int, Piece]]) -> None:
        stacks = [pieces for name, pieces in by_slot.items() if "*" in name]
        experts = max((max(p) + 1 for p in stacks), default=0)
        experts = max(experts, self.layout.number_of_experts(self.config)) if stacks else 0
        problems: list[str] = []
        for name, pieces in by_slot.items():
            count = experts if "*" in name else 1
            problems += [
                f"{name.replace('*', str(e))} is missing" for e in range(count) if e not in pieces
            ]
            kinds = {(p.shape, p.entry.dtype) for p in pieces.values()}
            if len(kinds) > 1:
                problems.append(f"{name}: the experts differ in shape or dtype: {sorted(kinds)}")
            problems += [
                f"{name} is {dtype}, not a float that can be merged"
                for _, dtype in kinds
                if dtype not in MERGEABLE
            ]
        layers = {s.layer for s in self.slots.values() if s.layer is not None}
        if layers != set(range(self.num_layers)):
            problems.append(
                f"the config has {self.num_layers} layers, the files have {sorted(layers)}"
            )
        if problems:
            raise CheckpointError(f"{self.folder}: {listed(problems)}")


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1
