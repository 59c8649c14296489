"""A recipe of one's own, from one that comes with CRANE, its comments kept."""

import re
from pathlib import Path

from crane_tasks.errors import OutputError, RecipeError
from crane_tasks.recipe_file import load_recipe
from crane_tasks.user_paths import user_path
from flows.opening import shipped_recipes

NEWLINE = "\n"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PATH = re.compile(r"(?<=: )[\w./-]+/[\w./-]+")
HEAD = """# {name}: from the recipe {source}. Every field: docs/recipe.md, `crane schema`.
#   crane plan {file}     what it takes, before anything is loaded
#   crane merge {file}
"""


def write_recipe(name: str, source: str, base: str | None, donor: str | None, folder: Path) -> Path:
    """Write `NAME.yaml` into a folder.

    Args:
        source: a shipped recipe's name.
        base, donor: folders or hub ids; the source's own if left out.

    Raises:
        RecipeError: no such source, or not a name.
        OutputError: there is such a file.
    """
    known = shipped_recipes()
    if source not in known:
        raise RecipeError(f"--from {source}: no such recipe; there are {', '.join(known)}")
    if not NAME.fullmatch(name):
        raise RecipeError(f"{name}: a recipe's name has letters, digits, dots, dashes and _ alone")
    file = folder / f"{name}.yaml"
    if file.exists():
        raise OutputError(f"{file}: is there already. Choose another name.")
    place = known[source].parent
    _, end, text = known[source].read_text().partition("\n")  # without its title
    text = end + PATH.sub(lambda path: _portable(path[0], place), text)
    for key, value in (("name", name), ("base", base), ("donor", donor)):
        if value is not None:
            before, _, rest = text.partition(f"\n{key}: ")
            text = f"{before}\n{key}: {_written(key, value)}\n{rest.partition(NEWLINE)[2]}"
    file.write_text(HEAD.format(name=name, source=source, file=file.name) + text.lstrip())
    load_recipe(file)
    return file


def _portable(path: str, place: Path) -> str:
    """A path that is beside the shipped recipe, as it is found from anywhere."""
    file = place / path
    return str(file) if file.exists() else path


def _written(key: str, value: str) -> str:
    """A folder by its whole path, so that the recipe may lie elsewhere."""
    folder = user_path(value)
    return str(folder.absolute()) if key != "name" and folder.is_dir() else value
