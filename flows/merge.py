"""The whole method on one screen: which stages run, in which order, on what.

One definition, two drivers: `call` runs a stage in this process, or as a Prefect task.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from artifacts.errors import DamagedArtifact
from artifacts.ref import Ref
from artifacts.store import Built, Store
from crane_tasks.apply import (
    Inputs,
    apply_ref,
    build_apply,
    check_baseline,
    check_destination,
    check_rows,
    read_edit,
)
from crane_tasks.calibration import (
    CalibrationRefs,
    build_calibration,
    calibration_ref,
    calibration_refs,
    check_format,
    check_prompts,
    count_tokens,
    retokenised,
)
from crane_tasks.context import Context, Progress, make_context, no_progress
from crane_tasks.delta import build_delta, delta_ref
from crane_tasks.evaluate import (
    EvaluationSets,
    build_evaluate,
    evaluate_ref,
    evaluation_sets,
    gate_check,
    heldout_section,
    read_comparison,
)
from crane_tasks.forecast import (
    build_forecast,
    forecast_ref,
    predicted_changes,
    unknown_changes,
)
from crane_tasks.gradients import STAGE as GRADIENTS
from crane_tasks.gradients import gradients_ref
from crane_tasks.projector import build_projector, projector_ref
from crane_tasks.recipe import Recipe
from crane_tasks.report import Facts, write_report
from crane_tasks.room import check_room, sizes_of
from crane_tasks.scores import Scores, Sources, build_scores, read_scores, scores_ref
from crane_tasks.spread import Spread, here
from crane_tasks.threshold import build_threshold, threshold_ref
from flows.transient import naming_full_disk

STAGES = ("calibration", "delta", "threshold", "scores", "projector", "apply", "evaluate")
T = TypeVar("T")
HEALINGS = 20  # more than a merge has artifacts


class Call(Protocol):
    """Runs one stage: `build(*args)` under the stage's name."""

    def __call__(self, stage: str, build: Callable[..., Built], *args: Any) -> Built:
        """The stage's outcome."""


def call_here(stage: str, build: Callable[..., Built], *args: Any) -> Built:
    """Run a stage in this process."""
    return build(*args)


@dataclass(frozen=True)
class Refs:
    """The keys of all stages, known before any of them runs."""

    calibration: CalibrationRefs
    delta: Ref
    threshold: Ref
    gradients: Ref
    scores: Ref
    projector: Ref
    forecast: Ref
    apply: Ref
    evaluate: Ref
    sets: EvaluationSets

    @property
    def gate(self) -> Sources:
        sets = self.calibration
        return Sources(self.delta, sets.reasoning, sets.agent, self.gradients)

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.delta, self.threshold, self.scores, self.projector)

    def by_stage(self) -> dict[str, Ref]:
        """One reference per stage, in the order of the method."""
        found = {name: getattr(self, name) for name in STAGES if name != "calibration"}
        return {"calibration": calibration_ref(self.calibration), **found}


def all_refs(ctx: Context) -> Refs:
    """Every stage's key, from the recipe, the data's rows and the checkpoints' identities."""
    calibration = calibration_refs(ctx)
    delta = delta_ref(ctx)
    threshold = threshold_ref(ctx, delta)
    gradients = gradients_ref(ctx, calibration.reasoning, calibration.agent)
    scores = scores_ref(ctx, delta, calibration.reasoning, calibration.agent)
    projector = projector_ref(ctx, calibration.format)
    forecast = forecast_ref(gradients, delta, threshold, projector)
    apply = apply_ref(ctx, Inputs(delta, threshold, scores, projector))
    sets = evaluation_sets(ctx, calibration.targets())
    evaluate = evaluate_ref(ctx, apply.key, sets)
    return Refs(
        calibration=calibration,
        delta=delta,
        threshold=threshold,
        gradients=gradients,
        scores=scores,
        projector=projector,
        forecast=forecast,
        apply=apply,
        evaluate=evaluate,
        sets=sets,
    )


def check_cheap(ctx: Context, refs: Refs, *, force: bool) -> None:
    """Everything about data and output that is known to be wrong before weights are read."""
    there = check_destination(ctx, refs.apply, force=force)
    check_room(disk_needs(ctx, refs, written=there and ctx.store.has(refs.apply)))
    check_baseline(ctx)
    if not ctx.store.has(refs.apply):
        check_rows(ctx)
    check_data(ctx, refs)


