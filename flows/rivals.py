"""What a search is held against: plain methods, each at the alpha that suits it best."""

from collections.abc import Sequence

from crane_tasks.evaluate.choice import Metrics, Point, Requirement, choose
from crane_tasks.recipe import Recipe
from flows.points import Bench
from flows.space import plain

# With one donor both are the same formula; the grid is measured for the first alone.
METHODS = ("linear", "task_arithmetic")
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def find_rivals(
    bench: Bench, recipe: Recipe, requirements: Sequence[Requirement]
) -> dict[str, Point | None]:
    """Each method's best point on the recipe's rows that keeps every requirement, if any does."""
    changes, points = plain(recipe, METHODS[0]), []
    for number, alpha in enumerate(ALPHAS):
        bench.session.progress("rivals", number, len(ALPHAS), METHODS[0])
        at = (alpha, recipe.tau, changes)
        points.append(bench.measure(bench.spot(recipe, at, f"{METHODS[0]} {alpha:g}")))
    bench.session.progress("rivals", len(ALPHAS), len(ALPHAS), METHODS[0])
    best = choose(points, requirements).best
    found: dict[str, Point | None] = dict.fromkeys(METHODS)
    if best is not None:
        found[METHODS[0]] = points[best]
        for name in METHODS[1:]:
            at = (points[best].alpha, recipe.tau, plain(recipe, name))
            found[name] = bench.measure(bench.spot(recipe, at, name))
    return found


def on_other_rows(bench: Bench, recipe: Recipe, points: dict[str, Point]) -> dict[str, Metrics]:
    """Metrics of base, donor and some points on the rows of another recipe."""
    found: dict[str, Metrics] = {}
    for name, point in points.items():
        at = (point.alpha, point.tau, dict(point.changes))
        one = bench.measure(bench.spot(recipe, at, f"{name} on unseen rows"))
        found[name] = one.metrics
    return {**bench.models, **found}
