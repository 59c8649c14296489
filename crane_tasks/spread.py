"""Independent units of a stage, made here or by several processes that share the store.

Who makes them is decided above the stages: `here` does it in this process, a flow hands them
to its task runner's workers. Either way the process that holds the artifact's lock is the only
one that writes its log, so a unit exists whole or not at all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from artifacts.draft import write_unit
from artifacts.schema import Schema
from artifacts.store import Draft, Unit

if TYPE_CHECKING:
    from crane_tasks.context import Context

Result = TypeVar("Result")


class Spread(Protocol):
    """Runs one function on several tuples of arguments, side by side if it can."""

    def __call__(
        self, what: str, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[Result]:
        """The results in the order of `calls`; the first error is raised in its turn.

        `work` is a function of a module, its arguments and results can be pickled.
        """


def here(
    what: str, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]]
) -> Iterator[Result]:
    """One after the other, in this process."""
    return (work(*call) for call in calls)


def spread_units(
    ctx: "Context",
    draft: Draft,
    stage: str,
    work: Callable[..., None],
    units: Mapping[str, tuple[Any, ...]],
) -> Iterator[str]:
    """Write every unit that the draft lacks by `work(ctx, unit, *arguments)`.

    Yields the units' names as they come to exist, in order; those that are there come first.
    """
    missing = [name for name in units if not draft.done(name)]
    yield from (name for name in units if draft.done(name))
    there = ctx.elsewhere()
    calls = [(there, draft.path, draft.schema, name, work, units[name]) for name in missing]
    for record in ctx.spread(stage, _write, calls):
        draft.adopt(record)
        yield record["unit"]


def _write(
    ctx: "Context",
    draft: Path,
    schema: Schema,
    name: str,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> dict[str, Any]:
    def write(unit: Unit) -> None:
        work(ctx, unit, *arguments)

    return write_unit(draft, schema, name, write)
