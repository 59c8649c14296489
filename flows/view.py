"""What a person sees in the terminal: progress on stderr, summaries on stdout."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from artifacts.store import Built
    from crane_tasks.scores import Scores
    from flows.merge import Merged
    from flows.plan import Plan
    from flows.sweep import Sweep


class View:
    """Progress bars while it is entered, and one method per thing to show."""

    def __init__(self) -> None:
        self.err = Console(stderr=True, highlight=False)
        # Piped output has no width of its own: 80 columns would cut the tables.
        width = None if sys.stdout.isatty() else 120
        self.out = Console(file=sys.stdout, highlight=False, width=width)
        self._bars = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[what]}"),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=not self.err.is_terminal,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> "View":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def progress(self, stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        """A stage has come so far; its bars go when its own is full."""
        key = (stage, bar)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(bar or stage, total=total, what=what)
        self._bars.update(self._tasks[key], completed=done, total=total, what=what)
        if done >= total and not bar:
            for mine in [k for k in self._tasks if k[0] == stage]:
                self._bars.remove_task(self._tasks.pop(mine))

    def notice(self, text: str) -> None:
        """Something a person should know of."""
        self.err.print(f"[yellow]{_plain(text)}[/yellow]")

    def problem(self, text: str) -> None:
        """Why the command ends."""
        self._bars.stop()
        self.err.print(f"[bold red]crane:[/bold red] {_plain(text)}", soft_wrap=True)

    def timed(self, stage: str, build: "Callable[..., Built]", *args: Any) -> "Built":
        """Run a stage and say how it ended."""
        start = time.monotonic()
        built = build(*args)
        seconds = time.monotonic() - start
        colour = {"reused": "cyan", "resumed": "yellow"}.get(built.status, "green")
        self.err.print(f"{stage:>12}  [{colour}]{built.status:<8}[/{colour}] {seconds:7.2f} s")
        return built

    def summary(self, merged: "Merged") -> None:
        """The end of a merge."""
        self.evaluation(merged.evaluation)
        scores = merged.scores.per_component if merged.scores else {}
        rows = [
            [
                component,
                f"{scores[component]:.4f}" if component in scores else "–",
                f"{edit['survived']:.3f}",
                f"{edit['cosine']:.3f}",
            ]
            for component, edit in merged.edit.items()
        ]
        self._table("The edit", ["component", "S", "survived", "cosine"], rows)
        self.out.print(f"Merged checkpoint: {merged.ctx.output}", soft_wrap=True)
        self.out.print(f"Report:            {merged.report}", soft_wrap=True)

    def evaluation(self, result: dict[str, Any]) -> None:
        """The evaluation table and the gate's prediction."""
        from crane_tasks.report import evaluation_rows

        head, rows = evaluation_rows(result)
        if len(head) > 1:
            self._table("What the models do", head, rows)
        gate = result.get("gate")
        if gate:
            lines = [
                [name, "–" if p is None else f"{p:+.4f}", f"{gate['realised'][name]:+.4f}"]
                for name, p in gate["predicted"].items()
            ]
            title = "Change of calibration loss"
            self._table(title, ["set", "predicted", "realised"], lines)

    def scores(self, found: "Scores") -> None:
        """S per layer and component."""
        components = list(found.per_component)
        rows = [
            [str(layer), *(f"{row[c]:.4f}" if c in row else "–" for c in components)]
            for layer, row in found.per_layer.items()
        ]
        rows.append(["all", *(f"{found.per_component[c]:.4f}" for c in components)])
        self._table("S(component, layer)", ["layer", *components], rows)

    def plan(self, plan: "Plan") -> None:
        """What each stage would do."""
        rows = [
            [
                s.name,
                s.status,
                human(s.disk),
                human(s.memory),
                human(s.device_memory),
                duration(s.seconds),
                s.why,
            ]
            for s in plan.stages
        ]
        head = ["stage", "would be", "disk", "memory", "device", "time", "why"]
        self._table(f"Plan for {plan.name}", head, rows)
        self.out.print(f"Output: {plan.output}\nStore:  {plan.store}", soft_wrap=True)
        self.out.print("Memory and time are estimates; disk is what the stage will write.")

    def points(self, found: "Sweep") -> None:
        """The table of a sweep, its front marked."""
        from crane_tasks.sweep_report import point_rows

        head, rows = point_rows(found.points, found.choice, found.models)
        self._table("Sweep: ● Pareto front, ★ best", head, rows)
        for point in found.points:
            if point.error is not None:
                self.out.print(f"[red]failed[/red] {_plain(f'{point}: {point.error}')}")
        if found.written:
            self.out.print(f"Merged checkpoint: {found.written}", soft_wrap=True)
        self.out.print(f"Report:            {found.report}", soft_wrap=True)

    def listing(self, records: list[dict[str, Any]]) -> None:
        """The artifacts of a store."""
        rows = [
            [r["stage"], r["key"], human(r["bytes"]), r["created"] or "damaged"] for r in records
        ]
        self._table("Artifacts", ["stage", "key", "size", "created"], rows)

    def described(self, record: dict[str, Any]) -> None:
        """One artifact."""
        from rich.pretty import Pretty

        self.out.print(Pretty(record, max_length=12))

    def verified(self, found: dict[str, Any]) -> None:
        """The outcome of `crane store verify`."""
        for name, problems in found["damaged"].items():
            self.out.print(f"[red]{name}[/red]: {_plain('; '.join(problems[:3]))}")
        sound = found["checked"] - len(found["damaged"])
        self.out.print(f"{sound} of {found['checked']} artifacts are sound.")

    def collected(self, found: dict[str, Any]) -> None:
        """The outcome of `crane store gc`."""
        for name in found["removed"]:
            self.out.print(name)
        verb = "Would free" if found["dry_run"] else "Freed"
        self.out.print(f"{verb} {human(found['bytes'])}.")

    def _table(self, title: str, head: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(head):
            text = index == 0 or name in ("why", "would be", "key", "created")
            table.add_column(name, justify="left" if text else "right")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)


def _plain(text: str) -> str:
    """Text in which rich must see no markup."""
    from rich.markup import escape

    return escape(text)


def human(count: float | None) -> str:
    """Bytes for a person."""
    if not count:
        return "–"
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float | None) -> str:
    """A time for a person."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
