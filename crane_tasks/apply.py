"""Stage `apply`: the merged checkpoint, written shard by shard.

The artifact holds what the output is (files and digests) and what became of the edit; the
weights themselves lie in the output folder.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields
from functools import lru_cache
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import yaml

from artifacts.memo import DigestMemo
from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft, Unit, write_atomically
from crane_tasks.card import Facts, model_card, published_name
from crane_tasks.check import load_tokenizer
from crane_tasks.context import Context
from crane_tasks.delta import read_statistics
from crane_tasks.edit import Editor, row_factors
from crane_tasks.errors import RecipeError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.folder import CARD
from crane_tasks.models.files.safetensors_io import ShardWriter
from crane_tasks.numerics.edit import EditSums
from crane_tasks.output import (
    PROVENANCE,
    RECIPE_COPY,
    Shard,
    check_output,
    copy_side_files,
    held,
    holds,
    publish,
    shard_plan,
    write_index,
)
from crane_tasks.pipeline import Pipeline, parts_of_entry
from crane_tasks.scores import read_scores
from crane_tasks.spread import spread_units
from crane_tasks.tables import read_table, write_table
from crane_tasks.threshold import PLAIN

STAGE = "apply"
VERSION = 2
COLUMNS = [f.name for f in fields(EditSums)]
SCHEMA = Schema(arrays={"tensors": ("float64",)}, meta=("file", "size", "digest"))


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


def build_apply(ctx: Context, ref: Ref, inputs: Inputs, *, force: bool = False) -> Built:
    """Make or find the merged checkpoint. Reused only if the output folder still holds it."""
    check_destination(ctx, ref, force=force)
    plan = shard_plan(ctx.pair().base, ctx.recipe.run.shard_size)

    def write(draft: Draft) -> None:
        write_apply(ctx, ref, inputs, draft, force=force)

    # The record alone is not enough: the output may be elsewhere, moved or deleted.
    return ctx.store.build(ref, SCHEMA, write, complete=lambda: holds(ctx.output, ref.key, plan))


def write_apply(
    ctx: Context, ref: Ref, inputs: Inputs, draft: Draft, *, force: bool = False
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
        _write_shards(ctx, ref, inputs, units, folder, draft)
    written = [draft.units[name]["meta"] for name in units]
    files = {m["file"]: {"size": m["size"], "digest": m["digest"]} for m in written}
    draft.meta |= {"files": files, "carried": base.carried, "units": list(units)}
    memo = DigestMemo(ctx.store.root)
    if not published:
        _finish_folder(ctx, ref, inputs, plan, folder, files)
        # Of the files that were written: what lies in the output may be another's at once.
        stats = {file: (folder / file).stat() for file in files}
        with held(ctx.output):
            # Another merge may have taken the place in the meantime.
            check_destination(ctx, ref, force=force)
            publish(folder, ctx.output)
        for file, record in files.items():
            memo.remember(ctx.output / file, stats[file], record["digest"])


def _write_shards(
    ctx: Context, ref: Ref, inputs: Inputs, units: dict[str, Shard], folder: Path, draft: Draft
) -> None:
    """Every shard that an earlier attempt has not left in the folder."""
    for name, shard in units.items():
        if not (folder / shard.file).exists():
            draft.forget(name)
    sizes = {name: sum(e.nbytes for e in shard.entries) for name, shard in units.items()}
    total, written = sum(sizes.values()), 0
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    calls = {n: (ref, inputs, shard, folder, before[n], total) for n, shard in units.items()}
    try:
        for name in spread_units(ctx, draft, STAGE, _write_shard, calls):
            written += sizes[name]
            _show(ctx, written, total)
    finally:
        _ready.cache_clear()


def _show(ctx: Context, written: int, total: int) -> None:
    ctx.progress(STAGE, written >> 20, total >> 20, "MB")


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
        carried=frozenset(base.carried),
    )


@dataclass(frozen=True)
class _Known:
    """What an editor is made from, known by what it makes, from which store, on which device."""

    key: str
    context: Context = field(compare=False)
    inputs: Inputs = field(compare=False)


@lru_cache(maxsize=1)
def _ready(known: _Known) -> tuple[Editor, Pipeline]:
    """The editor and its pipeline, made once for all shards that this process writes."""
    editor = make_editor(known.context, known.inputs)
    return editor, Pipeline(editor)


@contextmanager
def _forgotten_on_error() -> Iterator[None]:
    """What an editor holds open may be what was damaged, and will be made anew."""
    try:
        yield
    except BaseException:
        _ready.cache_clear()
        raise


@_forgotten_on_error()
def _write_shard(
    ctx: Context,
    unit: Unit,
    ref: Ref,
    inputs: Inputs,
    shard: Shard,
    folder: Path,
    before: int,
    total: int,
) -> None:
    """Write one file front to back; the unit holds its size, digest and the edit's sums."""
    place = f"{ref.key} {ctx.store.root} {ctx.device}"
    editor, pipeline = _ready(_Known(place, ctx, inputs))
    target = folder / shard.file
    part = target.with_name(target.name + ".part")
    announced = [(e.name, e.dtype, e.shape) for e in shard.entries]
    sums: dict[tuple[str, int], list[float]] = {}
    parts = (p for entry in shard.entries for p in parts_of_entry(editor, entry))
    with ShardWriter(part, announced, shard.metadata) as writer:
        for merged in pipeline.run(parts):
            writer.write(merged.data)
            for piece, row in zip(merged.window.parts, merged.sums, strict=True):
                if piece.slot is not None:
                    key = piece.slot.name, piece.expert
                    sums[key] = [a + b for a, b in zip(sums.get(key, [0.0] * 4), row, strict=True)]
            _show(ctx, before + writer.size, total)
        digest = writer.close()
    part.replace(target)
    write_table(unit, "tensors", COLUMNS, _rows(editor, sums))
    unit.meta |= {"file": shard.file, "size": writer.size, "digest": digest}


def _rows(
    editor: Editor, sums: Mapping[tuple[str, int], list[float]]
) -> list[tuple[str, str, tuple[float, ...]]]:
    """A row of `EditSums` per tensor; what is known of delta and base is read, not summed."""
    names = {name for name, _ in sums}
    known = {n: read_statistics(editor.delta, editor.base.slots[n]) for n in names}
    rows = []
    for (name, expert), (intended2, realised2, dot, changed) in sums.items():
        slot, given = editor.base.slots[name], known[name][expert]
        found = EditSums(
            intended2=intended2,
            realised2=realised2,
            dot=dot,
            delta2=given["delta2"],
            base2=given["base2"],
            changed=changed,
            numel=given["numel"],
        )
        rows.append((slot.tensor_name(expert), slot.component, astuple(found)))
    return rows


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


def read_edit(artifact: Artifact) -> dict[str, EditSums]:
    """What became of the edit: per component its sums, over all shards."""
    components: dict[str, EditSums] = defaultdict(EditSums)
    for unit in artifact.meta["units"]:
        for _, component, sums in read_table(artifact, unit, "tensors").rows(EditSums):
            components[component] = components[component] + sums
    return dict(components)
