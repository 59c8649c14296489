"""Score an existing checkpoint against a recipe's base and donor."""

import json
from pathlib import Path
from typing import Any

from artifacts.store import write_atomically
from crane_tasks.errors import CheckpointError, RecipeError
from crane_tasks.evaluate.measure import MEASURE
from crane_tasks.evaluate.rows import Row
from crane_tasks.evaluate.stage import build_checkpoint_comparison
from crane_tasks.method import keys_of
from crane_tasks.models.check import check_vocabulary
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.skeleton import check_parameters
from crane_tasks.recipe import Recipe
from crane_tasks.session import Context, Session, open_context
from crane_tasks.stage import closure
from crane_tasks.user_paths import user_path
from flows.checks import check_stages
from flows.faults import healing, naming_full_disk


def evaluate(
    session: Session,
    checkpoint: Path,
    *,
    rows: Path | None = None,
    opened: Context | None = None,
) -> dict[str, Any]:
    """The metrics of base, donor and the checkpoint on the recipe's rows.

    Args:
        rows: a JSON Lines file for what each model answered to each row, and how it was graded.

    Raises:
        BadInput: the checkpoint, the recipe or its data are wrong.
    """
    if rows is not None:
        _check_rows_file(rows, session.recipe)
    session.store.prepare()
    ctx = opened or open_context(session)
    folder = user_path(checkpoint).resolve()
    measured = Checkpoint.open(folder)
    if measured.layout.model_type != ctx.pair().base.layout.model_type:
        raise CheckpointError(
            f"{folder} is {measured.layout.model_type}, the recipe's base "
            f"{ctx.pair().base.layout.model_type}"
        )
    check_parameters(measured)
    check_vocabulary(measured, ctx.base)
    keys = keys_of(ctx)
    sets = [stage for stage in closure([MEASURE], ctx.recipe) if stage is not MEASURE]
    check_stages(ctx, keys, sets)

    def work() -> tuple[dict[str, Any], list[Row]]:
        for stage in sets:
            stage.build(ctx, keys)
        return build_checkpoint_comparison(ctx, keys, folder)

    with naming_full_disk(session.store.root):
        result, answered = healing(session, work)
    if rows is not None:
        lines = (json.dumps(row.as_json(), ensure_ascii=False) + "\n" for row in answered)
        write_atomically(rows, "".join(lines))
    return {"name": session.recipe.name, "checkpoint": str(folder), **result}


def _check_rows_file(file: Path, recipe: Recipe) -> None:
    """Refuse what could not be written once all is measured.

    Raises:
        RecipeError: with the reason.
    """
    if not recipe.evaluate.generate:
        raise RecipeError("--rows: nothing is answered while evaluate.generate is 0")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise RecipeError(f"--rows {file}: is no file in a folder that there is")
