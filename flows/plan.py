"""What a merge would do and need, without loading a weight."""

from dataclasses import asdict, dataclass
from typing import Any

from artifacts.cleaning import differences, nearest
from artifacts.ref import Ref
from crane_tasks.apply.stage import check_destination
from crane_tasks.method import keys_of, stages_of
from crane_tasks.models.check import check_pair
from crane_tasks.session import Context, Session, open_context
from crane_tasks.stage import Keys, Stage
from flows.checks import check_all


@dataclass(frozen=True)
class PlannedStage:
    """One stage: what would happen, why, and what it takes (bytes, seconds; None: nothing)."""

    name: str
    status: str
    why: str
    key: str
    disk: int | None = None
    memory: int | None = None
    device_memory: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The stages of a merge."""

    name: str
    output: str
    store: str
    calls: str  # the syntax of tool calls, or "unknown"
    patterns: list[str]  # the texts whose tokens hold the format
    stages: list[PlannedStage]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(session: Session) -> Plan:
    """Every stage's fate. Runs the same checks as a merge, so a bad pair shows here.

    Raises:
        BadInput: as `merge`.
    """
    ctx = open_context(session, whole=False)
    keys = keys_of(ctx)
    check_destination(ctx, keys)
    check_all(ctx, keys, now=False)
    check_pair(ctx.pair(), ctx.recipe.pair.allow)
    stages = [_planned(ctx, keys, stage) for stage in stages_of(keys)]
    syntax, patterns = ctx.syntax(), ctx.settled.calibration.format.patterns or ()
    return Plan(
        session.recipe.name,
        str(ctx.output),
        str(session.store.root),
        "unknown" if syntax is None else syntax.name,
        list(patterns),
        stages,
    )


def _planned(ctx: Context, keys: Keys, stage: Stage) -> PlannedStage:
    key = keys[stage].key
    if stage.stored(ctx, keys):
        return PlannedStage(stage.name, "reused", "nothing changed", key)
    missing = [part for part in stage.parts(keys) if not ctx.store.has(keys[part])]
    resumed = stage in missing and ctx.store.drafted(keys[stage])
    whys = [(part.role, _why(ctx, keys[part])) for part in missing]
    if not missing:
        why = "the output folder does not hold it"
    elif stage in missing:
        why = whys[0][1]
    else:
        why = "; ".join(f"{role}: {text}" for role, text in whys)
    needs = stage.needs(ctx, keys)
    return PlannedStage(
        stage.name,
        "resumed" if resumed else "computed",
        why,
        key,
        disk=needs.store + needs.output,
        memory=needs.memory,
        device_memory=needs.device_memory if ctx.device != "cpu" else None,
        seconds=needs.seconds,
    )


def _why(ctx: Context, ref: Ref) -> str:
    """Which input changed against the most alike artifact there is."""
    if ctx.store.drafted(ref):
        return "was interrupted"
    best = nearest(ctx.store, ref.stage, ref.identity()) if ctx.store.root.exists() else None
    if best is None:
        return "not in the store"
    return f"changed: {', '.join(differences(best, ref.identity()))}"
