"""The `crane` command: parse, call, print. Heavy imports wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.command import (
    FAILED,
    AlphaOption,
    AlphasOption,
    AnswersOption,
    AxisOption,
    DebugOption,
    DrawsOption,
    ForceOption,
    GroupsOption,
    JsonOption,
    OutputOption,
    PrefectOption,
    RecipeArgument,
    RehashOption,
    ReportOption,
    RequireOption,
    SeedOption,
    SetOption,
    StoreOption,
    TauOption,
    TausOption,
    VerifyOption,
    WriteOption,
    guarded,
    print_json,
    require_no_workers,
    set_volume,
)
from flows.publish_commands import card, push, rebuild
from flows.start_commands import init, schema, ui
from flows.store_commands import store_app

if TYPE_CHECKING:
    from crane_tasks.session import Session
    from flows.terminal import Terminal

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Merge paired Instruct and Thinking checkpoints with CRANE.",
)
app.add_typer(store_app, name="store")
LOUDNESS = ("-q", "--quiet", "-v", "--verbose")
for command in (init, schema, ui, card, push, rebuild):
    app.command()(command)


def _session(
    view: "Terminal", recipe: str, assignments: list[str], store: Path | None, **more: Any
) -> "Session":
    """What was asked for, heard by the terminal."""
    from flows.opening import open_session

    return open_session(
        recipe, assignments, store=store, progress=view.progress, notice=view.notice, **more
    )


@app.command()
def merge(
    recipe: RecipeArgument,
    alpha: AlphaOption = None,
    tau: TauOption = None,
    assignments: SetOption = [],  # noqa: B006 - typer copies it
    output: OutputOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
    rehash: RehashOption = False,
    verify: VerifyOption = False,
    prefect: PrefectOption = None,
    debug: DebugOption = False,
) -> None:
    """Merge a pair; finished stages are reused, unfinished ones resumed."""

    def work(view: "Terminal") -> None:
        session = _session(
            view, recipe, assignments, store, alpha=alpha, tau=tau, output=output, force=force
        )
        if rehash or verify:
            from flows import distrust

            session.store.prepare()
            if rehash:
                distrust.rehash_inputs(session)
            if verify:
                distrust.reread_output(session)
        usual = bool(os.environ.get("PREFECT_API_URL") or session.recipe.run.workers)
        if usual if prefect is None else prefect:
            # Prefect reads these when it is imported: a merge reports to nobody.
            os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
            os.environ.setdefault("DO_NOT_TRACK", "1")
            from flows.prefect.flows import merge_in_prefect

            merged = merge_in_prefect(session, recipe, assignments)
        else:
            from flows.merge import merge as run

            require_no_workers(session.recipe)
            merged = run(session, view.timed)
        if as_json:
            print_json(merged.as_json())
        else:
            view.summary(merged)

    guarded(work, debug=debug)


@app.command()
def plan(
    recipe: RecipeArgument,
    alpha: AlphaOption = None,
    tau: TauOption = None,
    assignments: SetOption = [],  # noqa: B006
    output: OutputOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what would be reused or computed, and what it takes; loads no weights."""

    def work(view: "Terminal") -> None:
        from flows.plan import make_plan

        # Nothing is written: whatever lies in the output may stay there.
        session = _session(
            view, recipe, assignments, store, alpha=alpha, tau=tau, output=output, force=True
        )
        planned = make_plan(session)
        if as_json:
            print_json(planned.as_json())
        else:
            view.plan(planned)

    guarded(work, debug=debug)


