"""The same pipeline as a Prefect flow: every stage a task, seen in the UI.

Prefect's cache takes no part (NO_CACHE): the store decides, and a reused stage ends in the
state "Cached" so that the UI says so.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from artifacts.store import Built
from flows.merge import Merged, merge
from flows.opening import open_recipe


def call_as_task(stage: str, build: Callable[..., Built], *args: Any) -> Built:
    """Run a stage as a Prefect task named after it."""

    outcome: list[Built] = []

    @task(name=stage, task_run_name=stage, cache_policy=NO_CACHE, persist_result=False)
    def run_stage() -> Any:
        built = build(*args)
        outcome.append(built)
        get_run_logger().info("%s %s in %.2f s: %s", stage, built.status, built.seconds, built.path)
        return Completed(name="Cached") if built.status == "reused" else None

    # Without `return_state` a task that ends in a state of its own gives that state back.
    state: Any = run_stage(return_state=True)
    state.result(raise_on_failure=True)
    return outcome[-1]


@flow(name="crane-merge", flow_run_name="{recipe}", persist_result=False)
def merge_flow(
    recipe: str = "tiny",
    alpha: float | None = None,
    tau: float | None = None,
    assignments: Sequence[str] = (),
    output: str | None = None,
    store: str | None = None,
    force: bool = False,
) -> Any:
    """Merge a pair by a recipe; finished stages are reused.

    Args:
        recipe: A recipe file, or the name of a shipped one.
        alpha: Strength of the edit; the recipe's if left out.
        tau: Where protection is one half; the recipe's if left out.
        assignments: Changes of recipe fields, dotted.path=VALUE each.
        output: Folder of the merged checkpoint.
        store: Folder of the stage store.
        force: Replace another merge in the output folder.
    """
    loaded, place = open_recipe(
        recipe, assignments, alpha=alpha, tau=tau, output=output, store=store
    )
    notice = get_run_logger().warning
    return merge(loaded, place, call=call_as_task, notice=notice, force=force)


def run_flow(
    recipe: str,
    *,
    alpha: float | None,
    tau: float | None,
    assignments: Sequence[str],
    output: str | None,
    store: str | None,
    force: bool,
) -> Merged:
    """Run the flow in this process, against the server of PREFECT_API_URL or its own."""
    found: Any = merge_flow(recipe, alpha, tau, list(assignments), output, store, force)
    return cast(Merged, found)
