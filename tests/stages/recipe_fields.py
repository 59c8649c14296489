"""Every leaf of the recipe's schema, and the stages that the stages themselves say it concerns."""

from collections.abc import Collection, Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crane_tasks.method import used
from crane_tasks.recipe import KEYLESS, Recipe
from crane_tasks.section import Endpoint
from crane_tasks.stage import Source, Stage


def leaves(section: type[BaseModel] = Recipe, before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of every field that is no section."""
    for name, info in section.model_fields.items():
        path, kind = f"{before}{name}", info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{path}.")
            continue
        yield path, info
        if Endpoint in _kinds(kind):
            yield from leaves(Endpoint, f"{path}.")


def _kinds(annotation: Any) -> set[Any]:
    """What a union or an annotated type is made of."""
    parts = get_args(annotation)
    return {annotation} if not parts else {kind for part in parts for kind in _kinds(part)}


def concerns(path: str, names: set[str]) -> bool:
    """Whether a leaf is one of these fields, lies in one, or holds one."""
    return any(f"{path}.".startswith(f"{n}.") or f"{n}.".startswith(f"{path}.") for n in names)


def affected(path: str, recipe: Recipe, roles: Collection[str] = ()) -> set[str]:
    """The roles of the stages whose keys a leaf changes: readers, and what is made from them.

    `roles` are known to change already.
    """
    roles = set(roles)
    if reason(path) is not None:
        return roles
    for stage in used(recipe):
        if concerns(path, stage.reads(recipe)) or _made_from(stage, recipe, roles):
            roles.add(stage.role)
    return roles


def reason(path: str) -> str | None:
    """Why a leaf is in no key, if it is said to be in none."""
    named = (why for name, why in KEYLESS.items() if f"{path}.".startswith(f"{name}."))
    return next(named, None)


def _made_from(stage: Stage, recipe: Recipe, roles: set[str]) -> bool:
    inputs = stage.used_inputs(recipe).values()
    return any(not isinstance(i, Source) and i.role in roles for i in inputs)
