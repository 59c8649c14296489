"""The commands with which one begins: `crane init`, `schema` and `ui`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import DebugOption, guarded, print_json

if TYPE_CHECKING:
    from flows.terminal import Terminal


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the recipe and its file.")],
    source: Annotated[
        str, typer.Option("--from", help="The shipped recipe to begin with.")
    ] = "crane-30b",
    base: Annotated[str | None, typer.Option("--base", help="Folder or hub id.")] = None,
    donor: Annotated[str | None, typer.Option("--donor", help="Folder or hub id.")] = None,
    debug: DebugOption = False,
) -> None:
    """Write a recipe of your own, NAME.yaml, from one that comes with CRANE."""

    def work(view: "Terminal") -> None:
        from flows.init import write_recipe

        file = write_recipe(name, source, base, donor, Path.cwd())
        sys.stdout.write(f"{file.name}\n")

    guarded(work, debug=debug)


def schema() -> None:
    """Print the recipe's JSON Schema, by which editors check and complete it."""
    from crane_tasks.recipe import Recipe

    print_json(Recipe.model_json_schema())


def ui(
    port: Annotated[int, typer.Option("--port", help="Of the page.")] = 4200,
    home: Annotated[Path, typer.Option("--home", help="The server's data.")] = Path(".prefect"),
) -> None:
    """Prefect's page with merge, sweep and evaluate as forms, and a worker; Ctrl-C stops all."""
    from flows.prefect.server import run

    raise typer.Exit(run(port, home))
