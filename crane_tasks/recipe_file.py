"""Recipes read from YAML, with changes by dotted path on top."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from crane_tasks.errors import RecipeError
from crane_tasks.recipe import TARGET_KINDS, Recipe
from crane_tasks.section import DATA_KINDS


def _set_dotted(data: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {assignment}: write dotted.path=VALUE")
    what = f"--set {assignment}"
    _put(data, path, read_yaml(text, what) if text else None, what)


KINDS = {"targets": TARGET_KINDS, **dict.fromkeys(("data", "reasoning", "agent"), DATA_KINDS)}


# A recipe has some hundreds of values; one that grows to more by its aliases is no recipe.
MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: the second would win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(text: str, what: str) -> Any:
    """YAML values.

    Raises:
        RecipeError: it is no YAML, a key is given twice, or it grows beyond all measure.
    """
    try:
        value = yaml.load(text, _Loader)
        if _values(value, MOST_VALUES) >= MOST_VALUES:
            raise RecipeError(f"{what}: more than {MOST_VALUES:,} values: no recipe")
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{what}: not YAML: {error}") from error
    except RecursionError:
        raise RecipeError(f"{what}: nested too deeply") from None
    return value


def _values(value: Any, most: int) -> int:
    """How many values there are, aliases written out; counting ends at `most`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    count = 1
    for item in inner:
        if count >= most:
            break
        count += _values(item, most - count)
    return count


def _put(data: dict[str, Any], path: str, value: Any, what: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{what}: {parent} is no section")
        data = child
    data[last] = value


def _message(error: ValidationError, what: str) -> str:
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        # pydantic names the kind that it took a value for: no key of the recipe.
        place = ".".join(
            part
            for before, part in zip(["", *parts], parts, strict=False)
            if part not in KINDS.get(before, ())
        )
        text = problem["msg"]
        if problem["type"] == "extra_forbidden":
            text = "unknown key (misspelt?)"
        elif problem["type"] not in ("missing",) and not isinstance(problem["input"], dict):
            text = f"{text}, not {problem['input']!r}"
        lines.append(f"  {place or 'recipe'}: {text}")
    return f"{what}:\n" + "\n".join(lines)


def recipe_from(data: Mapping[str, Any], folders: tuple[Path, ...], what: str) -> Recipe:
    """Validate recipe data whose relative paths are looked for in `folders`.

    Raises:
        RecipeError: with every problem, a line each.
    """
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(_message(error, what)) from error
    recipe._folders = folders
    return recipe


def changed(recipe: Recipe, changes: Mapping[str, Any], what: str) -> Recipe:
    """The recipe with other values for some fields, given by dotted path.

    Raises:
        RecipeError: a path leads through no section, a key is unknown, a value out of range;
            the message names `what`.
    """
    data = recipe.model_dump(mode="json", exclude_unset=True)
    for path, value in changes.items():
        _put(data, path, value, what)
    return recipe_from(data, recipe._folders, what)


def load_recipe(
    path: Path,
    *,
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe file, with changes on top.

    Args:
        path: a YAML file.
        assignments: `dotted.path=VALUE` each, the value in YAML.
        overrides: values by dotted path, which win over both; None is ignored.

    Raises:
        RecipeError: no such recipe, not YAML, unknown keys, values out of range.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    given = list(assignments)
    for assignment in given:
        _set_dotted(data, assignment)
    folders = (path.resolve().parent, Path(os.getcwd()))
    # Who gave a value is not known here: the file or a change on top.
    what = str(path) + (f" with {', '.join(given)}" if given else "")
    for name, value in (overrides or {}).items():
        if value is not None:
            _put(data, name, value, what)
    return recipe_from(data, folders, what)
