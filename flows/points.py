"""Points of a search: which there are, what is wrong with them, and each measured in memory."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.errors import DamagedArtifact
from artifacts.ref import Ref, digest_of
from artifacts.store import Built
from crane_tasks.apply.stage import APPLY, check_destination
from crane_tasks.errors import RecipeError, ScoreError
from crane_tasks.evaluate.choice import Metrics, Point, Requirement
from crane_tasks.evaluate.metrics import OBJECTIVE, measured_metrics
from crane_tasks.evaluate.point import LOADED, POINT
from crane_tasks.evaluate.stage import EVALUATE, read_comparison, row_losses
from crane_tasks.evaluate.together import companions, walk_together
from crane_tasks.method import Call, build_before, keys_of, made_from, used
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import changed
from crane_tasks.report.sweep import check_sweep_folder
from crane_tasks.session import Context, Session, open_context
from crane_tasks.sizes import check_disk_space
from crane_tasks.stage import Keys
from flows.checks import check_stages, disk_needs
from flows.faults import healing
from flows.grid import Spot

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


def check_metrics(
    recipe: Recipe, where: str, requirements: Sequence[Requirement], *, best: bool
) -> None:
    """Every metric that decides is measured at every point.

    Raises:
        RecipeError: it is not, with what would have it measured.
    """
    metrics = {metric.name for metric in measured_metrics(recipe)}
    if not metrics:
        raise RecipeError(
            f"{recipe.name}: no held-out rows, so points cannot be compared; name "
            "evaluate.reasoning and evaluate.agent in the recipe"
        )
    if recipe.evaluate.engine is not None and recipe.evaluate.generate:
        raise RecipeError(
            f"{recipe.name}: evaluate.engine serves checkpoints, and points are none: set it to "
            "null, or evaluate.generate to 0"
        )
    wanted = {r.metric.partition(".")[0]: f"--require '{r}'" for r in requirements}
    wanted |= {OBJECTIVE.name: "--write best"} if best and OBJECTIVE.name not in wanted else {}
    for metric, what in wanted.items():
        if metric not in metrics:
            raise RecipeError(
                f"{what}: {metric} is not measured at {where}. It takes held-out rows "
                "(evaluate.reasoning, evaluate.agent), and for rates of answers evaluate.generate "
                "above 0."
            )


def open_points(grid: Iterable[Spot], session: Session, contexts: list[Context]) -> list[Candidate]:
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
        if spot.recipe.merge.in_fp8:
            raise RecipeError(
                "merge.output_dtype: points are measured in memory, before FP8 rounds them. Leave "
                "it out here, and merge the chosen point with it."
            )
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


def check_points(candidates: Sequence[Candidate], folder: Path, *, best: bool) -> None:
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


def build_inputs(candidates: Sequence[Candidate], call: Call) -> dict[str, ScoreError]:
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


@dataclass(frozen=True)
class Walked:
    """What a walk of several points has done for one of them.

    Attributes:
        begun: whether an earlier run had begun to measure it.
        seconds: its share of the walk.
    """

    begun: bool
    seconds: float


def walked(candidates: Sequence[Candidate]) -> dict[str, Walked]:
    """The losses of points that are missing, in as few walks of the base as memory allows.

    By the point's key. What ends a walk is met again, and said, by the point whose fault it is.
    """
    if not candidates or candidates[0].ctx.spreads:
        return {}
    begun = {c.keys[EVALUATE].key: POINT.begun(c.ctx, c.keys) for c in candidates}
    found: dict[str, Walked] = {}
    for group in companions([(c.ctx, c.keys) for c in candidates]):
        if len(group) < 2:
            continue
        start = time.monotonic()
        with suppress(*FAULTS, DamagedArtifact):
            walk_together(group)
        share = (time.monotonic() - start) / len(group)
        own = [keys[EVALUATE].key for _, keys in group]
        found |= {key: Walked(begun[key], share) for key in own}
    return found


def measured(
    models: dict[str, Metrics],
    one: Candidate,
    call: Call,
    made: Built | None = None,
    walk: Walked | None = None,
) -> Point:
    """One point, measured or found; its base and donor are noted in `models`.

    `made` is what became of it elsewhere, `walk` what was done for it among others. Its own
    fault makes it a failed point.
    """
    ctx, keys = one.ctx, one.keys

    def measure() -> tuple[Built, dict[str, Any], list[float]]:
        if not (one.evaluated or all(map(ctx.store.has, one.made_from))):
            ctx.session.kept.let_go(LOADED)  # what was damaged is made anew: it may take a model
            build_before(APPLY, ctx, keys, call)
        point = replace(POINT, title=f"point {one.spot.name}")
        if walk is not None:
            point = replace(point, begun=lambda ctx, keys: walk.begun)
        built = call(point, ctx, keys) if made is None else made
        artifact = ctx.store.open(keys[EVALUATE])
        return built, read_comparison(artifact), row_losses(artifact, "merged")

    try:
        built, compared, losses = healing(ctx.session, measure)
    except FAULTS as error:
        return failed(one, error)
    found = compared["models"]
    for name in ("base", "donor"):
        # Of points that did not answer, base and donor have fewer metrics.
        if len(found[name]) > len(models.get(name, ())):
            models[name] = found[name]
    return Point(
        one.spot.alpha,
        one.spot.tau,
        built.status,
        built.seconds + (walk.seconds if walk else 0.0),
        built.ref.key,
        one.spot.changes,
        found["merged"],
        ends=_ends(compared["intervals"]["merged"]),
        losses=losses,
    )


def _ends(intervals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Intervals as numbers of their own."""
    sides = (("low", 0), ("high", 1))
    return {f"{m}.{side}": ends[n] for m, ends in intervals.items() for side, n in sides}


def failed(one: Candidate, error: Exception) -> Point:
    spot, key = one.spot, one.keys[EVALUATE].key
    return Point(spot.alpha, spot.tau, "failed", 0.0, key, spot.changes, error=str(error))


@dataclass
class Bench:
    """Measures one point after the other; what they have in common is found out once.

    Attributes:
        folder: below which the points' outputs would lie.
        models: metrics of base and donor, once a point was measured.
    """

    session: Session
    folder: Path
    call: Call
    contexts: list[Context] = field(default_factory=list)
    models: dict[str, Metrics] = field(default_factory=dict)

    def measure(self, spot: Spot) -> Point:
        """The point, measured or found; what is its own fault makes it a failed one."""
        one = open_points([spot], self.session, self.contexts)[0]
        try:
            check_points([one], self.folder, best=False)
        except FAULTS as error:
            return failed(one, error)
        return measured(self.models, one, self.call)

    def spot(self, recipe: Recipe, point: tuple[float, float, dict[str, Any]], name: str) -> Spot:
        """The recipe with a point's alpha, tau and other changes, under a name of its own."""
        alpha, tau, changes = point
        own = {"alpha": alpha, "tau": tau, "run.output": str(self.folder / name), **changes}
        return NamedSpot(
            alpha, tau, changes, changed(recipe, own, f"{recipe.name} at {name}"), name
        )


@dataclass(frozen=True)
class NamedSpot(Spot):
    """A spot that is called otherwise than by all of its changes, which may be many."""

    title: str

    @property
    def name(self) -> str:
        return self.title
