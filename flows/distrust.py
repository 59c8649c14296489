"""Nothing believed that is only remembered: `--rehash` and `--verify` of `crane merge`."""

from artifacts.memo import DigestMemo, hub_digest
from artifacts.proof import digest_like
from crane_tasks.apply.output import provenance
from crane_tasks.errors import CheckpointError
from crane_tasks.identity import local_folder
from crane_tasks.models.files.folder import weight_files
from crane_tasks.places import output_folder
from crane_tasks.session import Session


def rehash_inputs(session: Session) -> None:
    """Have the weights of base and donor hashed again, whatever their size and time say.

    Raises:
        CheckpointError: a file of a hub cache is not what its name says.
    """
    recipe, memo = session.recipe, DigestMemo(session.store.root)
    for value in (recipe.base, recipe.donor):
        folder = local_folder(recipe, value)
        if folder is None:
            continue  # a hub id: its files are compared as they come
        for file in weight_files(folder)[0]:
            named = hub_digest(file)
            if named is None:
                memo.forget(file)
            elif digest_like(file, named) != named:
                raise CheckpointError(
                    f"{file}: is damaged: its name in the cache is its digest, and it holds "
                    f"something else. Delete {file.resolve()} and download it again."
                )


def reread_output(session: Session) -> None:
    """Have the weights of a finished output read against their digests."""
    folder, memo = output_folder(session.recipe), DigestMemo(session.store.root)
    record = provenance(folder)
    for name in record["files"] if record else ():
        memo.forget(folder / name)
