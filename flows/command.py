"""What every command has: options, exit codes, one message for what a user can cure."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crane_tasks.recipe import Recipe
    from flows.terminal import Terminal

DONE, FAILED, BAD_INPUT = 0, 1, 2

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
RehashOption = Annotated[
    bool, typer.Option("--rehash", help="Hash base and donor anew, whatever is remembered.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Read a finished output's weights against their digests.")
]
AlphasOption = Annotated[str | None, typer.Option("--alpha", help="Comma-separated.")]
TausOption = Annotated[str | None, typer.Option("--tau", help="Comma-separated.")]
AxisOption = Annotated[
    list[str],
    typer.Option("--set-grid", metavar="PATH=VALUE,VALUE", help="Another axis: any recipe field."),
]
RequireOption = Annotated[
    list[str],
    typer.Option("--require", metavar="METRIC>=NUMBER", help="What the best point must keep."),
]
WriteOption = Annotated[
    str | None, typer.Option("--write", metavar="best", help="Merge the best point.")
]
AnswersOption = Annotated[
    str,
    typer.Option("--answers", metavar="all|front|best:N", help="Which points answer prompts."),
]
ReportOption = Annotated[Path | None, typer.Option("--output", help="Folder of the report.")]
GroupsOption = Annotated[int, typer.Option("--groups", help="Into which each set is dealt.")]
DrawsOption = Annotated[int, typer.Option("--draws", help="Of half of the groups.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of dealing and drawing.")]
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


volume = 0  # -q and -v: what a person wants to hear


def set_volume(value: int) -> None:
    """Below 0 results and problems alone; above 0 every step and what libraries say."""
    global volume
    volume = value


def guarded(work: "Callable[[Terminal], Any]", *, debug: bool) -> Any:
    """Run a command: bad input is one message and exit 2, all else 1, Ctrl-C 130, SIGTERM 143."""
    from artifacts.errors import StoreError, UnusableStore
    from crane_tasks.errors import BadInput, CraneError
    from flows.interrupts import KEPT, Interrupts
    from flows.terminal import Terminal

    if not debug and volume <= 0:
        _quiet()
    view = Terminal(volume)
    interrupts = Interrupts()
    try:
        with interrupts.heard(), view:
            return work(view)
    except KeyboardInterrupt:
        view.problem(KEPT)
        interrupts.told = True
        raise typer.Exit(interrupts.code) from None
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


def print_json(value: Any) -> None:
    from crane_tasks.report.finite import finite

    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def require_no_workers(recipe: "Recipe") -> None:
    from crane_tasks.errors import RecipeError

    if recipe.run.workers is not None:
        raise RecipeError(
            "run.workers: Prefect hands out the work: `crane merge --prefect`, or the sweep's "
            "deployment"
        )
