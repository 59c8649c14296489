"""A grid of alpha, tau and other fields, measured in memory: no checkpoint is written.

The stages before `apply` run once, the base is loaded once; each point lays its edit over
it, is measured and kept in the store. Only the winner is materialised, and only if asked.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.errors import DamagedArtifact
from artifacts.ref import Ref, digest_of
from artifacts.store import Built
from crane_tasks.apply.stage import APPLY, check_destination
from crane_tasks.errors import RecipeError, ScoreError
from crane_tasks.evaluate.choice import Point, Requirement, read_requirement
from crane_tasks.evaluate.metrics import OBJECTIVE, measured_metrics
from crane_tasks.evaluate.point import LOADED, POINT
from crane_tasks.evaluate.stage import EVALUATE, read_comparison
from crane_tasks.method import Call, build_before, in_this_process, keys_of, made_from, used
from crane_tasks.places import sweep_folder
from crane_tasks.report.sweep import check_sweep_folder
from crane_tasks.session import Context, Session, open_context
from crane_tasks.sizes import check_disk_space
from crane_tasks.stage import Keys
from flows.checks import check_stages, disk_needs
from flows.faults import healing, naming_full_disk
from flows.grid import Spot, spots
from flows.merge import merge
from flows.sweep_result import Sweep

WRITE = ("best",)
# What is one point's own fault: the others are measured all the same.
FAULTS = (RecipeError, ScoreError)


@dataclass(frozen=True)
class Candidate:
    """A spot of the grid with its context and keys."""

    spot: Spot
    ctx: Context
    keys: Keys

    @property
    def evaluated(self) -> bool:
        return self.ctx.store.has(self.keys[EVALUATE])

    @property
    def made_from(self) -> list[Ref]:
        """The artifacts that the edit is made of."""
        return [self.keys[s] for s in made_from(APPLY, self.spot.recipe)]

    @property
    def inputs(self) -> str:
        """Digests what points share that differ in alpha, tau or the `merge` section alone."""
        baseline = self.ctx.recipe.gate.baseline
        return digest_of([baseline, *sorted(ref.key for ref in self.made_from)])


def sweep(
    session: Session,
    alphas: Sequence[float] = (),
    taus: Sequence[float] = (),
    *,
    fields: Sequence[str] = (),
    require: Sequence[str] = (),
    write: str | None = None,
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
    place = (folder or sweep_folder(recipe)).resolve()
    grid = spots(recipe, alphas or [recipe.alpha], taus or [recipe.tau], fields, place)
    for spot in grid:
        _check_metrics(spot, requirements, best=write is not None)
    session.store.prepare()
    candidates = _opened(grid, session, [opened] if opened else [])
    _check_all(candidates, place, best=write is not None)
    result = Sweep(recipe, place, requirements, len(candidates))
    try:
        with naming_full_disk(session.store.root, place):
            _measure_all(result, candidates, call)
    finally:
        session.kept.let_go(LOADED)
    best = result.choice.best
    if write and best is not None:
        merged = merge(replace(session, recipe=candidates[best].spot.recipe), call)
        result.written = merged.ctx.output
    if result.written or result.points[-1].status == "reused":
        result.write()  # else it was written after the last point
    return result


def _check_metrics(spot: Spot, requirements: Sequence[Requirement], *, best: bool) -> None:
    """Every metric that decides is measured at every point.

    Raises:
        RecipeError: it is not, with what would have it measured.
    """
    metrics = {metric.name for metric in measured_metrics(spot.recipe)}
    if not metrics:
        raise RecipeError(
            f"{spot.recipe.name}: no held-out rows, so points cannot be compared; name "
            "evaluate.reasoning and evaluate.agent in the recipe"
        )
    wanted = {r.metric: f"--require '{r}'" for r in requirements}
    wanted |= {OBJECTIVE.name: "--write best"} if best and OBJECTIVE.name not in wanted else {}
    for metric, what in wanted.items():
        if metric not in metrics:
            raise RecipeError(
                f"{what}: {metric} is not measured at {spot.name}. It takes held-out rows "
                "(evaluate.reasoning, evaluate.agent), and for rates of answers evaluate.generate "
                "above 0."
            )


def _opened(grid: Iterable[Spot], session: Session, contexts: list[Context]) -> list[Candidate]:
    """The context and keys of every spot; what is alike is found out once.

    Raises:
        BadInput: as `open_context`; two points are the same.
    """
    candidates: dict[str, Candidate] = {}
    for spot in grid:
        alike = (ctx.with_recipe(spot.recipe) for ctx in contexts)
        ctx = next((ctx for ctx in alike if ctx is not None), None)
        if ctx is None:
            ctx = open_context(replace(session, recipe=spot.recipe))
            contexts.append(ctx)
        candidate = Candidate(spot, ctx, keys_of(ctx))
        key = candidate.keys[EVALUATE].key
        if key in candidates:
            raise RecipeError(
                f"the grid has the same point twice: {candidates[key].spot.name} and {spot.name} "
                "differ in nothing that is measured"
            )
        candidates[key] = candidate
    return list(candidates.values())


class _Once:
    """Tells what comes for the first time."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, *values: Any) -> bool:
        digest = digest_of(values)
        new = digest not in self._seen
        self._seen.add(digest)
        return new


