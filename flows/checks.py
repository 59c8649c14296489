"""What is known to be wrong, and too large for the disk, before anything dear."""

from collections.abc import Iterable
from pathlib import Path

from crane_tasks.errors import EndpointError
from crane_tasks.method import stages_of, used
from crane_tasks.session import Context
from crane_tasks.sizes import check_disk_space
from crane_tasks.stage import Keys, Stage


def check_stages(
    ctx: Context, keys: Keys, stages: Iterable[Stage] | None = None, *, now: bool = True
) -> None:
    """Whatever the stages (by default all of the run's) can refuse cheaply.

    Args:
        now: they are about to be made; else a server that is not there is but told of.

    Raises:
        BadInput: recipe, data or a server is wrong.
    """
    for stage in used(ctx.recipe) if stages is None else stages:
        if stage in keys:
            try:
                stage.check(ctx, keys)
            except EndpointError as error:
                if now:
                    raise
                ctx.session.notice(str(error))


def disk_needs(
    ctx: Context, keys: Keys, stages: Iterable[Stage] | None = None
) -> list[tuple[Path, int, str]]:
    """What stages that are still to be made will write: (place, bytes, stage).

    What an interrupted one has in its draft already is not counted again.
    """
    wanted = []
    for stage in stages_of(keys) if stages is None else stages:
        if stage.stored(ctx, keys):
            continue
        needs = stage.needs(ctx, keys)
        if needs.store:
            drafts = (s for s in (stage, *stage.companions) if s in keys)
            drafted = sum(ctx.store.drafted_bytes(keys[s]) for s in drafts)
            wanted.append((ctx.store.root, needs.store - drafted, stage.name))
        if needs.output:
            wanted.append((ctx.output, needs.output, stage.name))
    return wanted


def check_all(ctx: Context, keys: Keys, *, now: bool = True) -> None:
    """Both of these, for a merge; the output folder was looked at before.

    Raises:
        BadInput: as `check_stages`; a disk has no room.
    """
    check_disk_space(disk_needs(ctx, keys))
    check_stages(ctx, keys, now=now)
