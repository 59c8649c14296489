"""Score an existing checkpoint against a recipe's base and donor."""

from pathlib import Path
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.evaluate.measure import MEASURE
from crane_tasks.evaluate.stage import build_checkpoint_comparison
from crane_tasks.method import keys_of
from crane_tasks.models.check import check_vocabulary
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.skeleton import check_parameters
from crane_tasks.session import Context, Session, open_context
from crane_tasks.stage import closure
from crane_tasks.user_paths import user_path
from flows.checks import check_stages
from flows.faults import healing, naming_full_disk


def evaluate(
    session: Session, checkpoint: Path, *, opened: Context | None = None
) -> dict[str, Any]:
    """The metrics of base, donor and the checkpoint on the recipe's rows.

    Raises:
        BadInput: the checkpoint, the recipe or its data are wrong.
    """
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

    def work() -> dict[str, Any]:
        for stage in sets:
            stage.build(ctx, keys)
        return build_checkpoint_comparison(ctx, keys, folder)[1]

    with naming_full_disk(session.store.root):
        result = healing(session, work)
    return {"name": session.recipe.name, "checkpoint": str(folder), **result}
