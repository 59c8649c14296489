"""The same pipeline as a Prefect flow: every stage a task, seen in the UI.

Prefect's cache takes no part (NO_CACHE): the store decides, and a reused stage ends in the
state "Cached" so that the UI says so.
"""

from collections.abc import Callable
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from artifacts.store import Built, Store
from crane_tasks.recipe import Recipe
from flows.merge import Merged, merge


def call_as_task(stage: str, build: Callable[..., Built], *args: Any) -> Built:
    """Run a stage as a Prefect task named after it."""

    @task(name=stage, task_run_name=stage, cache_policy=NO_CACHE, persist_result=False)
    def run_stage() -> Any:
        built = build(*args)
        get_run_logger().info("%s %s in %.2f s: %s", stage, built.status, built.seconds, built.path)
        if built.status != "reused":
            return built
        state: State[Built] = Completed(name="Cached", data=built)
        return state

    found: Any = run_stage()
    return cast(Built, found)


@flow(name="crane-merge", flow_run_name="{name}", persist_result=False, validate_parameters=False)
def merge_flow(name: str, recipe: Recipe, store: Store, force: bool) -> Merged:
    """Merge a pair by a recipe."""
    logger = get_run_logger()
    return merge(recipe, store, call=call_as_task, notice=logger.warning, force=force)


def run_flow(recipe: Recipe, store: Store, *, force: bool) -> Merged:
    """Run the flow in this process, against the server of PREFECT_API_URL or its own."""
    name = f"{recipe.name} alpha {recipe.alpha:g} tau {recipe.tau:g}"
    return merge_flow(name, recipe, store, force)
