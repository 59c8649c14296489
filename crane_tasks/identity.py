"""Where a checkpoint lies, and who it is: digests of content, never of paths."""

from collections.abc import Iterable
from pathlib import Path

from artifacts.memo import DigestMemo
from artifacts.ref import digest_of
from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.folder import TOKENIZER_FILES, weight_files
from crane_tasks.models.files.formats import other_form
from crane_tasks.models.files.generation import GENERATION
from crane_tasks.recipe import Recipe


def local_folder(recipe: Recipe, value: str) -> Path | None:
    """The folder of a checkpoint that is given as one; None of a hub id.

    Raises:
        CheckpointError: it is a file, or neither a folder nor a hub id.
    """
    folder = recipe.locate(value)
    if folder is not None:
        if not folder.is_dir():
            told = other_form(folder) or "a checkpoint is a folder, this is a file"
            raise CheckpointError(f"{folder}: {told}")
        return folder
    repo = value.partition("@")[0]
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(f"{value}: no such checkpoint folder, and not a hub id (owner/name)")
    return None


def name_in_cache(folder: Path) -> tuple[str, str] | None:
    """The hub's id and commit of a snapshot in its cache; None of any other folder."""
    snapshots = folder.parent
    parts = snapshots.parent.name.split("--")
    if snapshots.name != "snapshots" or parts[0] != "models" or len(parts) != 3:
        return None
    return f"{parts[1]}/{parts[2]}", folder.name


def published_name(recipe: Recipe, value: str) -> str:
    """A hub id as it is; of a folder only its last name, which says nothing of a machine."""
    folder = recipe.locate(value)
    if folder is None:
        return value.partition("@")[0]
    known = name_in_cache(folder)
    return folder.name if known is None else known[0]


def files_identity(folder: Path, names: Iterable[str], memo: DigestMemo) -> str:
    """A digest of some files of a folder, by their names there."""
    return digest_of({name: memo.digest(folder / name) for name in names})


def checkpoint_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of the weights and the config, independent of where the folder lies."""
    files, _ = weight_files(folder)
    digests = (memo.digest(file) for file in files)
    return checkpoint_of(digests, memo.digest(folder / "config.json"))


def checkpoint_of(weights: Iterable[str], config: str) -> str:
    """The same from the digests of the files."""
    return digest_of({"weights": sorted(weights), "config": config})


def tokenizer_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of the tokenizer's files and the chat template."""
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    return files_identity(folder, names, memo)


def stops_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of what says where decoding ends; empty without such a file."""
    file = folder / GENERATION
    return memo.digest(file) if file.exists() else ""


def behaviour_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of what answers depend on: the weights, and where decoding stops."""
    return behaviour_of(checkpoint_identity(folder, memo), stops_identity(folder, memo))


def behaviour_of(checkpoint: str, stops: str) -> str:
    """The same from its two parts."""
    return digest_of({"checkpoint": checkpoint, "stops": stops})
