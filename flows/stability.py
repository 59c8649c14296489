"""How much S depends on which calibration items there were."""

from dataclasses import asdict, dataclass
from typing import Any

from artifacts.store import Built
from crane_tasks.delta import frozen_layers
from crane_tasks.errors import RecipeError
from crane_tasks.method import Call, build_before, in_this_process, keys_of
from crane_tasks.scores.agreement import Agreement, agreement, read_unions
from crane_tasks.scores.stability import Draws, stability
from crane_tasks.scores.stage import SCORES
from crane_tasks.session import Session, open_context
from crane_tasks.sizes import check_disk_space
from crane_tasks.stage import Keys
from flows.checks import check_stages, disk_needs
from flows.faults import healing, naming_full_disk
from flows.merge import stage_json


@dataclass(frozen=True)
class Steadiness:
    """What was asked, what was built for it, and what came of it."""

    name: str
    asked: Draws
    stages: list[Built]
    agreement: Agreement

    def as_json(self) -> dict[str, Any]:
        """The object that `crane stability --json` prints."""
        stages = [stage_json(built) for built in self.stages]
        told = {"name": self.name, **asdict(self.asked), "stages": stages}
        return {**told, **self.agreement.as_json()}


def compute_stability(session: Session, asked: Draws, call: Call = in_this_process) -> Steadiness:
    """How alike S of complementary halves is, computing what is missing.

    Raises:
        RecipeError: the recipe's edit has no gate; a set has fewer rows than groups.
        OutputError: the disk has no room for the walk's hidden states.
        BadInput, ScoreError: as `merge`.
    """
    session.store.prepare()
    ctx, stage = open_context(session), stability(asked)
    keys = keys_of(ctx)
    if SCORES not in keys:
        raise RecipeError(f"merge.method: {ctx.recipe.merge.method} has no gate, and no scores")
    keys = keys | Keys({stage.role: stage.ref(ctx, keys)})
    check_stages(ctx, keys)
    stage.check(ctx, keys)
    check_disk_space(disk_needs(ctx, keys, [stage]))

    def work() -> Steadiness:
        built = [*build_before(stage, ctx, keys, call), call(stage, ctx, keys)]
        gate = ctx.recipe.gate
        unions = read_unions(
            ctx.store.open(keys[stage]),
            ctx.pair().base.layout,
            gate.baseline,
            unify=gate.unify,
            frozen=frozen_layers(ctx, keys),
        )
        return Steadiness(ctx.recipe.name, asked, built, agreement(unions))

    with naming_full_disk(session.store.root):
        return healing(session, work)
