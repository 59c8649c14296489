"""A checkpoint folder seen in one canonical form, and two of them paired by tensor name.

Canonical is the published form: one tensor per expert and projection. A checkpoint that
stores its experts fused shows the same slots; only the bytes lie elsewhere.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.layout import Layout, Slot, layout_of
from crane_tasks.models.files.safetensors_io import (
    DTYPES,
    MERGEABLE,
    Entry,
    Span,
    byte_view,
    read_header,
    read_rows,
    read_span,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
CARD = "README.md"
OWN_FILES = ("crane.json", "crane_recipe.yaml")  # of an earlier merge: the new one has its own
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
HOW_MANY = 8  # problems of one kind listed in a message before it says "and n more"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = list(names)
    more = f" and {len(names) - HOW_MANY} more" if len(names) > HOW_MANY else ""
    return ", ".join(names[:HOW_MANY]) + more


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
        return Span(self.entry.file, self.entry.start + self.first * width, count)

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
        entries: every stored tensor, in file order.
        metadata: each file's header metadata.
        slots: canonical slots by name; `pieces` holds one piece per expert for each.
        carried: stored names that are copied from the base.
    """

    folder: Path
    config: dict[str, Any]
    layout: Layout
    files: list[Path]
    entries: dict[str, Entry]
    metadata: dict[Path, dict[str, str]]
    slots: dict[str, Slot] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config, index and headers, and classify every tensor; no weights.

        Raises:
            CheckpointError: anything missing, truncated, unlisted or incomplete.
        """
        config = read_config(folder)
        layout = layout_of(str(config.get("model_type", "")))
        files, weight_map = _weight_files(folder)
        entries: dict[str, Entry] = {}
        metadata: dict[Path, dict[str, str]] = {}
        doubled: list[str] = []
        for file in files:
            found, metadata[file] = read_header(file)
            doubled += [e.name for e in found if e.name in entries]
            entries |= {e.name: e for e in found}
        if doubled:
            raise CheckpointError(f"{folder}: stored in more than one file: {listed(doubled)}")
        if weight_map is not None:
            _check_index(folder, weight_map, entries)
        checkpoint = cls(folder, config, layout, files, entries, metadata)
        checkpoint._classify()
        return checkpoint

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

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

    def read_stack(self, slot: str, experts: slice) -> Tensor:
        """Some experts of a slot, [n, out, in], in their stored dtype; [1, ...] of a plain one."""
        pieces = self.pieces[slot][experts]
        out = torch.empty((len(pieces), *pieces[0].shape), dtype=pieces[0].dtype)
        for row, piece in zip(out, pieces, strict=True):
            read_span(piece.span, byte_view(row))
        return out

    def stored_parts(self, entry: Entry) -> list[tuple[str, int]]:
        """The (slot, expert) of a stored tensor's bytes, in the order of those bytes."""
        templates = self.layout.fused_match(entry.name)
        if templates is None:
            found = self.layout.classify(entry.name)
            assert found is not None, "the checkpoint was classified when it was opened"
            return [(found[0].name, found[1])]
        return [(t, expert) for expert in range(entry.shape[0]) for t in templates]

    def slots_of(self, name: str) -> tuple[str, ...]:
        """The slots that a parameter of the transformers module is made of, in order of rows.

        A fused parameter [E, rows, columns] has its slots one below the other in each expert.
        """
        if name == "lm_head.weight" and self.tied:
            return ("model.embed_tokens.weight",)
        return self.layout.fused_match(name) or (name,)

    def source(self, name: str) -> Source:
        """Where a parameter or buffer of the transformers module lies in the files.

        `name` is the module's name, whose experts are fused whatever the files do: then
        the bytes of all parts, one after the other, are those of the fused parameter.

        Raises:
            CheckpointError: no tensor holds it.
        """
        if name == "lm_head.weight" and self.tied:
            return self.source("model.embed_tokens.weight")
        if name in self.entries:
            entry = self.entries[name]
            span = Span(entry.file, entry.start, entry.nbytes)
            return Source(DTYPES[entry.dtype], entry.shape, (span,))
        templates = self.layout.fused_match(name)
        if templates is None:
            raise CheckpointError(f"{self.folder}: no tensor for {name}, which the model has")
        parts = [self.pieces[t] for t in templates]
        rows = sum(pieces[0].shape[0] for pieces in parts)
        shape = (len(parts[0]), rows, *parts[0][0].shape[1:])
        spans = tuple(pieces[e].span for e in range(shape[0]) for pieces in parts)
        return Source(parts[0][0].dtype, shape, spans)

    def _classify(self) -> None:
        found: dict[str, dict[int, Piece]] = defaultdict(dict)
        unlisted: list[str] = []
        for name, entry in self.entries.items():
            templates = self.layout.fused_match(name)
            if self.layout.is_carried(name, self.config):
                self.carried.append(name)
            elif templates is not None:
                self._add_fused(entry, templates, found)
            elif classified := self.layout.classify(name):
                slot, expert = classified
                self.slots[slot.name] = self._adjusted(slot)
                piece = Piece(entry, 0, _rows(entry.shape), entry.shape)
                self._keep(found[slot.name], expert, piece)
            else:
                unlisted.append(name)
        if unlisted:
            raise CheckpointError(
                f"{self.folder}: the layout of {self.layout.model_type} lists no tensor "
                f"{listed(unlisted)}. Add a row to crane_tasks/models/files/layouts."
            )
        self._check_complete(found)
        self.pieces = {name: [p for _, p in sorted(found[name].items())] for name in found}

    def _adjusted(self, slot: Slot) -> Slot:
        """A stored head that is tied to the embedding must stay equal to it."""
        if slot.name == "lm_head.weight" and self.tied:
            return Slot(slot.name, None, "embedding")
        return slot

    def _add_fused(
        self,
        entry: Entry,
        templates: tuple[str, ...],
        found: dict[str, dict[int, Piece]],
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
                self._keep(found[template], expert, piece)

    def _keep(self, pieces: dict[int, Piece], expert: int, piece: Piece) -> None:
        if expert in pieces:
            raise CheckpointError(
                f"{self.folder}: {pieces[expert].entry.name} and {piece.entry.name} hold the "
                "same weights; remove one of them"
            )
        pieces[expert] = piece

    def _check_complete(self, found: dict[str, dict[int, Piece]]) -> None:
        stacks = [pieces for name, pieces in found.items() if "*" in name]
        experts = max((max(p) + 1 for p in stacks), default=0)
        experts = max(experts, self.layout.number_of_experts(self.config)) if stacks else 0
        problems: list[str] = []
        for name, pieces in found.items():
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


def side_files(folder: Path) -> list[str]:
    """Config, tokenizer, chat template and every other file that a merge carries over.

    Left out: weights in any format, their index, the card, hidden files.
    """
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if not (hidden or weights or relative.as_posix() in (CARD, *OWN_FILES)):
            found.append(relative.as_posix())
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: the folder or the file is missing, or it is not a model's config.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{folder}: has no config.json, so it is no checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("num_hidden_layers"), int):
        raise CheckpointError(f"{file}: not the config of a decoder-only language model")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{file}: the checkpoint is quantised ({config['quantization_config']}); "
            "merge the unquantised one"
        )
    return config


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files, and the index's weight map if there is an index."""
    index = folder / INDEX
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files") from error
        if (folder / SINGLE).exists() and folder / SINGLE not in files:
            raise CheckpointError(
                f"{folder}: holds both {INDEX} and {SINGLE}, which loaders choose between "
                "differently. Remove the one that is left over."
            )
        astray = [f.name for f in files if f.parent != folder]
        if astray:
            raise CheckpointError(f"{index}: names files outside the folder: {listed(astray)}")
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise CheckpointError(
                f"{folder}: the index names files that are missing: {listed(missing)}. "
                "Finish the download."
            )
        return files, weight_map
    if (folder / SINGLE).exists():
        return [folder / SINGLE], None
    raise CheckpointError(
        f"{folder}: holds neither {INDEX} nor {SINGLE}. Only safetensors checkpoints are "
        "read; convert others with transformers' save_pretrained."
    )


