"""What a search is held against: plain methods, each at the alpha that suits it best."""

from collections.abc import Sequence

from crane_tasks.evaluate.choice import Metrics, Point, Requirement, choose
from crane_tasks.recipe import Recipe
from flows.points import Bench
from flows.space import plain

# With one donor both are the same formula; alphas are measured for the first alone.
METHODS = ("linear", "task_arithmetic")
STEP = 0.1
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# How often the best alpha's neighbours are looked at, each time half as far away: a coarse grid
# alone would stop well before the alpha at which a requirement breaks.
HALVINGS = 3


def find_rivals(
    bench: Bench, recipe: Recipe, requirements: Sequence[Requirement]
) -> dict[str, Point | None]:
    """Each method's best point on the recipe's rows that keeps every requirement, if any does."""
    best = _best_alpha(bench, recipe, requirements)
    found: dict[str, Point | None] = dict.fromkeys(METHODS)
    if best is not None:
        found[METHODS[0]] = best
        for name in METHODS[1:]:
            at = (best.alpha, recipe.tau, plain(recipe, name))
            found[name] = bench.measure(bench.spot(recipe, at, name))
    return found


def _best_alpha(bench: Bench, recipe: Recipe, requirements: Sequence[Requirement]) -> Point | None:
    """The first method's best point: of the grid, then of what lies ever closer around."""
    method, points = METHODS[0], list[Point]()
    planned = len(ALPHAS) + 2 * HALVINGS

    def measure(alphas: Sequence[float]) -> Point | None:
        for alpha in alphas:
            bench.session.progress("rivals", len(points), planned, method)
            at = (alpha, recipe.tau, plain(recipe, method))
            points.append(bench.measure(bench.spot(recipe, at, f"{method} {alpha:g}")))
        best = choose(points, requirements).best
        return None if best is None else points[best]

    best = measure(ALPHAS)
    for halving in range(1, HALVINGS + 1):
        if best is not None:
            step = STEP / 2**halving
            best = measure([round(best.alpha - step, 6), round(best.alpha + step, 6)])
    bench.session.progress("rivals", planned, planned, method)
    return best


def on_other_rows(
    bench: Bench, recipe: Recipe, points: dict[str, Point]
) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    """Metrics of base, donor and some points on the rows of another recipe, and of the points
    the ends of their intervals."""
    found: dict[str, Metrics] = {}
    ends: dict[str, Metrics] = {}
    for name, point in points.items():
        at = (point.alpha, point.tau, dict(point.changes))
        one = bench.measure(bench.spot(recipe, at, f"{name} on unseen rows"))
        found[name], ends[name] = one.metrics, one.ends
    return {**bench.models, **found}, ends
