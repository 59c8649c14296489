"""Everything beside the weights in the output folder: index, side files, card, provenance."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from artifacts.memo import content_digest
from artifacts.store import write_atomically
from crane_tasks.apply.card import CardFacts, model_card
from crane_tasks.apply.output import PROVENANCE, RECIPE_COPY, Shard, copy_side_files, write_index
from crane_tasks.apply.recipe_copies import HEAD, runnable, shown
from crane_tasks.apply.rows import unlike_words
from crane_tasks.edit import edit_of
from crane_tasks.errors import OutputError
from crane_tasks.identity import name_in_cache, published_name
from crane_tasks.models.files.folder import CARD, INDEX
from crane_tasks.pairing import pair_notes
from crane_tasks.rows import load_rows
from crane_tasks.session import Context
from crane_tasks.stage import Keys


def fill_folder(
    ctx: Context,
    keys: Keys,
    key: str,
    plan: list[Shard],
    folder: Path,
    files: Mapping[str, Any],
) -> None:
    """Complete a draft of the output that holds the weights of a plan.

    Args:
        key: of the merge.
        files: size and digest of each weight file.
    """
    base = ctx.pair().base
    wanted = {s.file for s in plan}
    for stale in folder.glob("*.safetensors*"):
        if stale.name not in wanted:
            stale.unlink()
    fp8 = ctx.recipe.merge.in_fp8
    write_index(base, plan, folder, fp8=fp8)
    side_files = [*copy_side_files(base, folder, fp8=fp8), RECIPE_COPY]
    if (folder / INDEX).exists():
        side_files.append(INDEX)
    sets = ctx.recipe.calibration
    named = {"reasoning": sets.reasoning, "agent": sets.agent, "format": sets.format}
    rows = {name: load_rows(ctx.recipe, own.data) for name, own in named.items()}
    (folder / RECIPE_COPY).write_text(HEAD + yaml.safe_dump(runnable(ctx), sort_keys=False))
    (folder / CARD).write_text(model_card(_facts(ctx)))
    edit = edit_of(ctx.recipe)
    made_from = ["delta", *edit.stages]
    record = {
        "apply": key,
        "stages": {role: keys.refs[role].key for role in made_from},
        "base": _side(published_name(ctx.recipe, ctx.recipe.base), ctx.base_id, ctx.base),
        "donor": _side(published_name(ctx.recipe, ctx.recipe.donor), ctx.donor_id, ctx.donor),
        "recipe": shown(ctx),
        # What a rebuild needs besides: the rows, the shards, and where the bits are the same.
        "rows": {name: {"rows": len(r.rows), "digest": r.digest} for name, r in rows.items()},
        "shard_size": ctx.recipe.run.shard_size,
        "made_on": {
            "device": device_name(ctx),
            "compute": ctx.compute,
            "threads": torch.get_num_threads(),  # sums on a CPU are split among them
        },
        "versions": versions(),
        "files": files,
        "side_files": {name: _small(folder / name) for name in side_files},
    }
    write_atomically(folder / PROVENANCE, json.dumps(record, indent=2) + "\n")


def _small(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "digest": content_digest(file)}


def _side(name: str, identity: str, folder: Path) -> dict[str, str]:
    """Who a side is; of one from the hub its commit, too."""
    known = name_in_cache(folder)
    commit = {} if known is None else {"commit": known[1]}
    return {"name": name, "identity": identity, **commit}


def device_name(ctx: Context) -> str:
    """The GPU's name, or "cpu"."""
    if ctx.torch_device.type != "cuda":
        return ctx.torch_device.type
    return torch.cuda.get_device_name(ctx.torch_device)


def versions() -> dict[str, str]:
    """Those of the packages that decide a merge's bits.

    Raises:
        OutputError: one is on the path without being installed, so nobody knows its version.
    """
    try:
        return {n: metadata.version(n) for n in ("crane-merge", "torch", "transformers")}
    except metadata.PackageNotFoundError as error:
        raise OutputError(
            f"{error.name} is not installed, so that the output could not say what made it. "
            "Install the project's folder or its wheel with pip."
        ) from error


def _facts(ctx: Context) -> CardFacts:
    base = ctx.pair().base
    return CardFacts(
        recipe=ctx.recipe,
        shown=shown(ctx),
        edit=edit_of(ctx.recipe),
        base=published_name(ctx.recipe, ctx.recipe.base),
        donor=published_name(ctx.recipe, ctx.recipe.donor),
        notes=pair_notes(ctx),
        packed=base.packed and not ctx.recipe.merge.in_fp8,
        wrapper=base.wrapper,
        base_folder=ctx.base,
        config=base.config,
        parameters=sum(torch.Size(e.shape).numel() for e in base.entries.values()),
        transformers=metadata.version("transformers"),
        unlike=unlike_words(ctx.unlike()),
    )
