"""The stages as Prefect tasks, to be imported and put into flows of one's own.

    ctx = inputs(session)
    c, d = calibration(ctx), delta(ctx)
    s = scores(ctx, c, d)

Every task takes the context and what the tasks before it gave, so that Prefect draws the graph,
and ends in a state that holds its keys. Prefect's cache takes no part (NO_CACHE): the store
decides, and a reused stage ends in the state "Cached" so that the UI says so. A task is tried
again only where that can help.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort
from prefect.runtime import task_run
from prefect.states import Completed, Failed

from artifacts.errors import StoreError
from artifacts.store import Built
from crane_tasks.errors import CraneError
from crane_tasks.evaluate.point import POINT
from crane_tasks.method import STAGES
from crane_tasks.session import Context, Session, open_context
from crane_tasks.stage import Keys, Stage, closure
from flows.faults import is_transient
from flows.prefect.progress import StageProgress

T = TypeVar("T")
WAITS = (10.0, 60.0, 300.0)  # seconds before each further attempt
# What ends a run with its message alone: its place in our code would tell a reader nothing.
EXPECTED = (CraneError, StoreError, OSError)
STATES = {"reused": "Cached", "resumed": "Resumed", "computed": "Completed"}


def _may_pass(of: Any, run: Any, state: State[Any]) -> bool:
    """Whether a further attempt can help."""
    return isinstance(state.data, BaseException) and is_transient(state.data)


def told_error(error: BaseException) -> str:
    """An error for a person: ours speak for themselves, the system's need their kind."""
    return str(error) if isinstance(error, CraneError) else f"{type(error).__name__}: {error}"


def attempt(name: str, work: Callable[[], State[Any]]) -> State[Any]:
    """A task's work: what is to be expected ends it as Failed with a message, no traceback."""
    get_run_logger().info("%s: started", name)
    try:
        return work()
    except EXPECTED as error:
        return Failed(message=f"{name}: {told_error(error)}", data=error)


OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": len(WAITS),
    "retry_delay_seconds": list(WAITS),
    "retry_condition_fn": _may_pass,
}


