"""Stage `apply`: the merged checkpoint, written shard by shard.

The artifact holds what the output is (files and digests) and what became of the edit; the
weights themselves lie in the output folder.
"""

from collections.abc import Mapping
from dataclasses import astuple, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from artifacts.memo import DigestMemo, content_digest
from artifacts.ref import digest_of
from artifacts.schema import Schema
from artifacts.store import Draft, Unit
from artifacts.tables import write_table
from crane_tasks.apply.editor import Editor, make_editor
from crane_tasks.apply.folder import fill_folder, versions
from crane_tasks.apply.forecast import FORECAST
from crane_tasks.apply.output import (
    Shard,
    check_output,
    held,
    holds,
    publish,
    shard_plan,
    written_bytes,
)
from crane_tasks.apply.packing import PackingWriter, announced
from crane_tasks.apply.pipeline import Pipeline
from crane_tasks.apply.rows import check_rows
from crane_tasks.apply.windows import parts_of_entry
from crane_tasks.delta import DELTA, read_statistics
from crane_tasks.edit import edit_fields, edit_of, edit_stages, not_of_edit, slot_scales
from crane_tasks.errors import OutputError, RecipeError
from crane_tasks.merge_section import LmHead, Merge
from crane_tasks.models.files.safetensors_io import ShardWriter
from crane_tasks.numerics.edit import EditSums
from crane_tasks.parallel import spread_units
from crane_tasks.places import report_folder
from crane_tasks.proof import BASE_SIDE, proven_weights
from crane_tasks.recipe import field_of
from crane_tasks.session import Context
from crane_tasks.sizes import sizes_of
from crane_tasks.stage import BASE, SIDE_FILES, TOKENIZER, Keys, Needs, Source, Stage

COLUMNS = [f.name for f in fields(EditSums)]


ROUNDING = 2  # version of stochastic rounding
# Of the section `merge`: always in the key.
FIRST_FIELDS = ("router", "embedding", "lm_head", "rounding", "seed")


def edit_config(ctx: Context) -> Mapping[str, Any]:
    """What an edit's parts read of the recipe, and its `merge` section."""
    recipe, edit = ctx.settled, edit_of(ctx.settled)
    config = {path.split(".")[-1]: field_of(recipe, path) for path in edit.fields}
    # Keys are older than versions of edits and than some fields: at their defaults, in no key.
    if set(edit.versions) != {1}:
        config["versions"] = edit.versions
    for name, usual in (("unify", False), ("per", "component")):
        if config.get(name) == usual:
            del config[name]
    if config["merge"]["rounding"] == "stochastic":
        config["rounding"] = ROUNDING  # it did nothing to float16 once
    own = Merge().model_dump(mode="json")
    merge = config["merge"]
    config["merge"] = {k: v for k, v in merge.items() if k in FIRST_FIELDS or v != own[k]}
    return config


def check_destination(ctx: Context, keys: Keys) -> bool:
    """Whether the output is there already; refuse one that must not be overwritten.

    Raises:
        OutputError: the folder is an input, or holds something else.
    """
    check_output(ctx.output, ctx.inputs, key=keys[APPLY].key, force=ctx.session.force)
    report = report_folder(ctx.output)
    if report.exists() and not report.is_dir():
        raise OutputError(f"{report}: is where the report goes, and a file. Move it away.")
    return _complete(ctx, keys)


def _complete(ctx: Context, keys: Keys) -> bool:
    """The record alone is not enough: the output may be elsewhere, moved or deleted."""
    return holds(ctx.output, keys[APPLY].key, _plan(ctx), DigestMemo(ctx.store.root))


def _plan(ctx: Context) -> list[Shard]:
    return shard_plan(ctx.pair().base, ctx.recipe.run.shard_size)


def check_head(ctx: Context) -> None:
    """A section that would do nothing is refused.

    Raises:
        RecipeError: `merge.lm_head` is set, and the base's head is its embedding.
    """
    if ctx.pair().base.tied and ctx.recipe.merge.lm_head != LmHead():
        raise RecipeError(
            "merge.lm_head: the base's head is its embedding (tie_word_embeddings), so it would do "
            "nothing. Set merge.embedding, which rules both, and leave merge.lm_head out."
        )


