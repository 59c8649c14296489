"""The sets of rows that come with CRANE, by name: `crane:reasoning`."""

from importlib import resources
from pathlib import Path

from crane_tasks.errors import RecipeError

PREFIX = "crane:"


def shipped_sets() -> dict[str, Path]:
    """Their files, by name."""
    folder = Path(str(resources.files("flows"))) / "recipes" / "data"
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))}


def shipped_set(value: str) -> Path | None:
    """The file of `crane:NAME`; None of a value that is no such name.

    Raises:
        RecipeError: there is no set so called.
    """
    if not value.startswith(PREFIX):
        return None
    known = shipped_sets()
    name = value.removeprefix(PREFIX)
    if name not in known:
        raise RecipeError(f"{value}: no set of that name; there are {', '.join(known)}")
    return known[name]
