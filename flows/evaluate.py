"""Score an existing checkpoint against a recipe's base and donor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts.store import Store
from crane_tasks.calibration import build_targets
from crane_tasks.check import check_vocabulary
from crane_tasks.context import Progress, make_context, no_progress
from crane_tasks.errors import CheckpointError
from crane_tasks.evaluate import build_checkpoint_comparison
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.skeleton import check_parameters
from crane_tasks.recipe import Recipe
from flows.merge import all_refs, check_data, healing
from flows.transient import naming_full_disk


def evaluate(
    recipe: Recipe,
    store: Store,
    checkpoint: Path,
    *,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The metrics of base, donor and the checkpoint on the recipe's rows.

    Raises:
        BadInput: the checkpoint, the recipe or its data are wrong.
    """
    store.waiting = notice
    store.prepare()
    ctx = make_context(recipe, store, progress, notice)
    folder = checkpoint.expanduser().resolve()
    opened = Checkpoint.open(folder)
    if opened.layout.model_type != ctx.pair().base.layout.model_type:
        raise CheckpointError(
            f"{folder} is {opened.layout.model_type}, the recipe's base "
            f"{ctx.pair().base.layout.model_type}"
        )
    check_parameters(opened)
    check_vocabulary(opened, ctx.base)
    refs = all_refs(ctx)
    check_data(ctx, refs)

    def work() -> dict[str, Any]:
        for name, ref in refs.calibration.targets().items():
            build_targets(ctx, getattr(recipe.calibration, name), ref)
        return build_checkpoint_comparison(ctx, folder, refs.sets)[1]

    with naming_full_disk(store.root):
        result = healing(store, work, notice)
    return {"name": recipe.name, "checkpoint": str(folder), **result}