def check_output_dtype(ctx: Context) -> None:
    """FP8 is written with the blocks of a base that has them.

    Raises:
        RecipeError: `merge.output_dtype: fp8`, and the base is not stored so.
    """
    if ctx.recipe.merge.in_fp8 and not ctx.pair().base.packed:
        raise RecipeError(
            "merge.output_dtype: the base is not stored in FP8, so it has no blocks to write in. "
            "Name an FP8 base, or quantise the merge afterwards."
        )


def _check(ctx: Context, keys: Keys) -> None:
    check_head(ctx)
    check_output_dtype(ctx)
    if not ctx.store.has(keys[APPLY]):
        versions()  # the output names them, and should not fail for it when all is written
        check_rows(ctx)
        slot_scales(ctx.recipe.merge.scales, ctx.pair().base.slots.values())
        for part in edit_of(ctx.recipe).parts:
            part.check(ctx, keys)


def unlike_identity(ctx: Context) -> str | None:
    """A digest of the tokens that differ, or None: the donor's tokenizer matters no further."""
    return digest_of(sorted(ctx.unlike().ids)) if ctx.unlike() else None


def write_apply(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Unit of work: an output shard. The folder appears when all of it is written."""
    check_destination(ctx, keys)
    base, key, plan = ctx.pair().base, keys[APPLY].key, _plan(ctx)
    units = shard_units(plan)
    folder = ctx.output.with_name(f".{ctx.output.name}.draft-{key}")
    # A kill may have come when the output was there and the store did not know it yet.
    published = all(draft.done(name) for name in units) and _complete(ctx, keys)
    if not published:
        folder.mkdir(parents=True, exist_ok=True)
        draft.belongs(folder)
        # The stage's own proof ends behind its writing: too late for what is published here.
        with proven_weights(ctx, [BASE_SIDE]):
            _write_shards(ctx, keys, units, folder, draft)
    written = [draft.units[name]["meta"] for name in units]
    files = {m["file"]: {"size": m["size"], "digest": m["digest"]} for m in written}
    draft.meta |= {"files": files, "carried": base.carried, "units": list(units)}
    if not published:
        fill_folder(ctx, keys, key, plan, folder, files)
        _publish(ctx, keys, folder, files)


def _publish(ctx: Context, keys: Keys, folder: Path, files: Mapping[str, Any]) -> None:
    # Of the files that were written: what lies in the output may be another's at once.
    stats = {file: (folder / file).stat() for file in files}
    with held(ctx.output):
        # Another merge may have taken the place in the meantime.
        check_destination(ctx, keys)
        publish(folder, ctx.output)
    memo = DigestMemo(ctx.store.root)
    for file, record in files.items():
        memo.remember(ctx.output / file, stats[file], record["digest"])


def _write_shards(
    ctx: Context, keys: Keys, units: dict[str, Shard], folder: Path, draft: Draft
) -> None:
    """Every shard that an earlier attempt has not left in the folder, as it was written."""
    for name, shard in units.items():
        if draft.done(name) and not _as_written(folder / shard.file, draft.units[name]["meta"]):
            draft.forget(name)
    sizes = {name: sum(e.nbytes for e in shard.entries) for name, shard in units.items()}
    total, written = sum(sizes.values()), 0
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    calls = {n: (keys, shard, folder, before[n], total) for n, shard in units.items()}
    try:
        for name in spread_units(ctx, draft, APPLY.name, _write_shard, calls):
            written += sizes[name]
            _show(ctx, written, total)
    finally:
        ctx.session.kept.let_go("editor")


def _as_written(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether a shard is the one that was written, by its content: no time is believed."""
    if not file.is_file() or file.stat().st_size != record["size"]:
        return False
    return bool(content_digest(file) == record["digest"])


def _show(ctx: Context, written: int, total: int) -> None:
    ctx.progress(APPLY.name, written >> 20, total >> 20, "MB")


def shard_units(plan: list[Shard]) -> dict[str, Shard]:
    """The unit of each shard. Its name tells the plan: a run that was killed may have had
    another `run.shard_size`, and its shards must not be taken for these."""
    mark = digest_of([[s.file, [e.name for e in s.entries]] for s in plan])[:8]
    return {f"shard.{mark}.{number}": shard for number, shard in enumerate(plan)}


def ready_editor(ctx: Context, keys: Keys) -> tuple[Editor, Pipeline]:
    """The editor and its pipeline, made once for all shards that this process writes."""

    def make() -> tuple[Editor, Pipeline]:
        editor = make_editor(ctx, keys)
        return editor, Pipeline(editor)

    key = (keys[APPLY].key, str(ctx.store.root), ctx.device)
    return ctx.session.kept.one("editor", key, make)


def _write_shard(
    ctx: Context, unit: Unit, keys: Keys, shard: Shard, folder: Path, before: int, total: int
) -> None:
    """Write one file front to back; the unit holds its size, digest and the edit's sums."""
    try:
        _write_file(ctx, unit, keys, shard, folder, before, total)
    except BaseException:
        # What an editor holds open may be what was damaged, and will be made anew.
        ctx.session.kept.let_go("editor")
        raise


def _write_file(
    ctx: Context, unit: Unit, keys: Keys, shard: Shard, folder: Path, before: int, total: int
) -> None:
    editor, pipeline = ready_editor(ctx, keys)
    target = folder / shard.file
    part = target.with_name(target.name + ".part")
    fp8 = ctx.recipe.merge.in_fp8
    tensors = announced(shard.entries, fp8=fp8)
    sums: dict[tuple[str, int], list[float]] = {}
    parts = (p for entry in shard.entries for p in parts_of_entry(editor, entry))
    with ShardWriter(part, tensors, shard.metadata) as writer:
        taker = PackingWriter(writer, shard.entries) if fp8 else writer
        for merged in pipeline.run(parts):
            taker.write(merged.data)
            for piece, row in zip(merged.window.parts, merged.sums, strict=True):
                if piece.slot is not None:
                    key = piece.slot.name, piece.expert
                    sums[key] = [a + b for a, b in zip(sums.get(key, [0.0] * 4), row, strict=True)]
            _show(ctx, before + writer.size, total)
        digest = writer.close()
    part.replace(target)
    write_table(unit, "tensors", COLUMNS, _rows(editor, sums))
    unit.meta |= {"file": shard.file, "size": writer.size, "digest": digest}


def _needs(ctx: Context, keys: Keys) -> Needs:
    sizes = sizes_of(ctx)
    fp8 = ctx.recipe.merge.in_fp8
    done = _complete(ctx, keys) and ctx.store.has(keys[APPLY])
    written = 0 if done else written_bytes(ctx.pair().base, fp8=fp8)
    return Needs(
        output=written,
        memory=sizes.buffer,
        device_memory=sizes.buffer,
        seconds=4 * sizes.reading,
    )


APPLY = Stage(
    name="apply",
    version=3,
    schema=Schema(arrays={"tensors": ("float64",)}, meta=("file", "size", "digest")),
    inputs={
        "base": BASE,
        "tokenizer": TOKENIZER,
        "side_files": SIDE_FILES,
        "unlike": Source(unlike_identity, lambda recipe: ("base", "donor")),
        "delta": DELTA,
        **edit_stages(),
    },
    # Of every edit; one that has no gate or no projection does not read what theirs is.
    fields=edit_fields(),
    config=edit_config,
    without=not_of_edit,
    companions=(FORECAST,),
    check=_check,
    complete=_complete,
    write=write_apply,
    needs=_needs,
)


def _rows(
    editor: Editor, sums: Mapping[tuple[str, int], list[float]]
) -> list[tuple[str, str, tuple[float, ...]]]:
    """A row of `EditSums` per tensor; what is known of delta and base is read, not summed."""
    names = {name for name, _ in sums}
    known = {n: read_statistics(editor.delta, editor.base.slots[n]) for n in names}
    rows = []
    for (name, expert), (intended2, realised2, dot, changed) in sums.items():
        slot, given = editor.base.slots[name], known[name][expert]
        whole = EditSums(
            intended2=intended2,
            realised2=realised2,
            dot=dot,
            delta2=given["delta2"],
            base2=given["base2"],
            changed=changed,
            numel=given["numel"],
        )
        rows.append((slot.tensor_name(expert), slot.component, astuple(whole)))
    return rows
