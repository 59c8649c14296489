"""What a process keeps in memory between two calls: a loaded model, an editor, open headers."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class Kept:
    """At most one thing of each kind, known by what it was made of.

    A session has one. Where it is sent to another process, it is that process's own: the calls
    that a worker gets one after the other share what they load.
    """

    def __init__(self) -> None:
        self._things: dict[str, tuple[Hashable, Any]] = {}
        self._lock = threading.RLock()

    def one(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """The thing of a kind; another one than that of `key` goes before it is made."""
        with self._lock:
            known, thing = self._things.get(kind, (None, None))
            if thing is None or known != key:
                self._things.pop(kind, None)
                thing = make()
                self._things[kind] = key, thing
            result: T = thing
            return result

    def has(self, kind: str) -> bool:
        """Whether there is a thing of this kind."""
        return kind in self._things

    def let_go(self, kind: str) -> None:
        """Drop the thing of a kind."""
        with self._lock:
            self._things.pop(kind, None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have what is kept to oneself, where it is changed in place."""
        with self._lock:
            yield

    def __reduce__(self) -> tuple[Callable[[], "Kept"], tuple[()]]:
        return kept_by_process, ()


@cache
def kept_by_process() -> Kept:
    """The one of a worker, which outlives the calls that it is sent."""
    return Kept()