def check_data(ctx: Context, refs: Refs) -> None:
    """Render and measure the rows of every set that is still to be made."""
    sets = ctx.recipe.calibration
    check_prompts(ctx, sets.reasoning, refs.calibration.reasoning)
    check_prompts(ctx, sets.agent, refs.calibration.agent)
    check_format(ctx, sets.format, refs.calibration.format)
    for name in refs.sets.heldout():
        section = heldout_section(ctx, name)
        if section is not None:
            check_prompts(ctx, section, refs.sets.refs[name])


def disk_needs(ctx: Context, refs: Refs, *, written: bool) -> list[tuple[Path, int, str]]:
    """What the missing stages will write, in bytes; small artifacts are left out.

    What an interrupted stage has in its draft already is not counted again.
    """
    store, base = ctx.store, ctx.pair().base
    sizes = sizes_of(base)
    needs = []
    if not store.has(refs.delta):
        needs.append((store.root, sizes.total - store.drafted_bytes(refs.delta), "delta"))
    if not (store.has(refs.scores) or store.has(refs.gradients)):
        kept = 2 * sizes.gated if ctx.recipe.gate.store_gradients else 0
        row = base.config["hidden_size"] * ctx.compute_dtype.itemsize
        states = count_tokens(ctx) * row * (base.num_layers + 3)
        there = store.drafted_bytes(refs.scores) + store.drafted_bytes(refs.gradients)
        needs.append((store.root, kept + states - there, "gradients and hidden states"))
    if not written:
        needs.append((ctx.output, sizes.total, "output"))
    return needs


@dataclass
class Merged:
    """What a merge did and found."""

    ctx: Context
    refs: Refs
    stages: list[Built] = field(default_factory=list)
    scores: Scores | None = None
    edit: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that `crane merge --json` prints (DESIGN 2)."""
        recipe, scores = self.ctx.recipe, self.scores
        return {
            "name": recipe.name,
            "output": str(self.ctx.output),
            "alpha": recipe.alpha,
            "tau": recipe.tau,
            "stages": [stage_json(b) for b in self.stages],
            "scores": scores_json(scores) if scores else {},
            "edit": self.edit,
            "evaluation": self.evaluation,
            "report": str(self.report) if self.report else None,
        }


def stage_json(built: Built) -> dict[str, Any]:
    """One stage's outcome as JSON values."""
    return {
        "name": built.ref.stage,
        "status": built.status,
        "seconds": round(built.seconds, 3),
        "key": built.ref.key,
        "path": str(built.path),
    }


def scores_json(scores: Scores) -> dict[str, Any]:
    """The scores as JSON values."""
    return {
        "per_layer": {str(layer): row for layer, row in scores.per_layer.items()},
        "per_component": scores.per_component,
    }


def build_gate(ctx: Context, refs: Refs, call: Call) -> list[Built]:
    """The stages up to the scores. Delta first: it reads every weight and finds the NaN."""
    r, c = refs, refs.calibration
    return [
        call("delta", build_delta, ctx, r.delta),
        call("calibration", build_calibration, ctx, c),
        call("scores", build_scores, ctx, r.scores, r.gate),
    ]


def build_inputs(ctx: Context, refs: Refs, call: Call) -> list[Built]:
    """All that the edit is made of: the stages before `apply`."""
    r = refs
    built = build_gate(ctx, refs, call)
    _scores(ctx, refs)  # a baseline without gain shows here, not after the projector
    return [
        *built,
        call("threshold", build_threshold, ctx, r.threshold, r.delta),
        call("projector", build_projector, ctx, r.projector, r.calibration.format),
    ]


def build_all(ctx: Context, refs: Refs, call: Call, *, force: bool) -> list[Built]:
    """All seven stages."""
    r = refs
    built = [
        *build_inputs(ctx, refs, call),
        call("apply", _build_apply, ctx, refs, force),
        call("evaluate", build_evaluate, ctx, r.evaluate, r.apply, r.sets),
    ]
    return sorted(built, key=lambda b: STAGES.index(b.ref.stage))


