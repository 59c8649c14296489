"""A grid of alpha, tau and other fields, measured in memory: no checkpoint is written.

The stages before `apply` run once, the base is loaded once; each point lays its edit over
it, is measured and kept in the store. Only the winner is materialised, and only if asked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.errors import DamagedArtifact
from artifacts.ref import Ref, digest_of
from artifacts.store import Built, Store
from crane_tasks.apply import check_baseline, check_destination, check_rows
from crane_tasks.choice import (
    OBJECTIVE,
    Choice,
    Metrics,
    Point,
    Requirement,
    choose,
    read_requirement,
    shortfall,
)
from crane_tasks.context import (
    Context,
    Progress,
    make_context,
    no_progress,
    sweep_folder,
    with_recipe,
)
from crane_tasks.errors import RecipeError, ScoreError
from crane_tasks.evaluate import measured_metrics, read_comparison
from crane_tasks.finite import finite
from crane_tasks.point import build_point, release_base
from crane_tasks.recipe import Recipe
from crane_tasks.room import check_room
from crane_tasks.spread import Spread, here
from crane_tasks.sweep_report import Facts, check_sweep_folder, write_sweep_report
from flows.grid import Spot, spots
from flows.merge import (
    Call,
    Refs,
    all_refs,
    build_inputs,
    call_here,
    check_data,
    disk_needs,
    healing,
    merge,
)
from flows.transient import naming_full_disk

WRITE = ("best",)
# What is one point's own fault: the others are measured all the same.
FAULTS = (RecipeError, ScoreError)


@dataclass(frozen=True)
class Work:
    """A spot of the grid with what it takes to measure it."""

    spot: Spot
    ctx: Context
    refs: Refs

    @property
    def made(self) -> list[Ref]:
        """The artifacts that the edit and its evaluation are made of."""
        r, sets = self.refs, self.refs.calibration
        targets = sets.targets().values()
        return [r.delta, r.threshold, r.scores, r.projector, *targets, sets.format]

    @property
    def inputs(self) -> str:
        """Digests what points share that differ in alpha, tau or the `merge` section alone."""
        return digest_of([self.ctx.recipe.gate.baseline, *(ref.key for ref in self.made)])


@dataclass
class Sweep:
    """What a sweep did and found.

    Attributes:
        points: the finished ones, in the order of the grid.
        models: metrics of base and donor.
        planned: how many points the grid has.
        written: the folder of the best point's checkpoint, if it was materialised.
        report: the HTML page.
    """

    recipe: Recipe
    output: Path
    requirements: list[Requirement]
    planned: int
    points: list[Point] = field(default_factory=list)
    models: dict[str, Metrics] = field(default_factory=dict)
    written: Path | None = None
    report: Path | None = None

    @property
    def choice(self) -> Choice:
        return choose(self.points, self.requirements)

    @property
    def problem(self) -> str | None:
        """Why the sweep is no success although it came to its end, or None."""
        if len(self.points) < self.planned:
            return None
        if not any(self.choice.meets):
            return shortfall(self.points, self.requirements)
        failed = [p for p in self.points if p.error is not None]
        if failed:
            return f"{len(failed)} of {self.planned} points failed. {failed[0]}: {failed[0].error}"
        return None

    def as_json(self) -> dict[str, Any]:
        """The object that `crane sweep --json` prints."""
        choice = self.choice
        found: dict[str, Any] = {
            "name": self.recipe.name,
            "output": str(self.output),
            "report": str(self.report) if self.report else None,
            "require": [str(r) for r in self.requirements],
            "models": self.models,
            "points": [_point_json(p, i, choice) for i, p in enumerate(self.points)],
            "pareto": choice.front,
            "best": choice.best,
            "written": str(self.written) if self.written else None,
        }
        return dict(finite(found))

    def write(self) -> None:
        """Write the report of what there is."""
        self.report = write_sweep_report(self._facts(), self.output)

    def _facts(self) -> Facts:
        return Facts(
            recipe=self.recipe,
            points=self.points,
            choice=self.choice,
            requirements=self.requirements,
            models=self.models,
            planned=self.planned,
            problem=self.problem,
            record=self.as_json(),
        )


def _point_json(point: Point, place: int, choice: Choice) -> dict[str, Any]:
    error = {} if point.error is None else {"error": point.error}
    return {
        "name": point.name,
        "alpha": point.alpha,
        "tau": point.tau,
        "set": dict(point.changes),
        "status": point.status,
        "seconds": round(point.seconds, 3),
        "key": point.key,
        "metrics": dict(point.metrics),
        "pareto": place in choice.front,
        "meets": choice.meets[place],
        **error,
    }


def sweep(
    recipe: Recipe,
    store: Store,
    alphas: Sequence[float] = (),
    taus: Sequence[float] = (),
    *,
    fields: Sequence[str] = (),
    require: Sequence[str] = (),
    write: str | None = None,
    folder: Path | None = None,
    call: Call = call_here,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda _: None,
    spread: Spread = here,
    force: bool = False,
) -> Sweep:
    """Measure every point of a grid; points that were measured before, or merged, are reused.

    All points are checked before the first is computed. The report is written anew after
    every point.

    Args:
        alphas, taus: the recipe's own where they are empty.
        fields: other axes, `dotted.path=VALUE,VALUE` each, the values in YAML.
        require: bounds that the best point must keep, `tool_calls>=0.99` each.
        write: "best" to merge the best point into a folder of its own in the sweep's.
        folder: of the report; beside the recipe's merge if left out.
        force: whatever merge lies where the best point goes may be replaced.

    Raises:
        BadInput: as `merge`; the grid, a requirement or the folder is wrong.
    """
    requirements = [read_requirement(text) for text in require]
    if write not in (None, *WRITE):
        raise RecipeError(f"--write {write}: only '{WRITE[0]}' can be written")
    place = (folder or sweep_folder(recipe)).resolve()
    grid = spots(recipe, alphas or [recipe.alpha], taus or [recipe.tau], fields, place)
    for spot in grid:
        _check_metrics(spot, requirements, best=write is not None)
    store.waiting = notice
    store.prepare()
    work = _prepared(grid, partial(make_context, store=store, progress=progress, notice=notice,
                                   spread=spread))  # fmt: skip
    _check_all(work, place, force=force, best=write is not None)
    found = Sweep(recipe, place, requirements, len(work))
    try:
        with naming_full_disk(store.root, place):
            _measure_all(found, work, call, notice)
    finally:
        release_base()
    best = found.choice.best
    if write and best is not None:
        done = merge(work[best].spot.recipe, store, call=call, progress=progress, notice=notice,
                     spread=spread, force=force)  # fmt: skip
        found.written = done.ctx.output
    if found.written or found.points[-1].status == "reused":
        found.write()  # else it was written after the last point
    return found


def _check_metrics(spot: Spot, requirements: Sequence[Requirement], *, best: bool) -> None:
    """Every metric that decides is measured at every point.

    Raises:
        RecipeError: it is not, with what would have it measured.
    """
    metrics = measured_metrics(spot.recipe)
    if not metrics:
        raise RecipeError(
            f"{spot.recipe.name}: no held-out rows, so points cannot be compared; name "
            "evaluate.reasoning and evaluate.agent in the recipe"
        )
    wanted = {r.metric: f"--require '{r}'" for r in requirements}
    wanted |= {OBJECTIVE: "--write best"} if best and OBJECTIVE not in wanted else {}
    for metric, what in wanted.items():
        if metric not in metrics:
            raise RecipeError(
                f"{what}: {metric} is not measured at {spot.name}. It takes held-out rows "
                "(evaluate.reasoning, evaluate.agent), and for rates of answers evaluate.generate "
                "above 0."
            )


def _prepared(grid: Iterable[Spot], make: Callable[[Recipe], Context]) -> list[Work]:
    """The context and keys of every spot; what is alike is found out once.

    Raises:
        BadInput: as `make_context`; two points are the same.
    """
    contexts: list[Context] = []
    found: dict[str, Work] = {}
    for spot in grid:
        alike = (with_recipe(ctx, spot.recipe) for ctx in contexts)
        ctx = next((ctx for ctx in alike if ctx is not None), None)
        if ctx is None:
            ctx = make(spot.recipe)
            contexts.append(ctx)
        work = Work(spot, ctx, all_refs(ctx))
        key = work.refs.evaluate.key
        if key in found:
            raise RecipeError(
                f"the grid has the same point twice: {found[key].spot.name} and {spot.name} "
                "differ in nothing that is measured"
            )
        found[key] = work
    return list(found.values())


class _Once:
    """Tells what comes for the first time."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, *values: Any) -> bool:
        digest = digest_of(values)
        new = digest not in self._seen
        self._seen.add(digest)
        return new


