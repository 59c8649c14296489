"""Independent work side by side: on threads, results in order; or units on several processes.

Who makes the units is decided above the stages (`Session.spread`): this process, or a flow's
workers. Either way the process that holds the artifact's lock is the only one that writes its
log, so a unit exists whole or not at all.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from artifacts.draft import write_unit
from artifacts.schema import Schema
from artifacts.store import Draft, Unit
from crane_tasks.session import Context

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


def spread_units(
    ctx: Context,
    draft: Draft,
    stage: str,
    work: Callable[..., None],
    units: Mapping[str, tuple[Any, ...]],
) -> Iterator[str]:
    """Write every unit that the draft lacks by `work(ctx, unit, *arguments)`.

    Yields the units' names as they come to exist, in order; those that are there come first.
    """
    missing = [name for name in units if not draft.done(name)]
    yield from (name for name in units if name not in missing)
    calls = [
        (ctx.elsewhere(number), draft.path, draft.schema, name, work, units[name])
        for number, name in enumerate(missing)
    ]
    for record in ctx.session.spread(stage, _write, calls):
        draft.adopt(record)
        yield record["unit"]


def _write(
    ctx: Context,
    draft: Path,
    schema: Schema,
    name: str,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> dict[str, Any]:
    def write(unit: Unit) -> None:
        work(ctx, unit, *arguments)

    return write_unit(draft, schema, name, write)
