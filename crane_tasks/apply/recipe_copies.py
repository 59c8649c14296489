"""The recipe as a merge records it: for the output folder, and for others' eyes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crane_tasks.identity import name_in_cache, published_name
from crane_tasks.session import Context
from crane_tasks.shipped import PREFIX

HEAD = "# The recipe of this merge; `crane plan crane_recipe.yaml` here finds all of it made.\n"


def runnable(ctx: Context) -> dict[str, Any]:
    """The recipe as it runs from the output folder: commits of hub ids, paths from there."""

    def side(value: str, folder: Path) -> str:
        known = name_in_cache(folder)
        return os.path.relpath(folder, ctx.output) if known is None else "@".join(known)

    def rows(value: str) -> str:
        file = ctx.recipe.locate(value)
        return (
            value if file is None or value.startswith(PREFIX) else os.path.relpath(file, ctx.output)
        )

    return _changed(ctx, side, rows)


def shown(ctx: Context) -> dict[str, Any]:
    """The recipe as others may read it: without what tells of this machine."""

    def side(value: str, folder: Path) -> str:
        return value if not _of_machine(value) else published_name(ctx.recipe, value)

    def rows(value: str) -> str:
        return Path(value).name if _of_machine(value) else value

    return _changed(ctx, side, rows)


def _of_machine(value: str) -> bool:
    return value.startswith(("/", "~", ".."))


def _changed(
    ctx: Context, side: Callable[[str, Path], str], rows: Callable[[str], str]
) -> dict[str, Any]:
    data = ctx.recipe.published(defaults=True)
    data["base"], data["donor"] = side(data["base"], ctx.base), side(data["donor"], ctx.donor)
    sets = [(data["calibration"][name], "data") for name in ("reasoning", "agent", "format")]
    for section, field in [*sets, (data["evaluate"], "reasoning"), (data["evaluate"], "agent")]:
        match section[field]:
            case str(value):
                section[field] = rows(value)
            case {"path": value}:
                section[field]["path"] = rows(value)
    return data
