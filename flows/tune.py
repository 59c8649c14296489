"""A search for the recipe with the least reasoning loss that keeps what is required.

Optuna chooses, a sweep's points are measured in memory. Each trial's losses come first; one
that cannot become the best gets no answers. The search sees the first half of the held-out
rows; what it found is compared with plain methods on the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.ref import digest_of
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.choice import Metrics, Point, Requirement, read_requirement
from crane_tasks.evaluate.metrics import OBJECTIVE, measured_metrics
from crane_tasks.evaluate.point import LOADED
from crane_tasks.evaluate.stage import EVALUATE
from crane_tasks.method import Call, in_this_process
from crane_tasks.places import sweep_folder
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import changed
from crane_tasks.report.sweep import check_sweep_folder
from crane_tasks.session import Session, open_context
from flows.faults import naming_full_disk
from flows.points import Bench, Candidate, check_metrics, check_points, open_points
from flows.rivals import find_rivals, on_other_rows
from flows.space import Space
from flows.split import Split, halves_of, split_heldout
from flows.study import Study, open_study
from flows.trackers import tracker_of
from flows.tune_result import Trials, Tuned, check_result_folder, write_best

if TYPE_CHECKING:
    from optuna import Trial

COSTS = "agent_loss"
# How far from the best point's agent loss to the donor's a point may be to get answers.
HOPELESS = 0.5
PRUNED = "pruned"


def tune(
    session: Session,
    *,
    require: Sequence[str] = (),
    budget: int,
    seed: int = 0,
    folder: Path | None = None,
    call: Call = in_this_process,
) -> Tuned:
    """Search until `budget` points were measured; trials of an earlier run count.

    Args:
        require: bounds that the best point must keep, `tool_calls>=0.99` each.
        folder: of the result; beside the recipe's merge if left out.
        call: runs a stage, as in a sweep.

    Raises:
        BadInput: as `sweep`; the budget is below 1, held-out rows are absent or too few.
    """
    recipe = session.recipe
    requirements = [read_requirement(text) for text in require]
    if budget < 1:
        raise RecipeError(f"--budget {budget}: a search measures 1 point at least")
    if seed < 0:
        raise RecipeError(f"--seed {seed}: 0 or more")
    _check_measured(recipe, requirements)
    tell = tracker_of(session)
    halves = halves_of(recipe)
    place = (folder or sweep_folder(recipe, "tune")).resolve()
    session.store.prepare()
    check_sweep_folder(place, open_context(session).inputs)
    check_result_folder(place)
    with naming_full_disk(session.store.root, place):
        split = split_heldout(recipe, halves, place)
        search = Search(session, split, requirements, Bench(session, place, call), tell)
        try:
            return search.run(budget, seed)
        finally:
            session.kept.let_go(LOADED)


def _check_measured(recipe: Recipe, requirements: Sequence[Requirement]) -> None:
    """All that decides is measured.

    Raises:
        RecipeError: it is not, with what would have it measured.
    """
    check_metrics(recipe, recipe.name, requirements, best=False)
    if OBJECTIVE not in measured_metrics(recipe):
        raise RecipeError(
            f"{recipe.name}: {OBJECTIVE.name} is what a search makes least; name held-out rows in "
            "evaluate.reasoning"
        )


class Search:
    """A search on the rows that it may see."""

    def __init__(
        self,
        session: Session,
        split: Split,
        requirements: list[Requirement],
        bench: Bench,
        tell: Callable[[Point], None],
    ) -> None:
        self.session, self.split, self.requirements = session, split, requirements
        self.tell = tell
        self.bench, self.recipe = bench, split.seen
        own = bench.spot(self.recipe, (self.recipe.alpha, self.recipe.tau, {}), "own")
        self.own = open_points([own], session, bench.contexts)[0]
        check_points([self.own], bench.folder, best=False)
        slots = self.own.ctx.pair().base.slots.values()
        self.space = Space(self.recipe, {s.component for s in slots if s.layer is not None})

    def run(self, budget: int, seed: int) -> Tuned:
        """The trials that are missing, then the comparison on the other rows."""
        trials = Trials(self.recipe, self.bench.folder, self.requirements, budget)
        result = Tuned(trials, seed, self.split.counts)
        name = f"{self.recipe.name}-{self._identity(self.own, seed)[:12]}"
        with open_study(self.session.store.root, name, seed) as study:
            self._recall(study, result, budget)
            while len(trials.points) < budget:
                self._step(study, result)
        trials.write()
        self.session.progress("trials", budget, budget, "trials")
        result.write()
        if result.best is not None:
            self._compare(result, result.best)
            result.write()
        return result

    def _identity(self, own: Candidate, seed: int) -> str:
        """What makes two searches the same one, whatever their budgets."""
        recipe = self.session.recipe.model_copy(update={"name": "any"})
        required = [str(r) for r in self.requirements]
        space = self.space.as_json()
        return digest_of([recipe.published(), own.keys[EVALUATE].key, required, space, seed])

    def _recall(self, study: Study, result: Tuned, budget: int) -> None:
        """Take over what an earlier run of the same search has measured."""
        for place, trial in enumerate(study.finished[:budget]):
            record = trial.user_attrs["record"]
            result.trials.points.append(Point(**record["point"]))
            if record["pruned"]:
                result.reasons[place] = record["pruned"]
        self.bench.models |= study.notes.get("models", {})
        result.trials.models = self.bench.models
        result.known = len(result.trials.points)
        if result.known == budget:
            self.session.notice(
                f"This search is finished: all {budget} trials are known. A larger --budget goes "
                "on from them, another --seed begins anew."
            )
        elif result.known:
            self.session.notice(f"Going on after {result.known} of {budget} trials.")

    def _step(self, study: Study, result: Tuned) -> None:
        """One more trial, and the report with it."""
        trials = result.trials
        place = len(trials.points)
        self.session.progress("trials", place, trials.planned, "trials")
        trial = study.ask(self.space.starts())
        point, pruned = self._measured(trial, trials, f"trial {place}")
        value = point.metrics.get(OBJECTIVE.name)
        cut = pruned or point.error
        record = {"point": _plain(point), "pruned": pruned}
        study.note("models", self.bench.models)
        study.tell(trial, None if cut else value, self._gaps(point), record)
        trials.points.append(point)
        self.tell(point)
        if pruned:
            result.reasons[place] = pruned
        trials.write()

    def _measured(self, trial: "Trial", trials: Trials, name: str) -> tuple[Point, str | None]:
        """A trial's point, and why it was cut short if it was."""
        spot = self.bench.spot(self.recipe, self.space.suggest(trial), name)
        if self.recipe.evaluate.generate and trials.points:
            settings = {"evaluate.generate": 0, "evaluate.suites": []}
            losses = replace(spot, recipe=changed(spot.recipe, settings, name))
            first = replace(self.bench, models={}).measure(losses)
            if first.error is None:
                trial.report(first.metrics.get(OBJECTIVE.name, float("inf")), 0)
                if why := self._hopeless(trial, first.known, trials):
                    return replace(first, status=PRUNED), why
        point = self.bench.measure(spot)
        if point.error is None:
            value = point.metrics.get(OBJECTIVE.name)
            if value is None:
                return replace(point, error="its reasoning loss is not finite"), None
            if not (self.recipe.evaluate.generate and trials.points):
                trial.report(value, 0)
        return point, None

    def _hopeless(self, trial: "Trial", losses: Metrics, trials: Trials) -> str | None:
        """Why answers would tell nothing, or None."""
        broken = [r for r in self.requirements if r.metric in losses and not r.met(losses)]
        if broken:
            return f"{broken[0]} is not kept"
        best = trials.choice.best
        if best is None:
            return None
        known, loss = trials.points[best].metrics, losses.get(OBJECTIVE.name, float("inf"))
        # The pruner knows of no requirement: what beats the best that keeps them may go on.
        if trial.should_prune() and loss >= known[OBJECTIVE.name]:
            return "its reasoning loss is among the worst quarter"
        waits = any(r.metric not in losses for r in self.requirements)
        if waits and COSTS in losses:
            donor = trials.models["donor"][COSTS]
            limit = known[COSTS] + HOPELESS * max(0.0, donor - known[COSTS])
            if losses[COSTS] > limit:
                return f"its agent loss is above {limit:.4g}, half the way to the donor's"
        return None

    def _gaps(self, point: Point) -> list[float]:
        """What is missing of each requirement, relative to its bound; 0 where it is met.

        Of what was not measured all is missing: a point without answers is no model for others.
        """
        gaps = [(r.gap(point.known), abs(r.bound) or 1.0, r) for r in self.requirements]
        return [gap / bound if r.metric in point.known else 1.0 for gap, bound, r in gaps]

    def _compare(self, result: Tuned, best: Point) -> None:
        """The best point and plain methods, on the rows that the search never saw."""
        result.rivals = find_rivals(self.bench, self.recipe, self.requirements)
        there = {name: point for name, point in result.rivals.items() if point is not None}
        other = Bench(self.session, self.bench.folder, self.bench.call)
        points = {"best": best, **there}
        result.unseen, result.ends = on_other_rows(other, self.split.unseen, points)
        at = {"alpha": best.alpha, "tau": best.tau, **best.changes}
        found = changed(self.split.unseen, at, f"the best of {self.recipe.name}")
        result.recipe = write_best(found, self.bench.folder)
        self.session.progress("rivals", 1, 1, "rivals")


def _plain(point: Point) -> dict[str, Any]:
    """A point as JSON values."""
    plain = ("changes", "metrics", "ends")
    told = {**asdict(point), **{name: dict(getattr(point, name)) for name in plain}}
    return {name: value for name, value in told.items() if name != "losses"}