@app.command()
def scores(
    recipe: RecipeArgument,
    assignments: SetOption = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print S(c, l), computing what is missing."""

    def work(view: "Terminal") -> None:
        from flows.merge import compute_scores, stage_json

        session = _session(view, recipe, assignments, store)
        scored = compute_scores(session, view.timed)
        if as_json:
            table = scored.scores.as_json()
            told = {"name": session.recipe.name, "alpha_by_rule": scored.alpha_by_rule}
            # As in `merge --json` under "scores", and directly, as the object asked for.
            stages = [stage_json(b) for b in scored.stages]
            print_json({**told, "stages": stages, "scores": table, **table})
        else:
            view.scores(scored.scores)
            view.alpha_by_rule(scored.alpha_by_rule)

    guarded(work, debug=debug)


@app.command()
def stability(
    recipe: RecipeArgument,
    groups: GroupsOption = 8,
    draws: DrawsOption = 100,
    seed: SeedOption = 0,
    assignments: SetOption = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say how much S depends on which calibration items there were."""

    def work(view: "Terminal") -> None:
        from crane_tasks.scores.stability import Draws
        from flows.stability import compute_stability

        asked = Draws(groups, draws, seed)
        found = compute_stability(_session(view, recipe, assignments, store), asked, view.timed)
        if as_json:
            print_json(found.as_json())
        else:
            view.agreement(found.agreement, asked)

    guarded(work, debug=debug)


@app.command()
def sweep(
    recipe: RecipeArgument,
    alpha: AlphasOption = None,
    tau: TausOption = None,
    fields: AxisOption = [],  # noqa: B006
    require: RequireOption = [],  # noqa: B006
    write: WriteOption = None,
    answers: AnswersOption = "all",
    assignments: SetOption = [],  # noqa: B006
    output: ReportOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure every point of a grid in memory; write a checkpoint of the best alone, if asked."""

    def work(view: "Terminal") -> None:
        from crane_tasks.user_paths import user_path
        from flows.grid import read_numbers
        from flows.sweep import sweep as run

        session = _session(view, recipe, assignments, store, force=force)
        require_no_workers(session.recipe)
        swept = run(
            session,
            read_numbers(alpha, "--alpha") if alpha is not None else (),
            read_numbers(tau, "--tau") if tau is not None else (),
            fields=fields,
            require=require,
            write=write,
            answers=answers,
            folder=user_path(output).absolute() if output else None,
            call=view.timed,
        )
        if as_json:
            print_json(swept.as_json())
        else:
            view.points(swept)
        if swept.problem:
            view.problem(swept.problem)
            raise typer.Exit(FAILED)

    guarded(work, debug=debug)


@app.command()
def tune(
    recipe: RecipeArgument,
    budget: Annotated[int, typer.Option("--budget", help="Points to measure.")],
    require: RequireOption = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="Of what the search chooses.")] = 0,
    assignments: SetOption = [],  # noqa: B006
    output: ReportOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search for the best recipe that keeps what is required; compare it on rows it never saw."""

    def work(view: "Terminal") -> None:
        from crane_tasks.user_paths import user_path
        from flows.tune import tune as run

        session = _session(view, recipe, assignments, store)
        require_no_workers(session.recipe)
        folder = user_path(output).absolute() if output else None
        tuned = run(
            session, require=require, budget=budget, seed=seed, folder=folder, call=view.timed
        )
        if as_json:
            print_json(tuned.as_json())
        else:
            view.tuned(tuned)
        if tuned.problem:
            view.problem(tuned.problem)
            raise typer.Exit(FAILED)

    guarded(work, debug=debug)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.")],
    recipe: Annotated[str, typer.Option("--recipe", metavar="RECIPE", help="Whose held-out rows.")],
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE.jsonl", help="Write every row's graded answers."),
    ] = None,
    assignments: SetOption = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare any checkpoint with the recipe's base and donor."""

    def work(view: "Terminal") -> None:
        from crane_tasks.user_paths import user_path
        from flows.evaluate import evaluate as run

        file = user_path(rows) if rows else None
        compared = run(_session(view, recipe, assignments, store), checkpoint, rows=file)
        if as_json:
            print_json(compared)
        else:
            view.evaluation(compared)

    guarded(work, debug=debug)


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        sys.stdout.write(f"crane {metadata.version('crane-merge')}\n")
        raise typer.Exit


@app.callback()
def common(
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Results and problems alone.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Every step, too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and end.")
    ] = False,
) -> None:
    """Merge paired Instruct and Thinking checkpoints with CRANE."""
    set_volume(int(verbose) - int(quiet))


def main() -> None:
    """The console script; -q and -v may also stand behind the command."""
    given = sys.argv[1:]
    loud = [a for a in given if a in LOUDNESS]
    app([*loud, *(a for a in given if a not in LOUDNESS)])


if __name__ == "__main__":
    main()
