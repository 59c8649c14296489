"""The recipes inside the package, found by name."""

from importlib import resources
from pathlib import Path

from crane_tasks.errors import RecipeError


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(resources.files("flows"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of a shipped one.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"{name}: no such recipe file, nor a shipped recipe ({', '.join(shipped)})"
        )
    return shipped[name]
