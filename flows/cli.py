"""The `crane` command: parse, call, print. Heavy imports wait until a command needs them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from artifacts.store import Store
    from crane_tasks.recipe import Recipe
    from flows.view import View

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Merge paired Instruct and Thinking checkpoints with CRANE.",
)
store_app = typer.Typer(no_args_is_help=True, help="Look at, check and clean the stage store.")
app.add_typer(store_app, name="store")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe file, or a shipped recipe's name.")
]
AlphaOption = Annotated[float | None, typer.Option("--alpha", help="Strength of the edit.")]
TauOption = Annotated[float | None, typer.Option("--tau", help="Where protection is one half.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Change any recipe field.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Folder of the merged checkpoint.")
]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Folder of the stage store.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace another merge.")]
PrefectOption = Annotated[
    bool | None,
    typer.Option(
        "--prefect/--no-prefect",
        help="Run as a Prefect flow (default: if PREFECT_API_URL or run.workers is set).",
    ),
]


def _quiet() -> None:
    """Keep libraries' own chatter off the terminal; ours goes through the view."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _guarded(work: "Callable[[View], Any]", *, debug: bool) -> Any:
    """Run a command: bad input is one message and exit 2, everything else 1, Ctrl-C 130."""
    from artifacts.errors import StoreError, UnusableStore
    from crane_tasks.errors import BadInput, CraneError
    from flows.view import View

    if not debug:
        _quiet()
    view = View()
    try:
        with view:
            return work(view)
    except KeyboardInterrupt:
        view.problem("Interrupted. Finished work is kept: the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None
    except (BadInput, UnusableStore) as error:
        if debug:
            raise
        view.problem(str(error))
        raise typer.Exit(BAD_INPUT) from None
    except (CraneError, StoreError, OSError) as error:
        if debug:
            raise
        view.problem(f"{type(error).__name__}: {error}")
        raise typer.Exit(FAILED) from None


def _print_json(value: Any) -> None:
    from crane_tasks.finite import finite

    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def _require_no_workers(recipe: "Recipe") -> None:
    from crane_tasks.errors import RecipeError

    if recipe.run.workers is not None:
        raise RecipeError(
            "run.workers: Prefect hands out the work: `crane merge --prefect`, or the sweep's "
            "deployment"
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
    prefect: PrefectOption = None,
    debug: DebugOption = False,
) -> None:
    """Merge a pair; finished stages are reused, unfinished ones resumed."""

    def work(view: "View") -> None:
        from flows.opening import open_recipe

        loaded, place = open_recipe(
            recipe, assignments, alpha=alpha, tau=tau, output=output, store=store
        )
        usual = bool(os.environ.get("PREFECT_API_URL") or loaded.run.workers)
        if usual if prefect is None else prefect:
            # Prefect reads these when it is imported: a merge reports to nobody.
            os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
            os.environ.setdefault("DO_NOT_TRACK", "1")
            from flows.prefect_flow import run_merge

            merged = run_merge(
                recipe,
                alpha=alpha,
                tau=tau,
                assignments=assignments,
                output=str(output) if output else None,
                store=str(store) if store else None,
                force=force,
            )
        else:
            from flows.merge import merge as run

            _require_no_workers(loaded)
            merged = run(
                loaded,
                place,
                progress=view.progress,
                notice=view.notice,
                force=force,
                call=view.timed,
            )
        if as_json:
            _print_json(merged.as_json())
        else:
            view.summary(merged)

    _guarded(work, debug=debug)


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

    def work(view: "View") -> None:
        from flows.opening import open_recipe
        from flows.plan import make_plan

        loaded, place = open_recipe(
            recipe, assignments, alpha=alpha, tau=tau, output=output, store=store
        )
        found = make_plan(loaded, place, progress=view.progress)
        if as_json:
            _print_json(found.as_json())
        else:
            view.plan(found)

    _guarded(work, debug=debug)


@app.command()
def scores(
    recipe: RecipeArgument,
    assignments: SetOption = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print S(c, l), computing what is missing."""

    def work(view: "View") -> None:
        from flows.merge import compute_scores, scores_json, stage_json
        from flows.opening import open_recipe

        loaded, place = open_recipe(recipe, assignments, store=store)
        built, found = compute_scores(
            loaded, place, call=view.timed, progress=view.progress, notice=view.notice
        )
        if as_json:
            table = scores_json(found)
            # As in `merge --json` under "scores", and directly, as the object asked for.
            stages = [stage_json(b) for b in built]
            _print_json({"name": loaded.name, "stages": stages, "scores": table, **table})
        else:
            view.scores(found)

    _guarded(work, debug=debug)


@app.command()
def sweep(
    recipe: RecipeArgument,
    alpha: Annotated[str | None, typer.Option("--alpha", help="Comma-separated.")] = None,
    tau: Annotated[str | None, typer.Option("--tau", help="Comma-separated.")] = None,
    fields: Annotated[
        list[str],
        typer.Option(
            "--set-grid", metavar="PATH=VALUE,VALUE", help="Another axis: any recipe field."
        ),
    ] = [],  # noqa: B006
    require: Annotated[
        list[str],
        typer.Option("--require", metavar="METRIC>=NUMBER", help="What the best point must keep."),
    ] = [],  # noqa: B006
    write: Annotated[
        str | None, typer.Option("--write", metavar="best", help="Merge the best point.")
    ] = None,
    assignments: SetOption = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the sweep's report.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure every point of a grid in memory; write a checkpoint of the best alone, if asked."""

    def work(view: "View") -> None:
        from flows.grid import read_numbers
        from flows.opening import open_recipe
        from flows.sweep import sweep as run

        loaded, place = open_recipe(recipe, assignments, store=store)
        _require_no_workers(loaded)
        found = run(
            loaded,
            place,
            read_numbers(alpha, "--alpha") if alpha is not None else (),
            read_numbers(tau, "--tau") if tau is not None else (),
            fields=fields,
            require=require,
            write=write,
            folder=output.expanduser().absolute() if output else None,
            progress=view.progress,
            notice=view.notice,
            call=view.timed,
            force=force,
        )
        if as_json:
            _print_json(found.as_json())
        else:
            view.points(found)
        if found.problem:
            view.problem(found.problem)
            raise typer.Exit(FAILED)

    _guarded(work, debug=debug)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.")],
    recipe: Annotated[str, typer.Option("--recipe", metavar="RECIPE", help="Whose held-out rows.")],
    assignments: SetOption = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare any checkpoint with the recipe's base and donor."""

    def work(view: "View") -> None:
        from flows.evaluate import evaluate as run
        from flows.opening import open_recipe

        loaded, place = open_recipe(recipe, assignments, store=store)
        found = run(loaded, place, checkpoint, progress=view.progress, notice=view.notice)
        if as_json:
            _print_json(found)
        else:
            view.evaluation(found)

    _guarded(work, debug=debug)


def _store(folder: Path | None) -> "Store":
    from artifacts.errors import StoreError
    from artifacts.store import Store

    place = (folder or Path("crane-store")).expanduser().absolute()
    if not (place / "crane-store.json").exists():
        raise StoreError(f"{place}: no store here; name one with --store")
    return Store(place)


@store_app.command("ls")
def store_ls(
    store: StoreOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the finished artifacts."""

    def work(view: "View") -> None:
        from artifacts.cleaning import listing

        found = listing(_store(store))
        _print_json(found) if as_json else view.listing(found)

    _guarded(work, debug=debug)


@store_app.command("show")
def store_show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first digits.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what one artifact is, and what it was made from."""

    def work(view: "View") -> None:
        from artifacts.cleaning import described

        found = described(_store(store), key)
        _print_json(found) if as_json else view.described(found)

    _guarded(work, debug=debug)


@store_app.command("verify")
def store_verify(
    store: StoreOption = None,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Move damaged artifacts out of the way.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read every byte of every artifact against its checksums; exit 1 if any is damaged."""

    def work(view: "View") -> None:
        from artifacts.cleaning import verify_all

        found = verify_all(_store(store), set_aside=set_aside, progress=view.progress)
        _print_json(found) if as_json else view.verified(found)
        if found["damaged"]:
            raise typer.Exit(FAILED)

    _guarded(work, debug=debug)


@store_app.command("gc")
def store_gc(
    store: StoreOption = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            metavar="DAYS",
            min=0.0,
            help="Also remove artifacts not used for so long.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove abandoned drafts, damaged artifacts and, if asked, old ones."""

    def work(view: "View") -> None:
        from artifacts.cleaning import collect_garbage

        found = collect_garbage(_store(store), older_than_days=older_than, dry_run=dry_run)
        _print_json(found) if as_json else view.collected(found)

    _guarded(work, debug=debug)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
