"""The grid of a sweep: alpha, tau and any other recipe field, every combination a point."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from crane_tasks.errors import RecipeError
from crane_tasks.places import point_name
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import changed, read_yaml

# Fields that have an option of their own, or that nothing measured depends on.
OPTIONS = ("alpha", "tau")
MOST_POINTS = 1000
IDLE = ("run", "name")


@dataclass(frozen=True)
class Spot:
    """A place in the grid and the recipe there, whose output is a folder of its own."""

    alpha: float
    tau: float
    changes: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        return point_name(self.alpha, self.tau, self.changes)


def read_numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        RecipeError: something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {text}: write numbers with commas between") from None


def read_axis(text: str) -> tuple[str, list[Any]]:
    """A field and its values: `merge.rounding=nearest,stochastic`, the values in YAML.

    Raises:
        RecipeError: no field, no values, values that are not YAML, or a field that a sweep
            has another option for or that decides nothing.
    """
    what = f"--set-grid {text}"
    path, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not all(path.split(".")):
        raise RecipeError(f"{what}: write dotted.path=VALUE,VALUE")
    if path in OPTIONS:
        raise RecipeError(f"{what}: write --{path} {listed or 'VALUE,VALUE'}")
    if path.split(".")[0] in IDLE:
        raise RecipeError(f"{what}: {path} changes nothing that is measured")
    values = read_yaml(f"[{listed}]", what)
    if not isinstance(values, list) or not values or listed.endswith(","):
        raise RecipeError(f"{what}: write dotted.path=VALUE,VALUE")
    return path, values


def spots(
    recipe: Recipe,
    alphas: Sequence[float],
    taus: Sequence[float],
    fields: Sequence[str],
    folder: Path,
) -> list[Spot]:
    """Every combination, alpha slowest; each recipe is validated.

    Raises:
        RecipeError: the grid is empty, or a value is out of its range.
    """
    axes = [read_axis(text) for text in fields]
    twice = [path for path in {p for p, _ in axes} if sum(p == path for p, _ in axes) > 1]
    if twice:
        raise RecipeError(f"--set-grid {twice[0]}: given twice; list all its values in one")
    points = math.prod([len(alphas), len(taus), *(len(values) for _, values in axes)])
    if points > MOST_POINTS:
        raise RecipeError(
            f"the grid has {points:,} points, a sweep measures {MOST_POINTS:,} at most: "
            "`crane tune` searches where there are too many to try"
        )
    grid = list(_combined(recipe, alphas, taus, axes, folder))
    if not grid:
        raise RecipeError("the grid is empty: give at least one alpha and one tau")
    return grid


def _combined(
    recipe: Recipe,
    alphas: Sequence[float],
    taus: Sequence[float],
    axes: Sequence[tuple[str, list[Any]]],
    folder: Path,
) -> Iterator[Spot]:
    paths = [path for path, _ in axes]
    for alpha, tau, *values in product(alphas, taus, *(listed for _, listed in axes)):
        changes = dict(zip(paths, values, strict=True))
        name = point_name(alpha, tau, changes)
        own = {"alpha": alpha, "tau": tau, "run.output": str(folder / name), **changes}
        yield Spot(alpha, tau, changes, changed(recipe, own, f"{recipe.name} at {name}"))
