"""The pipeline as Prefect flows: every stage a task, seen in the UI."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed

from crane_tasks.errors import BadInput, CraneError
from crane_tasks.session import Context, Session
from crane_tasks.user_paths import user_path
from flows.evaluate import evaluate
from flows.merge import Merged, merge
from flows.prefect import forms as form
from flows.prefect.pages import publish_evaluation, publish_merge, publish_sweep
from flows.prefect.progress import StageProgress
from flows.prefect.tasks import OPTIONS, TaskCalls, attempt, inputs, refusing, result_of
from flows.prefect.workers import spreading
from flows.sweep import sweep
from flows.sweep_result import Sweep


def _run_name() -> str:
    """E.g. "crane-30b, alpha 0.3": what tells the runs of a list apart."""
    given: dict[str, Any] = dict(flow_run.parameters)
    told = [f"{k} {given[k]:g}" for k in ("alpha", "tau") if given.get(k) is not None]
    if "alphas" in given:
        told.append(f"{len(given['alphas']) or 1} x {len(given['taus']) or 1} points")
    if "checkpoint" in given:
        told.append(Path(given["checkpoint"]).name)
    told += form.overrides_of(given)
    return ", ".join([form.short_name(given), *told])


def _merge(session: Session) -> Merged:
    """The merge of a session as tasks of the flow that runs."""
    with spreading(session) as spread:
        own = replace(session, spread=spread, notice=get_run_logger().warning)
        merged = merge(own, TaskCalls(), opened=result_of(inputs(own, return_state=True)))
    publish_merge(merged)
    get_run_logger().info("Merged checkpoint: %s; report: %s", merged.ctx.output, merged.report)
    return merged


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
        alpha: Strength of the edit, 0 or more. Empty: the recipe's (tiny 0.65, crane-30b 0.25,
            crane-next-80b 0.15).
        tau: Where protection is one half, above 0 and at most 1. Empty: the recipe's.
        output: Folder of the merged checkpoint. Empty: the recipe's, or merged/NAME-alpha-tau.
        advanced: Overrides, store, device.
    """

    return refusing(
        lambda: _merge(
            form.opened(recipe, recipe_file, advanced, alpha=alpha, tau=tau, output=output)
        )
    )


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
        session = form.opened(recipe, recipe_file, advanced)
        with spreading(session) as spread:
            own = replace(session, spread=spread, notice=get_run_logger().warning)
            swept = sweep(
                own,
                alphas,
                taus,
                fields=advanced.axes,
                require=require,
                write="best" if write_best else None,
                folder=user_path(output).absolute() if output.strip() else None,
                call=TaskCalls(),
                opened=result_of(inputs(own, return_state=True)),
            )
        publish_sweep(swept)
        get_run_logger().info("Report: %s", swept.report)
        if swept.problem:
            raise CraneError(swept.problem)
        return swept

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
        session = replace(
            form.opened(recipe, recipe_file, advanced), notice=get_run_logger().warning
        )
        ctx = result_of(inputs(session, return_state=True))
        compared: dict[str, Any] = result_of(
            checkpoint_evaluation(ctx, checkpoint, return_state=True)
        )
        publish_evaluation(session.recipe.name, compared)
        return compared

    return refusing(work)


@task(name="evaluate", **OPTIONS)
def checkpoint_evaluation(ctx: Context, checkpoint: str) -> Any:
    """What a checkpoint does beside base and donor."""

    def work() -> Any:
        bar = StageProgress(ctx.recipe.name, "evaluate")
        heard = ctx.heard_by(bar)
        compared = evaluate(heard.session, Path(checkpoint), opened=heard)
        return Completed(message=f"evaluate: {compared['checkpoint']}", data=compared)

    return attempt("evaluate", work)


class Given:
    """A session on its way into a flow: Prefect records its kind, and nothing of what it holds."""

    __slots__ = ("session",)

    def __init__(self, session: Session) -> None:
        self.session = session


def _terminal_run_name() -> str:
    """E.g. "crane-30b, alpha 0.25"."""
    given: dict[str, Any] = dict(flow_run.parameters)
    return f"{given['name']}, alpha {given['alpha']:g}"


@flow(name="crane-merge", flow_run_name=_terminal_run_name, persist_result=False)
def terminal_flow(
    recipe: str, name: str, alpha: float, tau: float, changes: list[str], given: Any
) -> Any:
    """A merge that was asked for in a terminal.

    Args:
        recipe: As it was named there, a file or a shipped recipe.
        name: Its own name.
        alpha: Strength of the edit.
        tau: Where protection is one half.
        changes: What was said by --set.
        given: The session.
    """
    return refusing(lambda: _merge(given.session))


def merge_in_prefect(session: Session, recipe: str, changes: Sequence[str]) -> Merged:
    """Run the merge as a flow in this process, on the server of PREFECT_API_URL or its own.

    Args:
        recipe, changes: as they were said, for the run's record.

    Raises:
        BadInput: there is no server at PREFECT_API_URL; or as `merge`.
    """
    _require_server()
    asked = session.recipe
    try:
        state: Any = terminal_flow(
            recipe,
            asked.name,
            asked.alpha,
            asked.tau,
            list(changes),
            Given(session),
            return_state=True,
        )
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
            "with `crane ui`, or merge without: --no-prefect"
        ) from error
