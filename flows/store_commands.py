"""`crane store`: look at, check and clean the stage store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import FAILED, DebugOption, JsonOption, StoreOption, guarded, print_json

if TYPE_CHECKING:
    from artifacts.store import Store
    from flows.terminal import Terminal

store_app = typer.Typer(no_args_is_help=True, help="Look at, check and clean the stage store.")


def _store(folder: Path | None) -> "Store":
    from artifacts.errors import StoreError
    from artifacts.store import Store
    from crane_tasks.user_paths import user_path

    place = user_path(folder or "crane-store").absolute()
    if not (place / "crane-store.json").exists():
        raise StoreError(f"{place}: no store here; name one with --store")
    return Store(place)


@store_app.command("ls")
def store_ls(
    store: StoreOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the finished artifacts."""

    def work(view: "Terminal") -> None:
        from artifacts.cleaning import listing

        records = listing(_store(store))
        print_json(records) if as_json else view.listing(records)

    guarded(work, debug=debug)


@store_app.command("show")
def store_show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first digits.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what one artifact is, and what it was made from."""

    def work(view: "Terminal") -> None:
        from artifacts.cleaning import described

        record = described(_store(store), key)
        print_json(record) if as_json else view.described(record)

    guarded(work, debug=debug)


@store_app.command("verify")
def store_verify(
    store: StoreOption = None,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Move damaged artifacts out of the way.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Read a merged checkpoint instead."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read every byte of every artifact against its checksums; exit 1 if any is damaged."""

    def work(view: "Terminal") -> None:
        from artifacts.cleaning import verify_all

        if output is not None:
            from crane_tasks.apply.output import verify_output

            wrong = verify_output(output)
            told = {"output": str(output), "damaged": wrong}
            print_json(told) if as_json else view.verified_output(told)
            if wrong:
                raise typer.Exit(FAILED)
            return
        outcome = verify_all(_store(store), set_aside=set_aside, progress=view.progress)
        print_json(outcome) if as_json else view.verified(outcome)
        if outcome["damaged"]:
            raise typer.Exit(FAILED)

    guarded(work, debug=debug)


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

    def work(view: "Terminal") -> None:
        from artifacts.cleaning import collect_garbage

        outcome = collect_garbage(_store(store), older_than_days=older_than, dry_run=dry_run)
        print_json(outcome) if as_json else view.collected(outcome)

    guarded(work, debug=debug)
