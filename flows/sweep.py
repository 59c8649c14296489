"""A grid of alpha and tau: one merge per point, all sharing the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.store import Store
from crane_tasks.context import Progress, make_context, no_progress, point_name
from crane_tasks.recipe import Recipe, recipe_from
from flows.merge import Call, Merged, all_refs, call_here, check_cheap, merge


@dataclass(frozen=True)
class Point:
    """One point of the grid and what its merge does."""

    alpha: float
    tau: float
    merged: Merged

    @property
    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = self.merged.evaluation.get("models", {}).get("merged", {})
        return found

    def as_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics, **self.merged.as_json()}


def at_point(recipe: Recipe, alpha: float, tau: float, folder: Path | None) -> Recipe:
    """The recipe at a point of the grid, with a folder of its own for the output."""
    data = recipe.model_dump(mode="json", exclude_unset=True)
    data |= {"alpha": alpha, "tau": tau}
    place = folder or (recipe.place(recipe.run.output) if recipe.run.output else None)
    if place is not None:
        output = place / point_name(alpha, tau)
        data["run"] = {**data.get("run", {}), "output": str(output)}
    return recipe_from(data, recipe._folders, recipe.name)


def sweep(
    recipe: Recipe,
    store: Store,
    alphas: Sequence[float],
    taus: Sequence[float],
    *,
    folder: Path | None = None,
    call: Call = call_here,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda _: None,
    force: bool = False,
) -> list[Point]:
    """Merge and evaluate every point. All are checked before the first is computed.

    Raises:
        BadInput: as `merge`; an alpha or tau out of range.
    """
    store.prepare()
    grid = [(a, t, at_point(recipe, a, t, folder)) for a in alphas for t in taus]
    for _, _, point in grid:
        ctx = make_context(point, store, progress)
        check_cheap(ctx, all_refs(ctx), force=force)
    return [
        Point(a, t, merge(point, store, call=call, progress=progress, notice=notice, force=force))
        for a, t, point in grid
    ]
