"""What Prefect's server knows of task runs and of the edges between them."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect_site import wait_until


def task_runs(done: set[UUID], count: int = 0) -> list[Any]:
    """The task runs that the server knows, in the order of their start, but those of before.

    It hears of them a while after the flow's end: wait until so many of them have ended.
    """
    from prefect.client.orchestration import get_client

    def fresh() -> list[Any] | None:
        with get_client(sync_client=True) as client:
            found = [r for r in client.read_task_runs() if r.id not in done]
        ended = [r for r in found if r.state is not None and r.state.is_final()]
        return found if len(ended) >= count else None

    runs: list[Any] = wait_until(lambda: [r] if (r := fresh()) is not None else None, "runs")[0]
    done |= {r.id for r in runs}
    return sorted(runs, key=lambda r: str(r.start_time))


def edges(runs: Mapping[str, Any]) -> dict[str, set[str]]:
    """For each run, by name, the names of the runs whose result it was given."""
    names = {run.id: name for name, run in runs.items()}
    return {
        name: {
            names[source.id]
            for sources in run.task_inputs.values()
            for source in sources
            if source.input_type == "task_run" and source.id in names
        }
        for name, run in runs.items()
    }