def _check_index(folder: Path, weight_map: dict[str, str], entries: dict[str, Entry]) -> None:
    absent = [
        f"{name} in {file}"
        for name, file in weight_map.items()
        if name not in entries or entries[name].file.name != file
    ]
    extra = [name for name in entries if name not in weight_map]
    if absent:
        raise CheckpointError(f"{folder}: the index promises what is not there: {listed(absent)}")
    if extra:
        raise CheckpointError(f"{folder}: tensors that the index does not list: {listed(extra)}")


@dataclass(frozen=True)
class Pair:
    """Base and donor with the same slots, experts and shapes."""

    base: Checkpoint
    donor: Checkpoint

    @classmethod
    def open(cls, base: Path, donor: Path) -> "Pair":
        """Open both and compare them; headers only.

        Raises:
            CheckpointError: with every difference of names and shapes in one message.
        """
        pair = cls(Checkpoint.open(base), Checkpoint.open(donor))
        pair._require_match()
        return pair

    def donor_tensor(self, slot: str, expert: int = 0) -> Tensor:
        """The donor's tensor in its stored dtype; a tied head is its embedding."""
        if slot not in self.donor.pieces and slot == "lm_head.weight" and self.donor.tied:
            return self.donor.read("model.embed_tokens.weight")
        return self.donor.read(slot, expert)

    def _require_match(self) -> None:
        base, donor = self.base, self.donor
        if base.layout.model_type != donor.layout.model_type:
            raise CheckpointError(
                f"unlike models: the base is {base.layout.model_type}, the donor "
                f"{donor.layout.model_type}"
            )
        missing = [n for n in base.pieces if n not in donor.pieces]
        surplus = [n for n in donor.pieces if n not in base.pieces]
        if base.tied and donor.tied:
            # A tied head may be stored or not: either way it is the embedding.
            missing = [n for n in missing if n != "lm_head.weight"]
            surplus = [n for n in surplus if n != "lm_head.weight"]
        problems = [f"{n} is only in the base" for n in missing]
        problems += [f"{n} is only in the donor" for n in surplus]
        for name in base.pieces.keys() & donor.pieces.keys():
            ours, theirs = base.pieces[name], donor.pieces[name]
            if len(ours) != len(theirs):
                problems.append(f"{name}: {len(ours)} experts against {len(theirs)}")
            elif ours[0].shape != theirs[0].shape:
                problems.append(f"{name}: {list(ours[0].shape)} against {list(theirs[0].shape)}")
        if problems:
            raise CheckpointError(
                f"base {base.folder} and donor {donor.folder} do not pair: "
                f"{listed(sorted(problems))}"
            )
