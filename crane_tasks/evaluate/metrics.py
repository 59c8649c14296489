"""The metrics, a row each: table, report, sweep, choice, picture, README and key read this."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crane_tasks.calls import HERMES, Syntax
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.answers import final_answer, share
from crane_tasks.recipe import Recipe

NATS, SHARE, TOKENS = "nats", "share", "tokens"
LOWER, HIGHER = "lower", "higher"
FORMATS: dict[str, Callable[[float], str]] = {
    NATS: "{:.4f}".format,
    SHARE: "{:.1%}".format,
    TOKENS: "{:.1f}".format,
}


@dataclass(frozen=True)
class Answers:
    """A model's answers to the first held-out prompts of a set, and the targets there.

    Attributes:
        texts, targets: markers included, without the end-of-sequence token.
        lengths: of the answers, in tokens.
        unended: the places of those that were cut for lack of room, or whose target was: such
            an answer is none.
        syntax: in which calls are read.
    """

    texts: Sequence[str]
    targets: Sequence[str]
    lengths: Sequence[int]
    unended: frozenset[int] = frozenset()
    syntax: Syntax = HERMES

    def each(self, right: Callable[[str, str], bool]) -> list[bool]:
        """Which of the answers ended and are right beside their target."""
        pairs = enumerate(zip(self.texts, self.targets, strict=True))
        return [n not in self.unended and right(*pair) for n, pair in pairs]

    def share(self, right: Callable[[str, str], bool]) -> float:
        """The share of such answers."""
        return share(self.each(right))


@dataclass(frozen=True)
class Measured:
    """What is known of a model when its metrics are computed.

    Attributes:
        losses: mean item loss by held-out set, in nats.
        answers: by held-out set; empty if none were generated.
        divergence: mean KL(base ‖ model), in nats, of the next token where the agent targets
            have format tokens; NaN if they have none.
    """

    losses: Mapping[str, float]
    answers: Mapping[str, Answers]
    divergence: float


@dataclass(frozen=True)
class Metric:
    """One number that is said of every model.

    Attributes:
        title: in tables.
        unit: nats, share or tokens.
        better: lower or higher; empty where neither is.
        needs: the held-out set, and "answers" if it takes generated ones.
        compute: from what was measured; NaN is not shown.
        meaning: a sentence for the README.
        guard: its turn among those that a sweep's front trades against the first metric;
            0 for none.
        version: raised when `compute` gives other numbers; it is in the key of comparisons.
    """

    name: str
    title: str
    unit: str
    better: str
    needs: tuple[str, ...]
    compute: Callable[[Measured], float]
    meaning: str
    guard: int = 0
    version: int = 1

    def shown(self, value: float | None) -> str:
        """For a person: a dash for what was not measured."""
        return "–" if value is None or value != value else FORMATS[self.unit](value)

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.better == HIGHER else -1

    def measured_by(self, recipe: Recipe) -> bool:
        """Whether the recipe's `evaluate` section has it measured."""
        settings = recipe.evaluate
        has = {
            "reasoning": settings.reasoning is not None,
            "agent": settings.agent is not None,
            "answers": settings.generate > 0,
        }
        return all(has[need] for need in self.needs)


def _well_formed(m: Measured) -> float:
    answers = m.answers["agent"]
    return answers.share(lambda text, target: answers.syntax.read(text) is not None)


def _each_exact(answers: Answers) -> list[bool]:
    read = answers.syntax.read
    return answers.each(
        lambda text, target: (calls := read(text)) is not None and calls == read(target)
    )


def _each_right(answers: Answers) -> list[bool]:
    return answers.each(lambda text, target: final_answer(text) == final_answer(target))


# What makes an answer right, by held-out set.
RIGHT: Mapping[str, Callable[[Answers], list[bool]]] = {
    "reasoning": _each_right,
    "agent": _each_exact,
}


def _length(m: Measured) -> float:
    lengths = m.answers["reasoning"].lengths
    return sum(lengths) / max(1, len(lengths))


# The first is what a sweep's best point has the least of.
METRICS: tuple[Metric, ...] = (
    Metric(
        "reasoning_loss", "reasoning loss", NATS, LOWER, ("reasoning",),
        lambda m: m.losses["reasoning"],
        "mean over the held-out reasoning rows of the row's mean token loss",
    ),
    Metric(
        "agent_loss", "agent loss", NATS, LOWER, ("agent",),
        lambda m: m.losses["agent"],
        "the same over the held-out agent rows",
        guard=2,
    ),
    Metric(
        "tool_calls", "tool calls", SHARE, HIGHER, ("agent", "answers"),
        _well_formed,
        "answers that ended and whose calls are all well-formed, with no thinking block",
        guard=1, version=2,
    ),
    Metric(
        "exact_tool_calls", "exact calls", SHARE, HIGHER, ("agent", "answers"),
        lambda m: share(_each_exact(m.answers["agent"])),
        "answers that ended and whose calls are the target's",
        version=2,
    ),
    Metric(
        "right_answers", "right answers", SHARE, HIGHER, ("reasoning", "answers"),
        lambda m: share(_each_right(m.answers["reasoning"])),
        "answers that ended and in which what follows `</think>` equals the target's",
        version=2,
    ),
    Metric(
        "answer_tokens", "answer tokens", TOKENS, "", ("reasoning", "answers"),
        _length,
        "mean length of the answers to reasoning prompts",
    ),
    Metric(
        "format_divergence", "format KL", NATS, LOWER, ("agent",),
        lambda m: m.divergence,
        "divergence from the base where it must emit a format token",
        guard=3,
    ),
)  # fmt: skip
BY_NAME = {metric.name: metric for metric in METRICS}
OBJECTIVE = METRICS[0]
GUARDS = sorted((m for m in METRICS if m.guard), key=lambda m: m.guard)


def table_identity() -> list[Any]:
    """What comparisons digest of this table."""
    return [[m.name, m.version] for m in METRICS]


def measured_metrics(recipe: Recipe) -> list[Metric]:
    """Those that a recipe has measured."""
    return [m for m in METRICS if m.measured_by(recipe)]


def metrics_of(measured: Measured, recipe: Recipe) -> dict[str, float]:
    """All that can be said of one model, by name."""
    values = {m.name: m.compute(measured) for m in measured_metrics(recipe)}
    return {name: value for name, value in values.items() if value == value}


def metric_named(name: str, what: str) -> Metric:
    """The metric of a name.

    Raises:
        RecipeError: there is none; the message begins with `what`.
    """
    if name not in BY_NAME:
        raise RecipeError(f"{what}: there is no metric '{name}'; there are {', '.join(BY_NAME)}")
    return BY_NAME[name]
