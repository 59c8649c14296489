"""What output folders and points of a grid are called."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from artifacts.ref import digest_of
from crane_tasks.recipe import Recipe

# Characters that a folder's name should not have, and how long one field's part may be.
UNFIT = re.compile(r"[^A-Za-z0-9._+=]")
LONGEST = 60
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


def output_folder(recipe: Recipe) -> Path:
    """Where the merge goes: `run.output`, or a folder that names recipe, alpha and tau."""
    if recipe.run.output is not None:
        return recipe.place(recipe.run.output).resolve()
    return _among_merges(f"{recipe.name}-{point_name(recipe.alpha, recipe.tau)}")


def sweep_folder(recipe: Recipe, kind: str = "sweep") -> Path:
    """Where the report of a sweep, or of another search, goes: beside the recipe's merge."""
    if recipe.run.output is not None:
        output = recipe.place(recipe.run.output).resolve()
        return output.with_name(f"{output.name}-{kind}")
    return _among_merges(f"{recipe.name}-{kind}")


def report_folder(output: Path) -> Path:
    """The report lies beside the checkpoint, not in it."""
    return output.with_name(f"{output.name}-report")


def _among_merges(name: str) -> Path:
    return (Path.cwd() / "merged" / name).resolve()


def point_name(alpha: float, tau: float, changes: Mapping[str, Any] = NO_CHANGES) -> str:
    """Names a point of a grid; no two points alike. Fit for a folder.

    `changes` are other recipe fields by dotted path: alpha0.25-tau0.03-merge.rounding=nearest.
    """
    parts = [f"alpha{alpha:.15g}", f"tau{tau:.15g}"]
    for path, value in changes.items():
        text = f"{path}={value if isinstance(value, str) else json.dumps(value)}"
        plain = UNFIT.sub("_", text)[:LONGEST]
        parts.append(plain if plain == text else f"{plain}~{digest_of([path, value])[:8]}")
    return "-".join(parts)