def _check_all(candidates: Sequence[Candidate], folder: Path, *, best: bool) -> None:
    """All that is known to be wrong before weights are read, once for what is alike."""
    check_sweep_folder(folder, candidates[0].ctx.inputs)
    first = _Once()
    needs: list[tuple[Path, int, str]] = []
    there = [check_destination(c.ctx, c.keys) for c in candidates if best]
    for one in candidates:
        if one.evaluated:
            continue
        recipe = one.spot.recipe
        alike = [recipe.gate.baseline, recipe.merge.model_dump(mode="json")]
        fresh = [
            stage
            for stage in used(recipe)
            if stage not in (APPLY, EVALUATE) and first(stage.role, alike[0], one.keys[stage].key)
        ]
        if first("edit", alike):
            fresh.append(APPLY)
        check_stages(one.ctx, one.keys, fresh)
        if first("disk", one.inputs):
            before = {s.role for s in made_from(APPLY, recipe)}
            wanted = [s for s in used(recipe) if s.role in before]
            needs += disk_needs(one.ctx, one.keys, wanted)
    if best and not any(there):
        one = candidates[0]
        needs += disk_needs(one.ctx, one.keys, [APPLY])
    check_disk_space(needs)


def _measure_all(result: Sweep, candidates: Sequence[Candidate], call: Call) -> None:
    """Every point in turn; the report is written after each that was not there before."""
    faults = _build_inputs(candidates, call)
    sent = [c for c in candidates if c.inputs not in faults and not c.evaluated]
    outcomes = _measured_elsewhere(sent)
    for number, one in enumerate(candidates):
        one.ctx.progress("points", number, len(candidates), one.spot.name)
        outcome = faults.get(one.inputs) or (next(outcomes, None) if one in sent else None)
        if isinstance(outcome, Exception):
            point = _failed(one, outcome)
        else:
            point = _measured(result, one, call, outcome)
        result.points.append(point)
        if point.status != "reused":
            result.write()
    candidates[0].ctx.progress("points", len(candidates), len(candidates), "points")


def _measured_elsewhere(candidates: Sequence[Candidate]) -> Iterator[Built | Exception | None]:
    """The points as several workers measure them, in order; none if there are no workers."""
    if not candidates or not candidates[0].ctx.spreads:
        return iter(())
    calls = [(c.ctx.elsewhere(), c.keys) for c in candidates]
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


def _build_inputs(candidates: Sequence[Candidate], call: Call) -> dict[str, ScoreError]:
    """The stages before the edit, once for all missing points that share them.

    Returns the faults by `Candidate.inputs`: a baseline without gain spoils its own points alone.
    """
    first, faults = _Once(), {}
    for one in candidates:
        if one.evaluated or not first(one.inputs):
            continue
        try:
            healing(one.ctx.session, partial(build_before, APPLY, one.ctx, one.keys, call))
        except ScoreError as error:
            faults[one.inputs] = error
    return faults


def _measured(result: Sweep, one: Candidate, call: Call, made: Built | None = None) -> Point:
    """One point, measured or found; its base and donor are noted in the sweep.

    `made` is what became of it elsewhere.
    """
    ctx, keys = one.ctx, one.keys

    def measure() -> tuple[Built, dict[str, Any]]:
        if not (one.evaluated or all(map(ctx.store.has, one.made_from))):
            ctx.session.kept.let_go(LOADED)  # what was damaged is made anew: it may take a model
            build_before(APPLY, ctx, keys, call)
        point = replace(POINT, title=f"point {one.spot.name}")
        built = call(point, ctx, keys) if made is None else made
        return built, read_comparison(ctx.store.open(keys[EVALUATE]))

    try:
        built, compared = healing(ctx.session, measure)
    except FAULTS as error:
        return _failed(one, error)
    models = compared["models"]
    result.models = result.models or {name: models[name] for name in ("base", "donor")}
    return Point(
        one.spot.alpha,
        one.spot.tau,
        built.status,
        built.seconds,
        built.ref.key,
        one.spot.changes,
        models["merged"],
    )


def _failed(one: Candidate, error: Exception) -> Point:
    spot, key = one.spot, one.keys[EVALUATE].key
    return Point(spot.alpha, spot.tau, "failed", 0.0, key, spot.changes, error=str(error))
