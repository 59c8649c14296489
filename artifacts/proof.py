"""Proof that files still hold what a remembered digest says, read anew behind the work on them.

A memo believes size and time of a file, and a disk may lose bits without touching either. Whoever
computes something from a file reads all of it anyway: then it is in memory, and hashing it again
costs little. Each file is proven once per process.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from artifacts.memo import SHA256, DigestMemo, content_digest, signature

_Claim = tuple[str, tuple[int, ...], str]  # path, stat, digest
_proofs: dict[_Claim, "Future[bool]"] = {}
_lock = threading.Lock()
# Files at a time: a blake3 takes all cores already, a sha256 one.
_blake3, _sha256 = threading.Semaphore(1), threading.Semaphore(4)


class ChangedFile(Exception):
    """A file holds something else than was hashed, or was written to since."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self.file = file


@contextmanager
def proven(files: Iterable[Path], memo: DigestMemo) -> Iterator[None]:
    """Hash files beside the block's work, and compare at its end; those that have a digest.

    Raises:
        ChangedFile: one is not what its digest in the memo was taken from. The memo has forgotten
            it, so that the next run sees what is there.
    """
    begun = [(file, _proof(file, memo)) for file in files if memo.heard_of(file)]
    yield
    for file, proof in begun:
        if proof is None or not proof.result():
            memo.forget(file)
            raise ChangedFile(file)


def _proof(file: Path, memo: DigestMemo) -> "Future[bool] | None":
    """A proof under way or done; None of a file that was written to since it was hashed."""
    digest = memo.known(file)
    if digest is None:
        return None
    claim = str(file), signature(file.stat()), digest
    with _lock:
        if claim in _proofs:
            return _proofs[claim]
        found: Future[bool] = Future()
        _proofs[claim] = found
        if claim in memo.taken:
            found.set_result(True)
            return found
    # Not of a pool, which would be waited for when a run is interrupted.
    threading.Thread(target=_compare, args=(file, claim, found), daemon=True).start()
    return found


def _compare(file: Path, claim: _Claim, found: "Future[bool]") -> None:
    try:
        with _sha256 if claim[2].startswith(SHA256) else _blake3:
            same = digest_like(file, claim[2]) == claim[2] and signature(file.stat()) == claim[1]
        found.set_result(same)
    except BaseException as error:
        found.set_exception(error)


def digest_like(file: Path, like: str) -> str:
    """A file's digest of the kind that another one is."""
    if not like.startswith(SHA256):
        return content_digest(file)
    with file.open("rb") as stream:
        return SHA256 + hashlib.file_digest(stream, "sha256").hexdigest()
