"""Stage `apply`: the merged checkpoint, written shard by shard.

The artifact holds what the output is (files and digests) and what became of the edit; the
weights themselves lie in the output folder.
"""

import json
import math
from collections import defaultdict
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from artifacts.memo import DigestMemo
from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft, Unit, write_atomically
from crane_tasks.card import Facts, model_card, published_name
from crane_tasks.check import load_tokenizer
from crane_tasks.context import Context
from crane_tasks.edit import Edited, Editor, row_factors
from crane_tasks.errors import RecipeError
from crane_tasks.gradients import SETS, open_gradients, read_gradient
from crane_tasks.models.checkpoint import CARD, Checkpoint
from crane_tasks.models.layout import Slot
from crane_tasks.models.safetensors_io import DTYPES, Entry, ShardWriter, read_rows
from crane_tasks.numerics.merge import EditSums, edit_sums
from crane_tasks.output import (
    PROVENANCE,
    RECIPE_COPY,
    Shard,
    check_output,
    copy_side_files,
    holds,
    publish,
    shard_plan,
    write_index,
)
from crane_tasks.scores import read_scores
from crane_tasks.tables import read_table, write_table
from crane_tasks.threshold import PLAIN

STAGE = "apply"
VERSION = 1
COLUMNS = [f.name for f in fields(EditSums)]
SCHEMA = Schema(
    arrays={"tensors": ("float64",), "predicted": ("float64",)}, meta=("file", "size", "digest")
)
# Bytes of float32 into which a carried tensor is cut while it is copied.
COPY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Inputs:
    """The artifacts that the edit is made of."""

    delta: Ref
    threshold: Ref
    scores: Ref
    projector: Ref


def apply_ref(ctx: Context, inputs: Inputs) -> Ref:
    """The key: α, τ, the recipe's `merge` section, the baseline, and the artifacts."""
    recipe = ctx.recipe
    config = {
        "alpha": recipe.alpha,
        "tau": recipe.tau,
        "baseline": recipe.gate.baseline,
        "merge": recipe.merge.model_dump(mode="json"),
    }
    keys = {f.name: getattr(inputs, f.name).key for f in fields(Inputs)}
    inputs_of_base = {
        "base": ctx.base_id,
        "tokenizer": ctx.tokenizer_id,
        "side_files": ctx.side_files_id,
    }
    return Ref(STAGE, VERSION, config, {**inputs_of_base, **keys})


def check_destination(ctx: Context, ref: Ref, *, force: bool) -> bool:
    """Whether the output is there already; refuse one that must not be overwritten.

    Raises:
        OutputError: the folder is an input, or holds something else.
    """
    check_output(ctx.output, ctx.places, key=ref.key, force=force)
    return holds(ctx.output, ref.key, shard_plan(ctx.pair().base, ctx.recipe.run.shard_size))


def check_baseline(ctx: Context) -> None:
    """The baseline that the recipe names is there in every layer.

    Raises:
        RecipeError: it is not, so nothing could be divided by it.
    """
    baseline = ctx.recipe.gate.baseline
    if baseline == "auto":
        return
    layers = [(layer, slots) for layer, slots in ctx.pair().base.layers() if layer is not None]
    lacking = [
        layer for layer, slots in layers if baseline not in {slot.component for slot in slots}
    ]
    if lacking:
        found = sorted({slot.component for _, slots in layers for slot in slots})
        raise RecipeError(
            f"gate.baseline: layer {lacking[0]} has no '{baseline}'. Components of this model: "
            f"{', '.join(found)}."
        )


def check_rows(ctx: Context) -> None:
    """Every row named in `merge` is a token of the base.

    Raises:
        RecipeError: with the unknown ones.
    """
    tokenizer = load_tokenizer(ctx.base)
    for name in PLAIN:
        row_factors(getattr(ctx.recipe.merge, name), len(tokenizer), tokenizer, f"merge.{name}")


def build_apply(
    ctx: Context, ref: Ref, inputs: Inputs, gradients: Ref, *, force: bool = False
) -> Built:
    """Make or find the merged checkpoint. Reused only if the output folder still holds it.

    `gradients` that were kept predict the change of loss; they decide nothing.
    """
    check_destination(ctx, ref, force=force)
    plan = shard_plan(ctx.pair().base, ctx.recipe.run.shard_size)

    def write(draft: Draft) -> None:
        write_apply(ctx, ref, inputs, gradients, draft, force=force)

    # The record alone is not enough: the output may be elsewhere, moved or deleted.
    return ctx.store.build(ref, SCHEMA, write, complete=lambda: holds(ctx.output, ref.key, plan))


