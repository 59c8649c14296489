"""Stages as Prefect tasks: named after model and stage, retried only where that can help.

Prefect's cache takes no part (NO_CACHE): the store decides, and a reused stage ends in the
state "Cached" so that the UI says so.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort
from prefect.states import Completed, Failed

from artifacts.errors import StoreError
from artifacts.store import Built
from crane_tasks.errors import CraneError
from flows.prefect_progress import StageProgress
from flows.transient import is_transient

T = TypeVar("T")
WAITS = (10.0, 60.0, 300.0)  # seconds before each further attempt
# What ends a run with its message alone: its place in our code would tell a reader nothing.
EXPECTED = (CraneError, StoreError, OSError)
STATES = {"reused": "Cached", "resumed": "Resumed", "computed": "Completed"}


class TaskStages:
    """Runs the stages of one recipe (as `merge.Call`), and hears their progress."""

    def __init__(self, recipe: str, waits: Sequence[float] = WAITS) -> None:
        self._recipe = recipe
        self._waits = list(waits)
        self._bar: StageProgress | None = None

    def __call__(self, stage: str, build: Callable[..., Built], *args: Any) -> Built:
        """Run a stage as a task."""

        def told(built: Built) -> State[Any]:
            message = f"{stage}: {built.status} in {built.seconds:.1f} s, {built.path}"
            return Completed(name=STATES[built.status], message=message)

        return self.run(stage, lambda: build(*args), told)

    def progress(self, stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        """To the stage that runs."""
        if self._bar is not None:
            self._bar(stage, done, total, what, bar)

    def run(self, name: str, work: Callable[[], T], told: Callable[[T], State[Any]]) -> T:
        """Run work as a task of its own that ends in the state that `told` makes of its result.

        Raises:
            Whatever `work` raises, when no attempt is left or a further one cannot help.
        """
        results: list[T] = []
        problems: list[Exception] = []

        def again(*_: Any) -> bool:
            return bool(problems) and is_transient(problems[-1])

        @task(
            name=name.split()[0],  # all points of a sweep are one kind of task
            task_run_name=f"{self._recipe}: {name}",
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=len(self._waits),
            retry_delay_seconds=self._waits,
            retry_condition_fn=again,
        )
        def attempt() -> Any:
            self._bar = StageProgress(self._recipe, name)
            get_run_logger().info("%s: started", name)
            try:
                results.append(work())
            except EXPECTED as error:
                problems.append(error)
                return Failed(message=f"{name}: {told_error(error)}")
            state = told(results[-1])
            self._bar.end(str(state.name).lower())
            return state

        # Without `return_state` a task that ends in a state of its own gives that state back.
        state: Any = attempt(return_state=True)
        if not results and problems:
            raise problems[-1]
        state.result(raise_on_failure=True)
        return results[-1]


def told_error(error: BaseException) -> str:
    """An error for a person: ours speak for themselves, the system's need their kind."""
    return str(error) if isinstance(error, CraneError) else f"{type(error).__name__}: {error}"


def refusing(work: Callable[[], T]) -> T | State[T]:
    """Run a flow's work; what is to be expected ends it as Failed with a message, no traceback."""
    try:
        return work()
    except EXPECTED as error:
        # A worker would log a traceback of whatever else a failed state holds.
        quiet = Abort(told_error(error))
        quiet.__cause__ = error
        return Failed(message=told_error(error), data=quiet)


def result_of(state: State[T]) -> T:
    """What a flow gave.

    Raises:
        Whatever its work raised.
    """
    found: Any = state.result(raise_on_failure=False)
    if isinstance(found, Abort) and found.__cause__ is not None:
        raise found.__cause__
    if isinstance(found, BaseException):
        raise found
    result: T = found
    return result