def _check_all(work: Sequence[Work], folder: Path, *, force: bool, best: bool) -> None:
    """All that is known to be wrong before weights are read, once for what is alike."""
    check_sweep_folder(folder, work[0].ctx.places)
    first = _Once()
    needs: list[tuple[Path, int, str]] = []
    there = [check_destination(w.ctx, w.refs.apply, force=force) for w in work if best]
    for one in work:
        ctx, refs = one.ctx, one.refs
        if ctx.store.has(refs.evaluate):
            continue
        if first("baseline", ctx.base_id, ctx.recipe.gate.baseline):
            check_baseline(ctx)
        if first("rows", ctx.base_id, ctx.recipe.merge.model_dump(mode="json")):
            check_rows(ctx)
        if first("data", one.inputs, {name: ref.key for name, ref in refs.sets.refs.items()}):
            check_data(ctx, refs)
        if first("room", one.inputs):
            needs += disk_needs(ctx, refs, written=True)
    if best and not any(there):
        ctx, refs = work[0].ctx, work[0].refs
        needs += [n for n in disk_needs(ctx, refs, written=False) if n[0] == ctx.output]
    check_room(needs)


def _measure_all(
    found: Sweep, work: Sequence[Work], call: Call, notice: Callable[[str], None]
) -> None:
    """Every point in turn; the report is written after each that was not there before."""
    faults = _build_inputs(work, call, notice)
    sent = [w for w in work if w.inputs not in faults and not w.ctx.store.has(w.refs.evaluate)]
    outcomes = _measured_elsewhere(sent)
    for number, one in enumerate(work):
        one.ctx.progress("points", number, len(work), one.spot.name)
        outcome = faults.get(one.inputs) or (next(outcomes, None) if one in sent else None)
        if isinstance(outcome, Exception):
            point = _failed(one, outcome)
        else:
            point = _measured(found, one, call, notice, outcome)
        found.points.append(point)
        if point.status != "reused":
            found.write()
    work[0].ctx.progress("points", len(work), len(work), "points")


