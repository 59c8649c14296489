"""What a person sees in the terminal: progress on stderr, summaries on stdout."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from flows.progress_lines import ProgressLines
from flows.wording import duration, human

if TYPE_CHECKING:
    from artifacts.store import Built
    from crane_tasks.report.tables import Cells
    from crane_tasks.scores.agreement import Agreement
    from crane_tasks.scores.reading import Scores
    from crane_tasks.scores.stability import Draws
    from crane_tasks.session import Context
    from crane_tasks.stage import Keys, Stage
    from flows.merge import Merged
    from flows.plan import Plan
    from flows.publish import Parcel
    from flows.rebuild import Rebuilt
    from flows.sweep_result import Sweep
    from flows.tune_result import Tuned


class Terminal:
    """Progress bars while it is entered, and one method per thing to show."""

    def __init__(self, volume: int = 0) -> None:
        """
        Args:
            volume: below 0 results and problems alone; above 0 every step, too.
        """
        self._volume = volume
        self.err = Console(stderr=True, highlight=False)
        # Piped output has no width of its own: 80 columns would cut the tables.
        width = None if sys.stdout.isatty() else 120
        self.out = Console(file=sys.stdout, highlight=False, width=width)
        self._bars = Bars(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[what]}"),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=not self.err.is_terminal or volume < 0,
        )
        self._lines = ProgressLines(self._say)
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> "Terminal":
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
        """A stage has come so far; its bars go when its own is full. Logs get lines instead."""
        if self._volume > 0 and not bar:
            self._say(f"{stage}: {done} of {total}, {what}")
        elif not self.err.is_terminal:
            self._lines(stage, done, total, what, bar)
        key = (stage, bar)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(bar or stage, total=total, what=what)
        self._bars.update(self._tasks[key], completed=done, total=total, what=what)
        if done >= total and not bar:
            for mine in [k for k in self._tasks if k[0] == stage]:
                self._bars.remove_task(self._tasks.pop(mine))

    def _say(self, text: str) -> None:
        if self._volume >= 0:
            self.err.print(_plain(text), soft_wrap=True)

    def notice(self, text: str) -> None:
        """Something a person should know of."""
        self.err.print(f"[yellow]{_plain(text)}[/yellow]")

    def problem(self, text: str) -> None:
        """Why the command ends."""
        self._bars.stop()
        self.err.print(f"[bold red]crane:[/bold red] {_plain(text)}", soft_wrap=True)

    def timed(self, stage: "Stage", ctx: "Context", keys: "Keys") -> "Built":
        """Run a stage and say how it ended."""
        start = time.monotonic()
        built = stage.build(ctx, keys)
        seconds = time.monotonic() - start
        colour = {"reused": "cyan", "resumed": "yellow"}.get(built.status, "green")
        status = f"[{colour}]{built.status:<8}[/{colour}]"
        if self._volume >= 0:
            self.err.print(f"{stage.title:>12}  {status} {seconds:7.2f} s")
        return built

    def summary(self, merged: "Merged") -> None:
        """The end of a merge."""
        self.evaluation(merged.evaluation)
        self._table("The edit", merged.edit_table)
        self.out.print(_plain(f"Merged checkpoint: {merged.ctx.output}"), soft_wrap=True)
        self.out.print(_plain(f"Report:            {merged.report}"), soft_wrap=True)

    def evaluation(self, result: dict[str, Any]) -> None:
        """The evaluation table and the gate's prediction."""
        from crane_tasks.report.tables import (
            against_base_table,
            evaluation_table,
            prediction_table,
            suites_table,
            unfinished_note,
        )

        if evaluation_table(result)[1]:
            self._table("What the models do (at 95 %)", evaluation_table(result))
            self._table("On the same rows", against_base_table(result))
        if suites_table(result)[1]:
            self._table("Suites (± standard error)", suites_table(result))
        if note := unfinished_note(result):
            self.out.print(_plain(note))
        if result.get("gate"):
            self._table("Change of calibration loss", prediction_table(result))

    def parcel(self, parcel: "Parcel") -> None:
        """A merge's card as it stands, and the files beside it."""
        self.out.print(parcel.card, markup=False, soft_wrap=True)
        rows = [[name, human(size)] for name, size in parcel.files.items()]
        self._table(f"{parcel.folder}", (["file", "size"], rows))

    def rebuilt(self, rebuilt: "Rebuilt") -> None:
        """Each file of a published merge against its rebuild."""
        rows = [[name, found] for name, found in rebuilt.files.items()]
        self._table(f"{rebuilt.source}, made again in {rebuilt.output}", (["file", "bytes"], rows))
        same = sum(found == "same" for found in rebuilt.files.values())
        self.out.print(f"{same} of {len(rebuilt.files)} files are the same, byte for byte.")

    def scores(self, scores: "Scores") -> None:
        """S per layer and component."""
        from crane_tasks.report.tables import score_table

        self._table("S(component, layer)", score_table(scores))

    def agreement(self, found: "Agreement", asked: "Draws") -> None:
        """How alike S of complementary halves of the items is."""
        from crane_tasks.report.tables import agreement_table

        title = f"S of complementary halves: {asked.draws} draws of {asked.groups // 2} groups"
        self._table(f"{title} of {asked.groups}", agreement_table(found))

    def alpha_by_rule(self, alpha: float) -> None:
        """What one of the method's scripts prints beside the scores."""
        self.out.print(
            f"alpha by rule: {alpha:.4g}, sum(S p) / sum(S^2 (s_R^2 + s_A^2)): a Newton step with "
            "squared slopes for the curvature. Nothing uses it; `crane sweep` measures alphas."
        )

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
        self._table(f"Plan for {plan.name}", (head, rows))
        self.out.print(_plain(f"Output: {plan.output}\nStore:  {plan.store}"), soft_wrap=True)
        self.out.print(f"Calls:  {plan.calls}\nFormat: {' '.join(plan.patterns)}", markup=False)
        self.out.print("Memory and time are estimates; disk is what the stage will write.")

    def points(self, swept: "Sweep") -> None:
        """The table of a sweep, its front marked."""
        from crane_tasks.report.sweep import alike_note, point_rows

        rows = point_rows(swept.points, swept.choice, swept.models)
        self._table("Sweep: ● Pareto front, ★ best", rows)
        for point in swept.points:
            if point.error is not None:
                self.out.print(f"[red]failed[/red] {_plain(f'{point}: {point.error}')}")
        if note := alike_note(swept.points, swept.choice):
            self.out.print(_plain(note), soft_wrap=True)
        if swept.written:
            self.out.print(_plain(f"Merged checkpoint: {swept.written}"), soft_wrap=True)
        self.out.print(_plain(f"Report:            {swept.report}"), soft_wrap=True)

    def tuned(self, tuned: "Tuned") -> None:
        """What a search found, on the rows that it never saw."""
        self.evaluation({"models": tuned.unseen})
        for line in tuned.lines:
            self.out.print(_plain(line), soft_wrap=True)
        if tuned.recipe:
            self.out.print(_plain(f"Recipe:            {tuned.recipe}"), soft_wrap=True)
        self.out.print(_plain(f"Report:            {tuned.trials.report}"), soft_wrap=True)

    def listing(self, records: list[dict[str, Any]]) -> None:
        """The artifacts of a store."""
        rows = [
            [r["stage"], r["key"], human(r["bytes"]), r["created"] or "damaged", r["made_for"]]
            for r in records
        ]
        self._table("Artifacts", (["stage", "key", "size", "created", "made for"], rows))
        self.out.print(f"{len(records)} artifacts, {human(sum(r['bytes'] for r in records))}.")

    def described(self, record: dict[str, Any]) -> None:
        """One artifact."""
        from rich.pretty import Pretty

        self.out.print(Pretty(record, max_length=12))

    def verified(self, outcome: dict[str, Any]) -> None:
        """The outcome of `crane store verify`."""
        for name, problems in outcome["damaged"].items():
            self.out.print(f"[red]{name}[/red]: {_plain('; '.join(problems[:3]))}")
        sound = outcome["checked"] - len(outcome["damaged"])
        self.out.print(f"{sound} of {outcome['checked']} artifacts are sound.")

    def verified_output(self, outcome: dict[str, Any]) -> None:
        """The outcome of `crane store verify --output`."""
        for name, told in outcome["damaged"].items():
            self.out.print(f"[red]{_plain(name)}[/red]: {_plain(told)}")
        if not outcome["damaged"]:
            self.out.print(_plain(f"{outcome['output']}: every byte is as it was merged."))

    def collected(self, outcome: dict[str, Any]) -> None:
        """The outcome of `crane store gc`."""
        for name in outcome["removed"]:
            self.out.print(name)
        verb = "Would free" if outcome["dry_run"] else "Freed"
        self.out.print(f"{verb} {human(outcome['bytes']) if outcome['bytes'] else 'nothing'}.")

    def _table(self, title: str, cells: "Cells") -> None:
        head, rows = cells
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(head):
            text = index == 0 or name in ("why", "would be", "key", "created", "made for")
            table.add_column(name, justify="left" if text else "right")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)


def _plain(text: str) -> str:
    """Text in which rich must see no markup."""
    from rich.markup import escape

    return escape(text)
