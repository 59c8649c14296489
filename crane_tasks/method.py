"""The method on one screen: its stages, in the order of the formula.

recipe ─┬─ delta ───────┬─ threshold ─┐
        │               └─ scores ────┼─ apply ─ evaluate
        └─ calibration ─┬─ scores     │
                        ├─ projector ─┤
                        └─ moments ───┘
                           (magnitudes, likewise: what other projections are made from)
"""

from collections.abc import Callable

from artifacts.store import Built
from crane_tasks.apply.stage import APPLY
from crane_tasks.calibration.stages import CALIBRATION
from crane_tasks.delta import DELTA
from crane_tasks.evaluate.measure import MEASURE
from crane_tasks.evaluate.stage import EVALUATE
from crane_tasks.magnitudes import MAGNITUDES
from crane_tasks.moments import MOMENTS
from crane_tasks.projector import PROJECTOR
from crane_tasks.recipe import Recipe
from crane_tasks.scores.stability import STABILITY
from crane_tasks.scores.stage import SCORES
from crane_tasks.session import Context
from crane_tasks.stage import Keys, Stage, closure
from crane_tasks.threshold import THRESHOLD

STAGES = (
    CALIBRATION,
    DELTA,
    THRESHOLD,
    SCORES,
    PROJECTOR,
    MOMENTS,
    MAGNITUDES,
    APPLY,
    EVALUATE,
)
# All that have artifacts: the sets, what is kept beside a stage, a model's measurements.
ARTIFACTS = tuple(s for s in (*closure(STAGES), STABILITY, MEASURE) if s.schema is not None)

Call = Callable[[Stage, Context, Keys], Built]


def in_this_process(stage: Stage, ctx: Context, keys: Keys) -> Built:
    """Run a stage as it is."""
    return stage.build(ctx, keys)


def used(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe's edit and evaluation come to, each behind its inputs."""
    inputs = {i.role for stage in STAGES for i in stage.inputs.values() if isinstance(i, Stage)}
    ends = [s for s in STAGES if s.role not in inputs and s.schema is not None]
    reached = list(closure(ends, recipe))
    groups = (s for s in STAGES if s.schema is None)
    return [*reached, *(g for g in groups if any(i in reached for i in g.inputs.values()))]


def keys_of(ctx: Context) -> Keys:
    """Every artifact's key, known before any of them is made.

    Raises:
        DataError: a data file is absent or broken.
    """
    keys = Keys()
    for stage in used(ctx.recipe):
        keys = keys | Keys({stage.role: stage.ref(ctx, keys)})
    return keys


def stages_of(keys: Keys) -> list[Stage]:
    """The stages of a run, in the order of the formula."""
    return [stage for stage in STAGES if stage in keys]


def made_from(stage: Stage, recipe: Recipe) -> list[Stage]:
    """The stages with artifacts that one is made from, also by way of others."""
    return [s for s in closure([stage], recipe, companions=False) if s is not stage]


def build_before(last: Stage, ctx: Context, keys: Keys, call: Call) -> list[Built]:
    """All stages that `last` is made from, in the order of the formula."""
    roles = {stage.role for stage in made_from(last, ctx.recipe)}
    wanted = [s for s in stages_of(keys) if any(p.role in roles for p in s.parts(keys))]
    return build(wanted, ctx, keys, call)


def build(stages: list[Stage], ctx: Context, keys: Keys, call: Call) -> list[Built]:
    """Make or find stages. Delta first: it reads every weight, and finds what is NaN."""
    order = sorted(stages, key=lambda stage: stage is not DELTA)
    built = {stage.role: call(stage, ctx, keys) for stage in order}
    return [built[stage.role] for stage in stages]