def write_apply(
    ctx: Context, ref: Ref, inputs: Inputs, gradients: Ref, draft: Draft, *, force: bool = False
) -> None:
    """Unit of work: an output shard. The folder appears when all of it is written."""
    base = ctx.pair().base
    plan = shard_plan(base, ctx.recipe.run.shard_size)
    units = shard_units(plan)
    folder = ctx.output.with_name(f".{ctx.output.name}.draft-{ref.key}")
    # A kill may have come when the output was there and the store did not know it yet.
    published = all(draft.done(name) for name in units) and holds(ctx.output, ref.key, plan)
    if not published:
        folder.mkdir(parents=True, exist_ok=True)
        draft.belongs(folder)
        _write_shards(ctx, inputs, gradients, units, folder, draft)
    written = [draft.units[name]["meta"] for name in units]
    files = {m["file"]: {"size": m["size"], "digest": m["digest"]} for m in written}
    draft.meta |= {"files": files, "carried": base.carried, "units": list(units)}
    if not published:
        _finish_folder(ctx, ref, inputs, plan, folder, files)
        # Another merge may have taken the place in the meantime.
        check_destination(ctx, ref, force=force)
        publish(folder, ctx.output)
    memo = DigestMemo(ctx.store.root)
    for file, record in files.items():
        memo.remember(ctx.output / file, (ctx.output / file).stat(), record["digest"])


def _write_shards(
    ctx: Context,
    inputs: Inputs,
    gradients: Ref,
    units: dict[str, Shard],
    folder: Path,
    draft: Draft,
) -> None:
    """Every shard that an earlier attempt has not left in the folder."""
    editor = make_editor(ctx, inputs)
    kept = open_gradients(ctx.store, gradients)
    for number, (name, shard) in enumerate(units.items(), start=1):
        target = folder / shard.file
        if not (draft.done(name) and target.exists()):
            with draft.unit(name) as unit:
                unit.meta["file"] = shard.file
                unit.meta |= _write_shard(editor, kept, shard, target, unit)
        ctx.progress(STAGE, number, len(units), "shards")


def shard_units(plan: list[Shard]) -> dict[str, Shard]:
    """The unit of each shard. Its name tells the plan: a run that was killed may have had
    another `run.shard_size`, and its shards must not be taken for these."""
    mark = digest_of([[s.file, [e.name for e in s.entries]] for s in plan])[:8]
    return {f"shard.{mark}.{number}": shard for number, shard in enumerate(plan)}


def make_editor(ctx: Context, inputs: Inputs) -> Editor:
    """The editor over the stages' artifacts.

    Raises:
        ScoreError: the baseline has no positive gain in some layer.
        RecipeError: a row is named by a token that does not exist.
    """
    base, merge = ctx.pair().base, ctx.recipe.merge
    tokenizer = load_tokenizer(ctx.base)
    factors = {
        slot.component: row_factors(
            merge.embedding if slot.component == "embedding" else merge.lm_head,
            base.pieces[slot.name][0].shape[0],
            tokenizer,
            f"merge.{slot.component}",
        )
        for slot in base.slots.values()
        if slot.component in PLAIN
    }
    scores = read_scores(ctx.store.open(inputs.scores), base.layout, ctx.recipe.gate.baseline)
    return Editor(
        recipe=ctx.recipe,
        base=base,
        delta=ctx.store.open(inputs.delta),
        thresholds=ctx.store.open(inputs.threshold),
        scores=scores,
        projector=ctx.store.open(inputs.projector),
        row_factors=factors,
        device=ctx.torch_device,
    )


def _write_shard(
    editor: Editor, gradients: Artifact | None, shard: Shard, target: Path, unit: Unit
) -> dict[str, Any]:
    """Write one file front to back; returns its size and digest."""
    base = editor.base
    carried = set(base.carried)
    part = target.with_name(target.name + ".part")
    rows: list[tuple[str, str, tuple[float, ...]]] = []
    predicted: list[tuple[str, str, tuple[float, ...]]] = []
    announced = [(e.name, e.dtype, e.shape) for e in shard.entries]
    with ShardWriter(part, announced, shard.metadata) as writer:
        for entry in shard.entries:
            if entry.name in carried:
                _copy(entry, writer)
                continue
            for slot_name, expert in base.stored_parts(entry):
                slot = base.slots[slot_name]
                sums, change = EditSums(), [0.0, 0.0]
                for edited in editor.parts(slot, expert):
                    require_finite(edited.stored, slot.tensor_name(expert), editor.recipe.alpha)
                    writer.write(edited.stored)
                    sums += edit_sums(edited.base, edited.intended, edited.stored, edited.delta)
                    change = _predicted(gradients, slot, expert, edited, change)
                name = slot.tensor_name(expert)
                rows.append((name, slot.component, astuple(sums)))
                predicted.append((name, slot.component, tuple(change)))
        digest = writer.close()
    part.replace(target)
    write_table(unit, "tensors", COLUMNS, rows)
    write_table(unit, "predicted", list(SETS), predicted)
    return {"size": writer.size, "digest": digest}