def _measured_elsewhere(work: Sequence[Work]) -> Iterator[Built | Exception | None]:
    """The points as several workers measure them, in order; none if there are no workers."""
    if not work or work[0].ctx.elsewhere() is work[0].ctx:
        return iter(())
    calls = [
        (w.ctx.elsewhere(), w.refs.evaluate, w.refs.apply, w.refs.inputs, w.refs.sets) for w in work
    ]
    return work[0].ctx.spread("point", _point_or_fault, calls)


def _point_or_fault(*point: Any) -> Built | Exception | None:
    """A worker's work. A point's own fault comes back as a value, for others come after it;
    nothing comes back of one that met a damaged artifact, which is mended here."""
    try:
        return build_point(*point)
    except FAULTS as error:
        return error
    except DamagedArtifact:
        return None


def _build_inputs(
    work: Sequence[Work], call: Call, notice: Callable[[str], None]
) -> dict[str, ScoreError]:
    """The stages before the edit, once for all missing points that share them.

    Returns the faults by `Work.inputs`: a baseline without gain spoils its own points alone.
    """
    first, faults = _Once(), {}
    for one in work:
        if one.ctx.store.has(one.refs.evaluate) or not first(one.inputs):
            continue
        try:
            healing(one.ctx.store, partial(build_inputs, one.ctx, one.refs, call), notice)
        except ScoreError as error:
            faults[one.inputs] = error
    return faults


def _measured(
    found: Sweep, one: Work, call: Call, notice: Callable[[str], None], made: Built | None = None
) -> Point:
    """One point, measured or found; its base and donor are noted in the sweep.

    `made` is what became of it elsewhere.
    """
    ctx, r = one.ctx, one.refs

    def measure() -> tuple[Built, dict[str, Any]]:
        if not (ctx.store.has(r.evaluate) or all(map(ctx.store.has, one.made))):
            release_base()  # what was damaged is made anew, which may take a model
            build_inputs(ctx, r, call)
        args = (ctx, r.evaluate, r.apply, r.inputs, r.sets)
        built = call(f"point {one.spot.name}", build_point, *args) if made is None else made
        return built, read_comparison(ctx.store.open(r.evaluate))

    try:
        built, compared = healing(ctx.store, measure, notice)
    except FAULTS as error:
        return _failed(one, error)
    models = compared["models"]
    found.models = found.models or {name: models[name] for name in ("base", "donor")}
    return Point(
        one.spot.alpha,
        one.spot.tau,
        built.status,
        built.seconds,
        built.ref.key,
        one.spot.changes,
        models["merged"],
    )


def _failed(one: Work, error: Exception) -> Point:
    spot, key = one.spot, one.refs.evaluate.key
    return Point(spot.alpha, spot.tau, "failed", 0.0, key, spot.changes, error=str(error))
