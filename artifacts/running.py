"""Which processes use a store, and since when: what they have used since then is not garbage.

STORE/.running/PID-NS    held (flock) by a process that began to use the store at NS
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

FOLDER = ".running"
_held: dict[Path, tuple[int, int]] = {}  # with the process: a fork holds nothing of its own


def note_use(root: Path) -> None:
    """Note, for as long as this process lives, that it uses a store."""
    root = root.resolve()
    if root in _held and _held[root][0] == os.getpid():
        return
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    note = folder / f"{os.getpid()}-{time.time_ns()}"
    handle = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(handle, fcntl.LOCK_EX)
    _held[root] = os.getpid(), handle


def used_since(root: Path) -> float | None:
    """When the first of the processes that use a store began to, in seconds; None without any.

    Notes of processes that have ended are removed.
    """
    begun = []
    for note in (root / FOLDER).glob("*-*"):
        with contextlib.suppress(FileNotFoundError), note.open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                begun.append(int(note.name.partition("-")[2]) / 1e9)
            else:
                note.unlink(missing_ok=True)
    return min(begun, default=None)
