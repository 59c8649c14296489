"""From what a person names to a session."""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from artifacts.store import Store
from crane_tasks.errors import RecipeError
from crane_tasks.recipe_file import load_recipe
from crane_tasks.session import Session
from crane_tasks.user_paths import user_path

DEFAULT_STORE = "crane-store"


def shipped_recipes() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    folder = Path(str(resources.files("flows"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of a shipped one.

    Raises:
        RecipeError: there is neither.
    """
    path = user_path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"{name}: no such recipe file, nor a shipped recipe ({', '.join(shipped)})"
        )
    return shipped[name]


def open_session(
    name: str,
    assignments: Iterable[str] = (),
    *,
    alpha: float | None = None,
    tau: float | None = None,
    output: str | Path | None = None,
    store: str | Path | None = None,
    **heard: Any,
) -> Session:
    """The session of a recipe with its changes, on the store that it asks for.

    The store is ./crane-store by default. `output` and `store` are relative to the current
    folder; what the recipe itself says of them is relative to the recipe.

    Args:
        heard: other fields of the session: progress, notice, force.

    Raises:
        RecipeError: no such recipe, or its contents are wrong.
    """
    places = {
        f"run.{field}": str(user_path(value).absolute())
        for field, value in (("output", output), ("store", store))
        if value is not None
    }
    recipe = load_recipe(
        find_recipe(name),
        assignments=assignments,
        overrides={"alpha": alpha, "tau": tau, **places},
    )
    place = recipe.place(recipe.run.store) if recipe.run.store else Path(DEFAULT_STORE)
    return Session(recipe, Store(place.absolute(), recipe.name), **heard)