class StageTask(Task[..., Any]):
    """A task whose failure ends the flow that calls it.

    Ours end as Failed by the state that they return (`attempt`). Prefect gives such a state back
    as a value, and a flow that does not look at it would end as Completed.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        if isinstance(result, State) and not kwargs.get("return_state"):
            result_of(result)  # raises what it failed with
        return result


def _as_task(name: str, run_name: Callable[[], str]) -> Callable[[Callable[..., Any]], Any]:
    return lambda work: StageTask(work, name=name, task_run_name=run_name, **OPTIONS)


def _inputs_name() -> str:
    return f"{task_run.parameters['session'].recipe.name}: inputs"


@_as_task("inputs", _inputs_name)
def inputs(session: Session) -> Any:
    """Fetch the checkpoints, read headers and data, and hash what is not yet known.

    A task of its own, so that a download shows and is tried again. Holds the `Context`.
    """

    def work() -> State[Any]:
        recipe = session.recipe
        session.store.prepare()
        bar = StageProgress(recipe.name, "inputs")
        ctx = open_context(session).heard_by(bar)
        told = f"inputs: {recipe.base} and {recipe.donor} are there and fit"
        return Completed(message=told, data=ctx.heard_by(session.progress))

    return attempt("inputs", work)


def _run_name() -> str:
    given: dict[str, Any] = task_run.parameters
    ctx = given["ctx"]
    if isinstance(ctx, State):  # as `inputs` gave it
        ctx = ctx.result(raise_on_failure=False)
    title = given["title"] or task_run.task_name
    return f"{ctx.recipe.name}: {title}" if isinstance(ctx, Context) else str(title)


def stage_task(stage: Stage, name: str = "") -> Any:
    """A stage as a task: `run(ctx, *given)` with what the tasks of its inputs gave."""

    def run(ctx: Context, *given: Keys, title: str = "") -> Any:
        said = title or stage.name
        bar = StageProgress(ctx.recipe.name, said)

        def work() -> State[Any]:
            keys = keys_for(stage, ctx, given)
            built = stage.build(ctx.heard_by(bar), keys)
            bar.end(STATES[built.status].lower())
            message = f"{said}: {built.status} in {built.seconds:.1f} s, {built.path}"
            return Completed(name=STATES[built.status], message=message, data=(keys, built))

        return attempt(said, work)

    run.__name__ = run.__qualname__ = name or stage.name  # Prefect tells tasks apart by it
    return _as_task(run.__name__, _run_name)(run)


def keys_for(stage: Stage, ctx: Context, given: Sequence[Any]) -> Keys:
    """The keys of a stage, of all it is made from, and of what goes with it.

    Raises:
        CraneError: what another stage's task gives is missing, or two of them do not agree.
    """
    known = Keys()
    for one in given:
        keys = one[0] if isinstance(one, tuple) else one
        if unlike := [r for r, ref in keys.refs.items() if known.refs.get(r, ref).key != ref.key]:
            raise CraneError(f"was given two unlike keys of {', '.join(unlike)}")
        known = known | keys
    own = Keys()
    owners = {part.role: s for s in STAGES for part in closure_of_parts(s)}
    for needed in closure([stage], ctx.recipe):
        owner = owners.get(needed.role, stage)
        if needed in known:
            ref = known[needed]
        elif owner.role == stage.role:
            ref = needed.ref(ctx, own)
        else:
            raise CraneError(f"give it what the task `{owner.name}` gave")
        own = own | Keys({needed.role: ref})
    return own


def closure_of_parts(stage: Stage) -> list[Stage]:
    """The stage itself, and of one without an artifact of its own those that it stands for."""
    parts = [i for i in stage.inputs.values() if isinstance(i, Stage)]
    return [stage, *(parts if stage.schema is None else [])]


TASKS: dict[str, Any] = {stage.name: stage_task(stage) for stage in STAGES}
POINT_TASK = stage_task(POINT, "point")
calibration, delta, threshold, scores = (
    TASKS[name] for name in ("calibration", "delta", "threshold", "scores")
)
projector, moments, magnitudes, apply, evaluate = (
    TASKS[name] for name in ("projector", "moments", "magnitudes", "apply", "evaluate")
)


class TaskCalls:
    """Runs the stages of a run as tasks (as `method.Call`), each behind those it is made from."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[str, State[Any]]] = {}  # by name: its key, and how it ended

    def __call__(self, stage: Stage, ctx: Context, keys: Keys) -> Built:
        """Run a stage as a task.

        Raises:
            Whatever the stage raises, when no attempt is left or a further one cannot help.
        """
        point = stage.title != stage.name
        run = POINT_TASK if point else TASKS[stage.name]
        title = stage.title if point else ""
        upstream = self._upstream(stage, keys)
        state: State[Any] = run(ctx, keys, *upstream, title=title, return_state=True)
        built: Built = result_of(state)[1]
        if not point:
            self._states[stage.name] = keys[stage].key, state
        return built

    def _upstream(self, stage: Stage, keys: Keys) -> list[State[Any]]:
        """How the tasks ended that made what a stage is made from."""
        made = {i.name for i in stage.inputs.values() if isinstance(i, Stage)} - {stage.name}
        sources = [s for s in STAGES if s.name in made & self._states.keys()]
        known = [(keys[s].key, *self._states[s.name]) for s in sources]
        return [state for wanted, key, state in known if key == wanted]


def refusing(work: Callable[[], T]) -> T | State[T]:
    """Run a flow's work; what is to be expected ends it as Failed with a message, no traceback.

    It works in CRANE_FOLDER where that is set, as prefect.yaml does; relative paths lie there.
    """
    if place := os.environ.get("CRANE_FOLDER"):
        os.chdir(place)
    try:
        return work()
    except EXPECTED as error:
        # A worker would log a traceback of whatever else a failed state holds.
        quiet = Abort(told_error(error))
        quiet.__cause__ = error
        return Failed(message=told_error(error), data=quiet)


def result_of(state: State[T]) -> T:
    """What a flow or a task gave.

    Raises:
        Whatever its work raised.
    """
    result: Any = state.result(raise_on_failure=False)
    if isinstance(result, Abort) and result.__cause__ is not None:
        raise result.__cause__
    if isinstance(result, BaseException):
        raise result
    given: T = result
    return given
