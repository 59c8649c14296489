"""The commands of a merge that others are to have: `crane card`, `push` and `rebuild`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import (
    FAILED,
    DebugOption,
    JsonOption,
    OutputOption,
    StoreOption,
    guarded,
    print_json,
)

if TYPE_CHECKING:
    from flows.terminal import Terminal

MergeArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A merged checkpoint.")]


def card(folder: MergeArgument, debug: DebugOption = False) -> None:
    """Show what `crane push` would say of a merge, and send."""

    def work(view: "Terminal") -> None:
        from flows.publish import parcel_of

        view.parcel(parcel_of(folder))

    guarded(work, debug=debug)


def push(
    folder: MergeArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="On the hub: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="For all to see.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    debug: DebugOption = False,
) -> None:
    """Upload a merge to the hub, private by default; what was uploaded before is not sent again."""

    def work(view: "Terminal") -> None:
        from crane_tasks.errors import OutputError
        from flows.publish import check_repo, parcel_of, upload
        from flows.wording import human

        check_repo(repo)
        parcel = parcel_of(folder)
        seen_by = "all" if public else "those alone whom you let (private)"
        size = human(sum(parcel.files.values()))
        told = f"{len(parcel.files)} files, {size}, to {repo}, seen by {seen_by}"
        if not yes:
            if not sys.stdin.isatty():
                raise OutputError(f"{told}: nobody is here to ask. Give --yes.")
            view.notice(f"{told}. `crane card {folder}` shows what the card says.")
            typer.confirm("Upload?", abort=True, err=True)
        view.notice(f"Uploading {told}")
        sys.stdout.write(upload(parcel, repo, private=not public) + "\n")

    guarded(work, debug=debug)


def rebuild(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A published merge.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Of one that is not on the hub.")
    ] = None,
    donor: Annotated[str | None, typer.Option("--donor", help="The same for the donor.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of calibration rows.")] = None,
    output: OutputOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a published merge again from its crane.json, and compare every file."""

    def work(view: "Terminal") -> None:
        from flows.rebuild import Places
        from flows.rebuild import rebuild as run

        rebuilt = run(
            source,
            Places(base, donor, data, output, store),
            call=view.timed,
            progress=view.progress,
            notice=view.notice,
        )
        if as_json:
            print_json(rebuilt.as_json())
        else:
            view.rebuilt(rebuilt)
        if not rebuilt.same:
            raise typer.Exit(FAILED)

    guarded(work, debug=debug)
