"""What a search found: its trials, the best recipe, and how that does on rows it never saw."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from artifacts.store import write_atomically
from crane_tasks.errors import OutputError
from crane_tasks.evaluate.choice import Metrics, Point, shortfall
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import changed
from crane_tasks.report.finite import finite
from flows.sweep_result import Sweep

BEST, RESULT = "best.yaml", "tune.json"


@dataclass
class Trials(Sweep):
    """The trials as a sweep's report shows them; one that was cut short is no failure."""

    @property
    def problem(self) -> str | None:
        if len(self.points) < self.planned or any(self.choice.meets):
            return None
        return shortfall(self.points, self.requirements)


@dataclass
class Tuned:
    """A search that came to its end.

    Attributes:
        trials: its points, on the rows that it saw.
        known: how many of them an earlier run had measured.
        reasons: why trials were cut short, by their place.
        counts: held-out rows by part (seen, unseen) and set.
        rivals: the points of plain methods that keep the same requirements on the seen rows.
        unseen: on the rest, metrics of base, donor, the best and the rivals.
        ends: of the intervals of the best and the rivals there.
        recipe: the file of the best one, if a point keeps every requirement.
    """

    trials: Trials
    seed: int
    counts: dict[str, dict[str, int]]
    known: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    rivals: dict[str, Point | None] = field(default_factory=dict)
    unseen: dict[str, Metrics] = field(default_factory=dict)
    ends: dict[str, Metrics] = field(default_factory=dict)
    recipe: Path | None = None

    @property
    def best(self) -> Point | None:
        place = self.trials.choice.best
        return None if place is None else self.trials.points[place]

    @property
    def problem(self) -> str | None:
        return self.trials.problem

    @property
    def unseen_meets(self) -> dict[str, bool]:
        """Who keeps every requirement on the unseen rows; base and donor, which have no
        intervals here, only where none is asked for."""
        required = self.trials.requirements
        of_ends = any("." in r.metric for r in required)
        known = {name: {**m, **self.ends.get(name, {})} for name, m in self.unseen.items()}
        return {
            name: all(r.met(m) for r in required)
            for name, m in known.items()
            if name in self.ends or not of_ends
        }

    @property
    def lines(self) -> list[str]:
        """What a person reads below the table."""
        seen, unseen = (
            " and ".join(f"{count} {name}" for name, count in self.counts[part].items())
            for part in ("seen", "unseen")
        )
        lost = [
            n for n, kept in self.unseen_meets.items() if not kept and n not in ("base", "donor")
        ]
        missing = [name for name, point in self.rivals.items() if point is None]
        at = [f"{name} at alpha {p.alpha:g}" for name, p in self.rivals.items() if p is not None]
        return [
            f"Searched on the first {seen} rows; the table is of the {unseen} rows after them.",
            f"Trials: {len(self.trials.points)}, of which {len(self.reasons)} were cut short and "
            f"{self.known} were known.",
            *([f"Best: {self.best}"] if self.best else []),
            *([f"Beside it: {', '.join(at)}."] if at else []),
            *(
                [f"On these rows no longer within what is required: {', '.join(lost)}."]
                if lost
                else []
            ),
            *([f"No alpha keeps what is required: {', '.join(missing)}."] if missing else []),
        ]

    def as_json(self) -> dict[str, Any]:
        """The object that `crane tune --json` prints."""
        trials = self.trials.as_json()
        for place, reason in self.reasons.items():
            trials["points"][place]["pruned"] = reason
        rivals = {
            name: None if p is None else {"alpha": p.alpha, "seen": dict(p.metrics)}
            for name, p in self.rivals.items()
        }
        record = {
            **trials,
            "budget": self.trials.planned,
            "seed": self.seed,
            "split": self.counts,
            "known": self.known,
            "rivals": rivals,
            "unseen": self.unseen,
            "unseen_meets": self.unseen_meets,
            "recipe": str(self.recipe) if self.recipe else None,
            "problem": self.problem,
        }
        return dict(finite(record))

    def write(self) -> None:
        """Write `tune.json` beside the report of the trials; an older search's recipe goes."""
        if self.recipe is None:
            (self.trials.output / BEST).unlink(missing_ok=True)
        text = json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n"
        write_atomically(self.trials.output / RESULT, text)


def check_result_folder(folder: Path) -> None:
    """Refuse a folder whose recipe no search has written.

    Raises:
        OutputError: it has one.
    """
    if (folder / BEST).exists() and not (folder / RESULT).exists():
        raise OutputError(
            f"{folder}: holds a {BEST} that is of no search. Choose another --output."
        )


def write_best(recipe: Recipe, folder: Path) -> Path:
    """A recipe file that merges from anywhere: the paths of data and checkpoints are absolute."""
    fields = ["base", "donor", *(f"calibration.{s}.data" for s in ("reasoning", "agent", "format")),
              *(f"evaluate.{s}" for s in ("reasoning", "agent"))]  # fmt: skip
    data = recipe.model_dump(mode="json", exclude_unset=True)
    named = {path: value for path in fields if (value := _at(data, path))}
    paths = {f"{p}.path" if isinstance(v, dict) else p: v for p, v in named.items()}
    found = {p: recipe.locate(v["path"] if isinstance(v, dict) else v) for p, v in paths.items()}
    changes: dict[str, Any] = {path: str(place) for path, place in found.items() if place}
    changes["name"] = f"{recipe.name}-tuned"
    data = changed(recipe, changes, recipe.name).model_dump(mode="json", exclude_unset=True)
    run = {name: value for name, value in data.pop("run", {}).items() if name != "output"}
    if run.get("store"):
        run["store"] = str(recipe.place(run["store"]))
    text = yaml.safe_dump(data | ({"run": run} if run else {}), sort_keys=False)
    file = folder / BEST
    head = "# Found by `crane tune`; its held-out rows are those that the search never saw.\n"
    write_atomically(file, head + text)
    return file


def _at(data: dict[str, Any], path: str) -> Any:
    value: Any = data
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
