"""A stage's independent units on several processes or machines: Prefect's own Dask task runner.

The workers share the store and the checkpoints under the same paths. Only the process of the
flow writes an artifact's log, so that its units exist whole or not at all, whoever made them.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE

from crane_tasks.devices import prepare
from crane_tasks.errors import RecipeError
from crane_tasks.recipe import Run
from crane_tasks.session import Session, Spread, one_by_one

T = TypeVar("T")
CONNECT_SECONDS = 10.0


@task(name="unit", cache_policy=NO_CACHE, persist_result=False)
def _unit(run: Run, work: Callable[..., T], call: tuple[Any, ...]) -> T:
    prepare(run)
    return work(*call)


@contextmanager
def spreading(session: Session) -> Iterator[Spread]:
    """What spreads units as `run.workers` says: a local cluster of so many processes, which
    ends with the block, or the Dask scheduler at an address. Without it, this process does all.

    Raises:
        RecipeError: the Dask task runner is not installed, or no scheduler answers.
    """
    recipe = session.recipe
    workers = recipe.run.workers
    if workers is None:
        yield one_by_one
        return
    runner = _runner(workers)
    # Whatever is submitted takes its surroundings along. A stage's own task holds the run's
    # open connections; seen from the flow itself there is nothing that cannot travel.
    outside = copy_context()

    def spread(what: str, work: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        futures = [
            outside.run(
                runner.submit,
                _unit.with_options(task_run_name=f"{recipe.name}: {what} {number} of {len(calls)}"),
                {"run": recipe.run, "work": work, "call": call},
            )
            for number, call in enumerate(calls, start=1)
        ]
        try:
            for future in futures:
                yield future.result()
        finally:
            # Another attempt must not begin a unit that a worker is still writing.
            for future in futures:
                future.wait()

    with runner:
        yield spread


def _runner(workers: int | str) -> Any:
    """Prefect's Dask task runner: so many processes here, or the scheduler at an address."""
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise RecipeError(
            "run.workers needs Prefect's Dask task runner: pip install 'crane-merge[dask]'"
        ) from error
    if isinstance(workers, str):
        _require_scheduler(workers)
        return DaskTaskRunner(address=workers)
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)


def _require_scheduler(address: str) -> None:
    """Dask itself would try again and again, and say nothing meanwhile."""
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname, place.port or 0), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RecipeError(
            f"run.workers: no Dask scheduler answers at {address} ({error})"
        ) from error
