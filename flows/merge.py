"""A merge: every stage of the method, and the report of what came of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.store import Built, write_atomically
from crane_tasks.apply.card import with_results
from crane_tasks.apply.forecast import predicted_changes
from crane_tasks.apply.output import held, provenance
from crane_tasks.apply.results import per_component, read_edit
from crane_tasks.apply.stage import APPLY, check_destination
from crane_tasks.calibration.targets import retokenised
from crane_tasks.delta import DELTA
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.measure import measured_sets
from crane_tasks.evaluate.stage import (
    EVALUATE,
    answered_by_merge,
    gate_check,
    read_comparison,
)
from crane_tasks.method import Call, build, build_before, in_this_process, keys_of, stages_of
from crane_tasks.models.files.folder import CARD
from crane_tasks.places import report_folder
from crane_tasks.projector import PROJECTOR
from crane_tasks.report.merge import MergeReport, write_report
from crane_tasks.report.model_index import with_model_index
from crane_tasks.report.page import table
from crane_tasks.report.tables import Cells, edit_table, evaluation_table, suites_table
from crane_tasks.report.targets import target_sets
from crane_tasks.scores.reading import Scores, alpha_by_rule
from crane_tasks.scores.stage import SCORES, scores_of
from crane_tasks.session import Context, Session, open_context
from crane_tasks.stage import Keys, Stage
from crane_tasks.threshold import THRESHOLD
from flows.checks import check_all, check_stages
from flows.faults import healing, naming_full_disk


@dataclass
class Merged:
    """What a merge did and found."""

    ctx: Context
    keys: Keys
    stages: list[Built] = field(default_factory=list)
    scores: Scores | None = None
    edit: dict[str, dict[str, float | None]] = field(default_factory=dict)
    edit_table: Cells = field(default_factory=lambda: ([], []))
    evaluation: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that `crane merge --json` prints (README, "Commands")."""
        recipe = self.ctx.recipe
        return {
            "name": recipe.name,
            "output": str(self.ctx.output),
            "alpha": recipe.alpha,
            "tau": recipe.tau,
            "stages": [stage_json(b) for b in self.stages],
            "scores": self.scores.as_json() if self.scores else {},
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


def merge(
    session: Session,
    call: Call = in_this_process,
    *,
    opened: Context | None = None,
    report: bool = True,
) -> Merged:
    """Merge a pair by a recipe; finished stages are reused.

    Args:
        call: runs a stage: in this process, or as a Prefect task.
        opened: the session's context, where it is there already.
        report: draw and write the report.

    Raises:
        BadInput: recipe, checkpoints, data or output are wrong; nothing was published.
        ScoreError: the baseline has no positive gain.
    """
    session.store.prepare()
    ctx = opened or open_context(session)
    keys = keys_of(ctx)
    check_destination(ctx, keys)
    check_all(ctx, keys)

    def work() -> Merged:
        merged = Merged(ctx, keys, build(stages_of(keys), ctx, keys, call))
        _collect(merged)
        _note_results(merged)
        if report:
            _report(merged)
        return merged

    with naming_full_disk(session.store.root, ctx.output):
        return healing(session, work)


def _collect(merged: Merged) -> None:
    """Read the results back."""
    ctx, keys = merged.ctx, merged.keys
    store = ctx.store
    edit = per_component(read_edit(store.open(keys[APPLY])))
    merged.scores = scores_of(ctx, keys) if SCORES in keys else None
    merged.edit = {
        component: {"survived": sums.survived, "cosine": sums.cosine}
        if sums.intended2
        else {"survived": None, "cosine": None}  # nothing was to change
        for component, sums in edit.items()
    }
    merged.edit_table = edit_table(edit, merged.scores)
    merged.evaluation = read_comparison(store.open(keys[EVALUATE]))
    if predicted := predicted_changes(ctx, keys):
        merged.evaluation = merged.evaluation | {"gate": gate_check(merged.evaluation, predicted)}


def _note_results(merged: Merged) -> None:
    """Put the evaluation into the card of an output that is this merge's."""
    head, rows = evaluation_table(merged.evaluation)
    counts = merged.evaluation.get("rows", {})
    if not rows or not counts:
        return
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    drawn = merged.ctx.recipe.evaluate.sampling
    how = "by greedy decoding" if drawn is None else f"{drawn.samples} drawn answers to each"
    parts = [
        "## Results",
        f"On held-out rows ({told}), {how}; in parentheses where a value lies at 95 %.",
        table(head, rows),
    ]
    if (suites := suites_table(merged.evaluation))[1]:
        parts += ["By the lm-evaluation-harness:", table(*suites)]
    text = "\n\n".join(parts) + "\n"
    ctx = merged.ctx
    with held(ctx.output):
        card, record = ctx.output / CARD, provenance(ctx.output)
        if record is None or record["apply"] != merged.keys[APPLY].key or not card.is_file():
            return  # another merge's by now
        before = card.read_text()
        after = with_results(before, text)
        after = with_model_index(after, merged.ctx.recipe.name, merged.evaluation)
        if after != before:
            write_atomically(card, after)


def _report(merged: Merged) -> None:
    """Draw and write what the report tells."""
    ctx, keys = merged.ctx, merged.keys
    store = ctx.store

    def artifact(stage: Stage) -> Any:
        return store.open(keys[stage]) if stage in keys else None

    whole = MergeReport(
        ctx=ctx,
        key=keys[APPLY].key,
        stages=[stage_json(b) for b in merged.stages],
        scores=merged.scores,
        edit=read_edit(store.open(keys[APPLY])),
        evaluation=merged.evaluation,
        delta=store.open(keys[DELTA]),
        threshold=artifact(THRESHOLD),
        gains=artifact(SCORES),
        projector=artifact(PROJECTOR),
        carried=ctx.pair().base.carried,
        targets=target_sets(ctx, keys),
        retokenised=retokenised(ctx, measured_sets(ctx, keys)),
        answered=answered_by_merge(ctx, keys),
    )
    merged.report = write_report(whole, report_folder(ctx.output))


@dataclass(frozen=True)
class Scored:
    """S of a recipe, and the alpha that the script's rule gives."""

    stages: list[Built]
    scores: Scores
    alpha_by_rule: float


def compute_scores(session: Session, call: Call = in_this_process) -> Scored:
    """S(c, l) for a recipe, computing what is missing.

    Raises:
        RecipeError: the recipe's edit has no gate.
        BadInput, ScoreError: as `merge`.
    """
    session.store.prepare()
    ctx = open_context(session)
    keys = keys_of(ctx)
    if SCORES not in keys:
        raise RecipeError(f"merge.method: {ctx.recipe.merge.method} has no gate, and no scores")
    check_stages(ctx, keys)

    def work() -> Scored:
        built = [*build_before(SCORES, ctx, keys, call), call(SCORES, ctx, keys)]
        scores = scores_of(ctx, keys)
        return Scored(built, scores, alpha_by_rule(ctx.store.open(keys[SCORES]), scores))

    with naming_full_disk(session.store.root):
        return healing(session, work)