def _build_apply(ctx: Context, refs: Refs, force: bool) -> Built:
    """The checkpoint; and once per pair and sets, what any edit of it should do to the loss."""
    built = build_apply(ctx, refs.apply, refs.inputs, force=force)
    if ctx.store.has(refs.gradients):
        r = refs
        build_forecast(ctx, r.forecast, r.gradients, r.delta, r.threshold, r.projector)
    return built


def healing(store: Store, work: Callable[[], T], notice: Callable[[str], None]) -> T:
    """Run `work`; set a damaged artifact aside and run again, which recomputes it alone."""
    # Each round mends one artifact; a disk that damages what was just written must end it.
    for _ in range(HEALINGS):
        try:
            return work()
        except DamagedArtifact as error:
            aside = store.set_aside(error.path)
            fate = "computing it anew"
            if aside.parent.name == GRADIENTS:
                fate = "doing without it: nothing is decided by it"
            notice(f"{error}. Set aside as {aside.name}, {fate}.")
    return work()


def merge(
    recipe: Recipe,
    store: Store,
    *,
    call: Call = call_here,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda _: None,
    spread: Spread = here,
    force: bool = False,
) -> Merged:
    """Merge a pair by a recipe; finished stages are reused.

    Raises:
        BadInput: recipe, checkpoints, data or output are wrong; nothing was published.
        ScoreError: the baseline has no positive gain.
    """
    store.waiting = notice
    store.prepare()
    ctx = make_context(recipe, store, progress, notice, spread)
    refs = all_refs(ctx)
    check_cheap(ctx, refs, force=force)

    def work() -> Merged:
        return _collect(Merged(ctx, refs, build_all(ctx, refs, call, force=force)))

    with naming_full_disk(store.root, ctx.output):
        return healing(store, work, notice)


def _collect(merged: Merged) -> Merged:
    """Read the results back and write the report."""
    ctx, refs = merged.ctx, merged.refs
    merged.scores = _scores(ctx, refs)
    edit = read_edit(ctx.store.open(refs.apply))
    merged.edit = {
        component: {"survived": sums.survived, "cosine": sums.cosine}
        for component, sums in edit.items()
    }
    compared = read_comparison(ctx.store.open(refs.evaluate))
    merged.evaluation = compared | {"gate": gate_check(compared, _predicted(ctx, refs))}
    facts = Facts(
        ctx=ctx,
        stages=[stage_json(b) for b in merged.stages],
        scores=merged.scores,
        edit=edit,
        evaluation=merged.evaluation,
        projector=ctx.store.open(refs.projector),
        carried=ctx.pair().base.carried,
        retokenised=retokenised(ctx, refs.sets.refs),
    )
    merged.report = write_report(facts, report_folder(ctx.output))
    return merged


def _predicted(ctx: Context, refs: Refs) -> dict[str, float]:
    """The first-order change of both sets' loss, NaN if no gradients were kept."""
    store = ctx.store
    if not store.has(refs.forecast):
        return unknown_changes()
    forecast, gains, projector = map(store.open, (refs.forecast, refs.scores, refs.projector))
    return predicted_changes(ctx.recipe, forecast, _scores(ctx, refs), gains, projector)


def report_folder(output: Path) -> Path:
    """The report lies beside the checkpoint, not in it."""
    return output.with_name(f"{output.name}-report")


def compute_scores(
    recipe: Recipe,
    store: Store,
    *,
    call: Call = call_here,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda _: None,
) -> tuple[list[Built], Scores]:
    """S(c, l) for a recipe, computing what is missing."""
    store.waiting = notice
    store.prepare()
    ctx = make_context(recipe, store, progress, notice)
    refs = all_refs(ctx)
    check_baseline(ctx)
    check_data(ctx, refs)

    def work() -> tuple[list[Built], Scores]:
        built = build_gate(ctx, refs, call)
        return sorted(built, key=lambda b: STAGES.index(b.ref.stage)), _scores(ctx, refs)

    with naming_full_disk(store.root):
        return healing(store, work, notice)


def _scores(ctx: Context, refs: Refs) -> Scores:
    """The normalised scores of a run whose score stage is done."""
    layout = ctx.pair().base.layout
    return read_scores(ctx.store.open(refs.scores), layout, ctx.recipe.gate.baseline)
