"""The pipeline as Prefect flows: every stage a task, seen in the UI."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed

from artifacts.store import Store
from crane_tasks.context import Context, make_context
from crane_tasks.errors import BadInput, CraneError
from crane_tasks.recipe import Recipe
from flows import prefect_forms as form
from flows.evaluate import evaluate
from flows.merge import Merged, merge
from flows.prefect_artifacts import publish_evaluation, publish_merge, publish_sweep
from flows.prefect_stages import TaskStages, refusing, result_of
from flows.prefect_workers import spreading
from flows.sweep import Sweep, sweep


def _run_name() -> str:
    """E.g. "crane-30b, alpha 0.3": what tells the runs of a list apart."""
    given: dict[str, Any] = dict(flow_run.parameters)
    told = [f"{k} {given[k]:g}" for k in ("alpha", "tau") if given.get(k) is not None]
    if "alphas" in given:
        told.append(f"{len(given['alphas']) or 1} x {len(given['taus']) or 1} points")
    if "checkpoint" in given:
        told.append(Path(given["checkpoint"]).name)
    return ", ".join([form.short_name(given), *told])


def _check_inputs(stages: TaskStages, recipe: Recipe, store: Store) -> None:
    """Fetch the checkpoints, read headers and data, and hash what is not yet known.

    A task of its own, so that a download shows and is tried again; the work finds all of it.
    """

    def work() -> Context:
        store.prepare()
        return make_context(recipe, store, stages.progress)

    told = f"inputs: {recipe.base} and {recipe.donor} are there and fit"
    stages.run("inputs", work, lambda _: Completed(message=told))


@flow(name="crane-merge", flow_run_name=_run_name, persist_result=False)
def merge_flow(
    recipe: form.RecipeChoice = "tiny",
    recipe_file: form.RecipeFile = "",
    alpha: form.Alpha = None,
    tau: form.Tau = None,
    output: form.Output = "",
    advanced: form.MergeAdvanced = form.NO_MERGE_SETTINGS,
) -> Any:
    """Merge a pair by a recipe; finished stages are reused.

    Args:
        recipe: A recipe that comes with CRANE.
        recipe_file: Path of a recipe of your own; if given, it is taken instead.
        alpha: Strength of the edit, 0 or more. Empty: the recipe's.
        tau: Where protection is one half, above 0 and at most 1. Empty: the recipe's.
        output: Folder of the merged checkpoint. Empty: the recipe's, or merged/NAME-alpha-tau.
        advanced: Overrides, store, device.
    """

    def work() -> Merged:
        loaded, store = form.opened(
            recipe, recipe_file, advanced, alpha=alpha, tau=tau, output=output
        )
        stages = TaskStages(loaded.name)
        _check_inputs(stages, loaded, store)
        with spreading(loaded) as spread:
            merged = merge(
                loaded,
                store,
                call=stages,
                progress=stages.progress,
                notice=get_run_logger().warning,
                spread=spread,
                force=advanced.force,
            )
        publish_merge(merged)
        get_run_logger().info("Merged checkpoint: %s; report: %s", merged.ctx.output, merged.report)
        return merged

    return refusing(work)


@flow(name="crane-sweep", flow_run_name=_run_name, persist_result=False)
def sweep_flow(
    recipe: form.RecipeChoice = "tiny",
    recipe_file: form.RecipeFile = "",
    alphas: form.Alphas = [],  # noqa: B006 - never changed
    taus: form.Taus = [],  # noqa: B006
    require: form.Requirements = [],  # noqa: B006
    write_best: form.WriteBest = False,
    output: form.Output = "",
    advanced: form.SweepAdvanced = form.NO_SWEEP_SETTINGS,
) -> Any:
    """Measure a grid of alpha and tau in memory; points that are in the store are reused.

    Args:
        recipe: A recipe that comes with CRANE.
        recipe_file: Path of a recipe of your own; if given, it is taken instead.
        alphas: Strengths of the edit, 0 or more each. Empty: the recipe's alone.
        taus: Where protection is one half, above 0 and at most 1 each. Empty: the recipe's alone.
        require: What the best point must keep, a line each: tool_calls>=0.99
        write_best: Merge the best point; else no checkpoint is written.
        output: Folder of the sweep's report. Empty: merged/NAME-sweep.
        advanced: Further axes, overrides, store, device.
    """

    def work() -> Sweep:
        loaded, store = form.opened(recipe, recipe_file, advanced)
        stages = TaskStages(loaded.name)
        _check_inputs(stages, loaded, store)
        with spreading(loaded) as spread:
            found = sweep(
                loaded,
                store,
                alphas,
                taus,
                fields=advanced.axes,
                require=require,
                write="best" if write_best else None,
                folder=Path(output).expanduser().absolute() if output.strip() else None,
                call=stages,
                progress=stages.progress,
                notice=get_run_logger().warning,
                spread=spread,
                force=advanced.force,
            )
        publish_sweep(found)
        get_run_logger().info("Report: %s", found.report)
        if found.problem:
            raise CraneError(found.problem)
        return found

    return refusing(work)


@flow(name="crane-evaluate", flow_run_name=_run_name, persist_result=False)
def evaluate_flow(
    checkpoint: form.CheckpointFolder,
    recipe: form.RecipeChoice = "tiny",
    recipe_file: form.RecipeFile = "",
    advanced: form.Advanced = form.NO_SETTINGS,
) -> Any:
    """Compare any checkpoint with a recipe's base and donor on its held-out rows.

    Args:
        checkpoint: Folder of the checkpoint, e.g. an earlier merge.
        recipe: A recipe that comes with CRANE.
        recipe_file: Path of a recipe of your own; if given, it is taken instead.
        advanced: Overrides, store, device.
    """

    def work() -> dict[str, Any]:
        loaded, store = form.opened(recipe, recipe_file, advanced)
        stages = TaskStages(loaded.name)
        _check_inputs(stages, loaded, store)
        notice = get_run_logger().warning
        found = stages.run(
            "evaluate",
            lambda: evaluate(
                loaded, store, Path(checkpoint), progress=stages.progress, notice=notice
            ),
            lambda result: Completed(message=f"evaluate: {result['checkpoint']}"),
        )
        publish_evaluation(loaded.name, found)
        return found

    return refusing(work)


def run_merge(
    recipe: str,
    *,
    alpha: float | None,
    tau: float | None,
    assignments: Sequence[str],
    output: str | None,
    store: str | None,
    force: bool,
) -> Merged:
    """Run the merge as a flow in this process, on the server of PREFECT_API_URL or its own.

    Raises:
        BadInput: there is no server at PREFECT_API_URL; or as `merge`.
    """
    parameters = form.as_form(
        recipe,
        alpha=alpha,
        tau=tau,
        assignments=assignments,
        output=output,
        store=store,
        force=force,
    )
    _require_server()
    try:
        state: Any = merge_flow(**parameters, return_state=True)
    except httpx.TransportError as error:
        raise CraneError(
            f"The Prefect server went away ({type(error).__name__}). Finished work is kept: the "
            "same command goes on from there, without a server if --no-prefect is added."
        ) from error
    merged: Merged = result_of(state)
    return merged


def _require_server() -> None:
    """Say in one line that nobody answers, before Prefect does it in a hundred."""
    url = PREFECT_API_URL.value()
    if not url:
        return
    try:
        httpx.get(f"{url}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BadInput(
            f"PREFECT_API_URL is {url}, but no Prefect server answers there ({error}). Start one "
            "with `make ui`, or merge without: --no-prefect"
        ) from error
