"""A grid of alpha, tau and other fields, measured in memory: no checkpoint is written.

The stages before `apply` run once, the base is loaded once; each point lays its edit over
it, is measured and kept in the store. Only the winner is materialised, and only if asked.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from artifacts.errors import DamagedArtifact
from artifacts.store import Built
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.choice import Point, choose, ranked, read_requirement
from crane_tasks.evaluate.point import LOADED, POINT
from crane_tasks.evaluate.stage import EVALUATE
from crane_tasks.method import Call, in_this_process
from crane_tasks.places import sweep_folder
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import changed
from crane_tasks.session import Context, Session
from crane_tasks.stage import Keys
from flows.faults import naming_full_disk
from flows.grid import Spot, spots
from flows.merge import merge
from flows.points import (
    FAULTS,
    Candidate,
    build_inputs,
    check_metrics,
    check_points,
    failed,
    measured,
    open_points,
    walked,
)
from flows.sweep_result import Sweep
from flows.trackers import tracker_of

WRITE = ("best",)
ALL, FRONT = "all", "front"
# Of a point that answers later, or never.
LOSSES_ALONE = {"evaluate.generate": 0, "evaluate.suites": []}


def sweep(
    session: Session,
    alphas: Sequence[float] = (),
    taus: Sequence[float] = (),
    *,
    fields: Sequence[str] = (),
    require: Sequence[str] = (),
    write: str | None = None,
    answers: str = ALL,
    folder: Path | None = None,
    call: Call = in_this_process,
    opened: Context | None = None,
) -> Sweep:
    """Measure every point of a grid; points that were measured before, or merged, are reused.

    All points are checked before the first is computed. The report is written anew after
    every point.

    Args:
        alphas, taus: the recipe's own where they are empty.
        fields: other axes, `dotted.path=VALUE,VALUE` each, the values in YAML.
        require: bounds that the best point must keep, `tool_calls>=0.99` each.
        write: "best" to merge the best point into a folder of its own in the sweep's.
        answers: which points answer held-out prompts: "all"; "front", those that no other one
            beats by its losses; or "best:N", the N of the least reasoning loss.
        folder: of the report; beside the recipe's merge if left out.
        call: runs a stage: in this process, or as a Prefect task.
        opened: the session's context, where it is there already.

    Raises:
        BadInput: as `merge`; the grid, a requirement or the folder is wrong.
    """
    recipe = session.recipe
    requirements = [read_requirement(text) for text in require]
    if write not in (None, *WRITE):
        raise RecipeError(f"--write {write}: only '{WRITE[0]}' can be written")
    picked = read_answers(answers, recipe)
    place = (folder or sweep_folder(recipe)).resolve()
    grid = spots(recipe, alphas or [recipe.alpha], taus or [recipe.tau], fields, place)
    for spot in grid:
        check_metrics(spot.recipe, spot.name, requirements, best=write is not None)
    tell = tracker_of(session)
    session.store.prepare()
    contexts = [opened] if opened else []
    candidates = open_points(grid, session, contexts)
    check_points(candidates, place, best=write is not None)
    first = open_points(map(_of_losses, grid), session, contexts) if picked else candidates
    result = Sweep(recipe, place, requirements, len(candidates))
    try:
        with naming_full_disk(session.store.root, place):
            for point in _points(first, result, call):
                result.points.append(point)
                if picked is None:
                    tell(point)
                if point.status != "reused":
                    result.write()
            if picked is not None:
                _answer(result, candidates, picked(result.points), call, tell)
    finally:
        session.kept.let_go(LOADED)
    best = result.choice.best
    if write and best is not None:
        merged = merge(replace(session, recipe=candidates[best].spot.recipe), call)
        result.written = merged.ctx.output
    if result.written or result.points[-1].status == "reused":
        result.write()  # else it was written after the last point
    return result


def read_answers(text: str, recipe: Recipe) -> Callable[[Sequence[Point]], list[int]] | None:
    """Picks the points that answer from those whose losses are known; None: all of them.

    Raises:
        RecipeError: it is none of the ways, or nothing is answered at all.
    """
    if text == ALL:
        return None
    best = text.removeprefix("best:")
    if text != FRONT and not (text.startswith("best:") and best.isdecimal() and int(best) > 0):
        raise RecipeError(f"--answers {text}: write {ALL}, {FRONT} or best:N")
    if not (recipe.evaluate.generate or recipe.evaluate.suites):
        raise RecipeError(f"--answers {text}: nothing is answered while evaluate.generate is 0")
    if text == FRONT:
        return lambda points: sorted(choose(points, []).front)
    return lambda points: sorted(ranked(points)[: int(best)])


def _of_losses(spot: Spot) -> Spot:
    """The same point without answers."""
    return replace(spot, recipe=changed(spot.recipe, LOSSES_ALONE, spot.name))


def _answer(
    result: Sweep,
    candidates: Sequence[Candidate],
    places: Sequence[int],
    call: Call,
    tell: Callable[[Point], None],
) -> None:
    """Measure some points again, with their answers."""
    for place, point in enumerate(result.points):
        if place not in places:
            tell(point)
    chosen = [candidates[place] for place in places]
    for place, point in zip(places, _points(chosen, result, call) if chosen else (), strict=True):
        result.points[place] = point
        tell(point)
        result.write()


def _points(candidates: Sequence[Candidate], result: Sweep, call: Call) -> Iterator[Point]:
    """Every point in turn; base and donor are noted in the result."""
    faults = build_inputs(candidates, call)
    walks = walked([c for c in candidates if c.inputs not in faults and not c.evaluated])
    sent = [c for c in candidates if c.inputs not in faults and not c.evaluated]
    outcomes = _measured_elsewhere(sent)
    for number, one in enumerate(candidates):
        one.ctx.progress("points", number, len(candidates), one.spot.name)
        outcome = faults.get(one.inputs) or (next(outcomes, None) if one in sent else None)
        if isinstance(outcome, Exception):
            point = failed(one, outcome)
        else:
            walk = walks.get(one.keys[EVALUATE].key)
            point = measured(result.models, one, call, outcome, walk)
        yield point
    candidates[0].ctx.progress("points", len(candidates), len(candidates), "points")


def _measured_elsewhere(candidates: Sequence[Candidate]) -> Iterator[Built | Exception | None]:
    """The points as several workers measure them, in order; none if there are no workers."""
    if not candidates or not candidates[0].ctx.spreads:
        return iter(())
    calls = [(c.ctx.elsewhere(number), c.keys) for number, c in enumerate(candidates)]
    return candidates[0].ctx.session.spread("point", _point_or_fault, calls)


def _point_or_fault(ctx: Context, keys: Keys) -> Built | Exception | None:
    """A worker's work. A point's own fault comes back as a value, for others come after it;
    nothing comes back of one that met a damaged artifact, which is mended here."""
    try:
        return POINT.build(ctx, keys)
    except FAULTS as error:
        return error
    except DamagedArtifact:
        return None
