"""The proof that base and donor are, byte for byte, what a run's keys say of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from artifacts.memo import DigestMemo, hub_digest
from artifacts.proof import ChangedFile, proven
from crane_tasks.errors import ChangedWeights
from crane_tasks.session import Context

BASE_SIDE, DONOR_SIDE = "base", "donor"


@contextmanager
def proven_weights(ctx: Context, sides: Iterable[str] = (BASE_SIDE, DONOR_SIDE)) -> Iterator[None]:
    """Compare the weights of the pair with their digests, beside the block's work.

    Raises:
        ChangedWeights: names a file that holds something else; what the block made is of no use.
    """
    pair = ctx.pair()
    both = {BASE_SIDE: pair.base, DONOR_SIDE: pair.donor}
    files = [file for side in sides for file in both[side].files]
    try:
        with proven(files, DigestMemo(ctx.store.root)):
            yield
    except ChangedFile as error:
        file = error.file
        cure = "The next run takes it as what it is now."
        if hub_digest(file) is not None:
            cure = f"Its name in the cache is its digest: delete {file.resolve()}, and run again."
        raise ChangedWeights(
            f"{file}: does not hold what was hashed any longer: it was written to, or its disk "
            f"has damaged it. Nothing was made from it. {cure}"
        ) from error