def require_finite(stored: Tensor, name: str, alpha: float) -> None:
    """Refuse a merged tensor that its dtype cannot hold.

    Raises:
        RecipeError: with the tensor's name.
    """
    if not torch.isfinite(stored).all():
        raise RecipeError(
            f"alpha {alpha:g} is too large: the merged {name} is beyond what "
            f"{str(stored.dtype).removeprefix('torch.')} can hold"
        )


def _copy(entry: Entry, writer: ShardWriter) -> None:
    total = entry.nbytes // DTYPES[entry.dtype].itemsize
    step = COPY_BYTES // 4
    for first in range(0, total, step):
        last = min(total, first + step)
        writer.write(read_rows(entry, first, last, (last - first,)))


def _predicted(
    gradients: Artifact | None, slot: Slot, expert: int, edited: Edited, change: list[float]
) -> list[float]:
    """Add Σ g · (realised edit) for both sets; NaN where no gradient was stored.

    Embedding and lm_head are not gated: no gradient is taken, and they add nothing here.
    """
    if slot.component in PLAIN:
        return change
    if gradients is None:
        return [math.nan] * len(SETS)
    realised = edited.stored.float() - edited.base.float()
    found: list[float] = []
    for name, before in zip(SETS, change, strict=True):
        gradient = read_gradient(gradients, name, slot, expert if slot.stacked else None)
        wide = gradient.to(realised.device).float()
        found.append(before + float((wide * realised).sum(dtype=torch.float64)))
    return found


def _finish_folder(
    ctx: Context,
    ref: Ref,
    inputs: Inputs,
    plan: list[Shard],
    folder: Path,
    files: dict[str, Any],
) -> None:
    """Everything beside the weights."""
    base = ctx.pair().base
    wanted = {s.file for s in plan}
    for stale in folder.glob("*.safetensors*"):
        if stale.name not in wanted:
            stale.unlink()
    write_index(base, plan, folder)
    side_files = copy_side_files(ctx.base, folder)
    recipe = ctx.recipe.model_dump(mode="json", exclude={"run"})
    (folder / RECIPE_COPY).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / CARD).write_text(model_card(_facts(ctx, base)))
    keys = {f.name: getattr(inputs, f.name).key for f in fields(Inputs)}
    record = {
        "apply": ref.key,
        "stages": keys,
        "base": {"name": ctx.recipe.base, "identity": ctx.base_id},
        "donor": {"name": ctx.recipe.donor, "identity": ctx.donor_id},
        "recipe": recipe,
        "versions": _versions(),
        "files": files,
        "side_files": {name: (folder / name).stat().st_size for name in side_files},
    }
    write_atomically(folder / PROVENANCE, json.dumps(record, indent=2) + "\n")


def _versions() -> dict[str, str]:
    return {n: metadata.version(n) for n in ("crane-merge", "torch", "transformers")}


def _facts(ctx: Context, base: Checkpoint) -> Facts:
    parameters = sum(torch.Size(e.shape).numel() for e in base.entries.values())
    return Facts(
        recipe=ctx.recipe,
        base=published_name(ctx.recipe, ctx.recipe.base),
        donor=published_name(ctx.recipe, ctx.recipe.donor),
        base_folder=ctx.base,
        config=base.config,
        parameters=parameters,
        transformers=metadata.version("transformers"),
    )


@dataclass(frozen=True)
class EditReport:
    """What became of the edit: per component its sums, and the predicted loss changes."""

    components: dict[str, EditSums]
    predicted: dict[str, float]


def read_edit(artifact: Artifact) -> EditReport:
    """Aggregate an apply artifact over its shards."""
    components: dict[str, EditSums] = defaultdict(EditSums)
    predicted = dict.fromkeys(SETS, 0.0)
    for unit in artifact.meta["units"]:
        for _, component, sums in read_table(artifact, unit, "tensors").rows(EditSums):
            components[component] = components[component] + sums
        table = read_table(artifact, unit, "predicted")
        for row in table.values:
            for name, value in zip(table.columns, row, strict=True):
                predicted[name] += value
    return EditReport(dict(components), predicted)
