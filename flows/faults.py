"""Failures: which pass by themselves, which artifacts are mended, which disk is full."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from artifacts.errors import DamagedArtifact, MissingArtifact
from crane_tasks.scores.gradients import GRADIENTS
from crane_tasks.session import Session

T = TypeVar("T")
HEALINGS = 20  # more than a merge has artifacts

# A disk that is full or away for a while, a network or a device that is busy.
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EDQUOT", "EHOSTUNREACH",
        "EIO", "ENETDOWN", "ENETUNREACH", "ENOSPC", "EPIPE", "ESTALE", "ETIMEDOUT",
    )
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)
# Of an HTTP answer: time-out, too many requests, and the server's own troubles.
REQUEST_TIMEOUT, TOO_MANY_REQUESTS, SERVER_ERRORS = 408, 429, range(500, 600)
# By name, so that nothing is imported that the failing code had not imported itself.
NETWORK = {
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "requests.exceptions": ("ConnectionError", "Timeout"),
    "openai": ("APIConnectionError",),
}


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what caused it, may be gone at the next attempt.

    A refusal of the hub that is due to a time-out is one, though it reads as bad input; a
    missing file, a wrong recipe or a damaged artifact is none.
    """
    return any(_passes(link) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _passes(error: BaseException) -> bool:
    kinds = {(k.__module__.split(".")[0], k.__name__) for k in type(error).__mro__}
    if ("huggingface_hub", "OfflineModeIsEnabled") in kinds:
        return False
    if any((m.split(".")[0], n) in kinds for m, names in NETWORK.items() for n in names):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in (REQUEST_TIMEOUT, TOO_MANY_REQUESTS) or status in SERVER_ERRORS
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    return isinstance(error, OSError) and error.errno in PASSING


def healing(session: Session, work: Callable[[], T]) -> T:
    """Run `work`; set a damaged artifact aside and run again, which recomputes it alone."""
    # Each round mends one artifact; a disk that damages what was just written must end it.
    for _ in range(HEALINGS):
        try:
            return work()
        except MissingArtifact as error:
            session.notice(f"{error}: somebody has removed it. Computing it anew.")
        except DamagedArtifact as error:
            aside = session.store.set_aside(error.path)
            fate = "computing it anew"
            if aside.parent.name == GRADIENTS.name:
                fate = "doing without it: nothing is decided by it"
            session.notice(f"{error}. Set aside as {aside.name}, {fate}.")
    return work()


@contextmanager
def naming_full_disk(*folders: Path) -> Iterator[None]:
    """Give a "no space left" that names no place the fullest of the folders written to."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(min(folders, key=_free))
        raise


def _free(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    import shutil

    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
