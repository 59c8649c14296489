"""The metrics, a row each: table, report, sweep, choice, picture, README and key read this."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.answers import Answers, grade
from crane_tasks.recipe import Recipe
from crane_tasks.rendering import CLOSING

NATS, SHARE, TOKENS = "nats", "share", "tokens"
LOWER, HIGHER = "lower", "higher"
OUTPUT_COST = 5  # of a token that is decoded, in tokens of a prompt
FORMATS: dict[str, Callable[[float], str]] = {
    NATS: "{:.4f}".format,
    SHARE: "{:.1%}".format,
    TOKENS: "{:.1f}".format,
}


@dataclass(frozen=True)
class Measured:
    """What is known of a model when its metrics are computed.

    Attributes:
        losses: by held-out set each row's mean token loss, in nats.
        answers: by held-out set; empty if none were generated.
        divergence: mean KL(base ‖ model), in nats, of the next token where the agent targets
            have format tokens; NaN if they have none.
        samples: how many answers in a row are to one prompt.
    """

    losses: Mapping[str, Sequence[float]]
    answers: Mapping[str, Answers]
    divergence: float
    samples: int = 1


@dataclass(frozen=True)
class Metric:
    """One number that is said of every model.

    Attributes:
        title: in tables.
        unit: nats, share or tokens.
        better: lower or higher; empty where neither is.
        needs: the held-out set, and "answers" if it takes generated ones.
        each: a number per row (per answer, if it takes those) of which it is the mean, a truth
            value where it is a share; of no rows there is no such metric.
        meaning: a sentence for the README.
        guard: its turn among those that a sweep's front trades against the first metric;
            0 for none.
        version: raised when `each` gives other numbers; it is in the key of comparisons.
        sampled: whether the rows are a sample, from which the mean has an interval.
    """

    name: str
    title: str
    unit: str
    better: str
    needs: tuple[str, ...]
    each: Callable[[Measured], Sequence[float]]
    meaning: str
    guard: int = 0
    version: int = 1
    sampled: bool = True

    def shown(self, value: float | None) -> str:
        """For a person: a dash for what was not measured."""
        return "–" if value is None or value != value else FORMATS[self.unit](value)

    def between(self, low: float, high: float) -> str:
        """An interval, for a person, beside a value that has the unit."""
        if self.unit == SHARE:
            return f"{100 * low:.0f}–{100 * high:.0f}"
        return f"{FORMATS[self.unit](low)}–{FORMATS[self.unit](high)}"

    def changed(self, difference: float) -> str:
        """A difference, for a person."""
        return f"{'−' if difference < 0 else '+'}{FORMATS[self.unit](abs(difference))}"

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.better == HIGHER else -1

    def measured_by(self, recipe: Recipe) -> bool:
        """Whether the recipe's `evaluate` section has it measured."""
        settings = recipe.evaluate
        sets = {name: getattr(settings, name) is not None for name in ("reasoning", "agent")}
        has = sets | {"answers": settings.generate > 0 and any(sets.values())}
        return all(has[need] for need in self.needs)


def _graded(name: str, answers: Answers, places: Sequence[int]) -> list[float]:
    return [float(grade(name, answers, place).right) for place in places]


def _with_calls(answers: Answers) -> list[int]:
    """The places of the agent rows that are about calls."""
    return [n for n, asked in enumerate(answers.asked) if asked.answer is None or asked.calls]


def _well_formed(m: Measured) -> list[float]:
    answers = m.answers["agent"]

    def sound(place: int) -> bool:
        if answers.asked[place].calls == []:  # where no call is right, none is as sound
            return answers.calls(place) is not None
        return answers.syntax.read(answers.texts[place]) is not None

    return [float(n not in answers.unended and sound(n)) for n in _with_calls(answers)]


def _exact(m: Measured) -> list[float]:
    answers = m.answers["agent"]
    return _graded("agent", answers, _with_calls(answers))


def _format_right(m: Measured) -> list[float]:
    answers = m.answers["agent"]
    calls = set(_with_calls(answers))
    return _graded("agent", answers, [n for n in range(len(answers.asked)) if n not in calls])


def _right(m: Measured) -> list[float]:
    answers = m.answers["reasoning"]
    return _graded("reasoning", answers, range(len(answers.asked)))


def _ended(m: Measured) -> list[float]:
    answers = m.answers["reasoning"]
    return [float(n not in answers.unended) for n in range(len(answers.texts))]


def _cost(m: Measured) -> list[float]:
    """Each row is one turn: of its prompt nothing is cached."""
    return [
        float(asked.prompt + OUTPUT_COST * length)
        for answers in m.answers.values()
        for asked, length in zip(answers.asked, answers.lengths, strict=True)
    ]


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
        guard=1, version=3,
    ),
    Metric(
        "exact_tool_calls", "exact calls", SHARE, HIGHER, ("agent", "answers"),
        _exact,
        "answers that ended and whose calls are those that the row allows, or else the target's",
        version=3,
    ),
    Metric(
        "format_answers", "format right", SHARE, HIGHER, ("agent", "answers"),
        _format_right,
        "answers to agent rows without calls that are what the row's `answer` says",
    ),
    Metric(
        "right_answers", "right answers", SHARE, HIGHER, ("reasoning", "answers"),
        _right,
        "answers that ended and are right by the row's `answer`, or else equal the target's behind "
        "`</think>`",
        version=3,
    ),
    Metric(
        "answer_tokens", "answer tokens", TOKENS, "", ("reasoning", "answers"),
        lambda m: [float(length) for length in m.answers["reasoning"].lengths],
        "mean length of the answers to reasoning prompts",
    ),
    Metric(
        "thinking", "with thinking", SHARE, "", ("reasoning", "answers"),
        lambda m: [float(CLOSING in text) for text in m.answers["reasoning"].texts],
        "answers to reasoning prompts that end a thinking block",
    ),
    Metric(
        "ended", "ended", SHARE, HIGHER, ("reasoning", "answers"),
        _ended,
        "answers to reasoning prompts that came to their end within `evaluate.max_new_tokens`",
    ),
    Metric(
        "cost", "cost", TOKENS, "", ("answers",),
        _cost,
        "the paper's TTC of a held-out row: prompt tokens, and five times the answer's",
    ),
    Metric(
        "format_divergence", "format KL", NATS, LOWER, ("agent",),
        lambda m: [] if m.divergence != m.divergence else [m.divergence],
        "divergence from the base where it must emit a format token",
        guard=3, sampled=False,
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


def rows_of(measured: Measured, recipe: Recipe) -> dict[str, Sequence[float]]:
    """All that can be said of one model, by metric a number per row: where a prompt has several
    answers their mean, so that shares are pass@1."""
    values = {}
    for metric in measured_metrics(recipe):
        each, count = metric.each(measured), measured.samples
        if "answers" in metric.needs:
            starts = range(0, len(each), count)
            each = [sum(each[first : first + count]) / count for first in starts]
        values[metric.name] = each
    return {name: each for name, each in values.items() if len(each)}


def metric_named(name: str, what: str) -> Metric:
    """The metric of a name.

    Raises:
        RecipeError: there is none; the message begins with `what`.
    """
    if name not in BY_NAME:
        raise RecipeError(f"{what}: there is no metric '{name}'; there are {', '.join(BY_NAME)}")
    return BY_NAME[name]
