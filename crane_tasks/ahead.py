"""Work on many items side by side, its results in order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    nbytes: Callable[[Item], int],
    budget: int,
    threads: int | None = None,
) -> Iterator[Result]:
    """`work(item)` of every item, in the items' order, by several threads.

    Items are begun while those before them are waited for, as long as their `nbytes` and
    those of the result that was handed over last stay within `budget`; one that is larger is
    worked on alone. On a CPU every thread computes with one core, so that results do not
    depend on how many there are.

    Args:
        threads: so many (by default as many as torch would compute with).
    """
    threads = threads or torch.get_num_threads()
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        with _one_core_each():
            for item in items:
                size = nbytes(item)
                while waiting and (held + size > budget or len(waiting) > threads):
                    future, done = waiting.popleft()
                    yield future.result()
                    held -= done
                waiting.append((pool.submit(work, item), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
    finally:
        # Also when the caller stops half-way: what was begun ends, nothing else begins.
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_core_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
