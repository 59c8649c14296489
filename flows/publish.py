"""Giving a merge to others: what is sent to the hub, and sending it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.memo import content_digest
from crane_tasks.apply.output import PROVENANCE, RECIPE_COPY, provenance, unlike_record
from crane_tasks.errors import OutputError
from crane_tasks.hub import hub_errors
from crane_tasks.models.files.folder import CARD, INDEX
from crane_tasks.user_paths import user_path

REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# Of an earlier merge in the same repository: a loader would take them.
STALE = ["*.safetensors", INDEX]


@dataclass(frozen=True)
class Parcel:
    """A finished merge, as it is sent.

    Attributes:
        files: bytes of each file, by its path in the folder. Not the recipe that runs from there:
            its paths are of this machine, and crane.json has the recipe.
        card: the text of README.md.
    """

    folder: Path
    record: Mapping[str, Any]
    files: Mapping[str, int]
    card: str


def parcel_of(folder: Path) -> Parcel:
    """What of a folder is sent: all but hidden files and the recipe that runs from there.

    Raises:
        OutputError: it is no finished merge, or a file was changed since.
    """
    folder = user_path(folder).absolute()
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder")
    record = provenance(folder)
    if record is None:
        raise OutputError(f"{folder}: is no merge of CRANE, it has no {PROVENANCE}")
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    files = {
        name: file.stat().st_size
        for name, file in sorted(found.items())
        if name != RECIPE_COPY and not any(part.startswith(".") for part in Path(name).parts)
    }
    for name, told in unlike_record(folder, record):
        raise OutputError(f"{folder}: {name} {told}: not the merge that {PROVENANCE} tells of")
    return Parcel(folder, record, files, (folder / CARD).read_text())


def check_repo(repo: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        OutputError: it is none.
    """
    if not REPO.fullmatch(repo):
        raise OutputError(f"{repo}: a repository of the hub is called owner/name")


def upload(parcel: Parcel, repo: str, *, private: bool) -> str:
    """Upload a merge in place of what the repository holds; the address of the commit.

    Raises:
        OutputError: a weight file was changed since it was merged.
        CheckpointError: the hub refuses it.
    """
    from huggingface_hub import HfApi

    for name, said in parcel.record["files"].items():
        if content_digest(parcel.folder / name) != said["digest"]:
            raise OutputError(f"{parcel.folder / name}: was changed after the merge")
    api = HfApi()
    with hub_errors(repo, "the hub did not take it"):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=parcel.folder,
            commit_message="A merge made with CRANE",
            allow_patterns=[*parcel.files],
            delete_patterns=STALE,
        )
    return str(commit.commit_url)
