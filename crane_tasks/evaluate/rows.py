"""What each model answered to each held-out row, as it was graded."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

from crane_tasks.calibration.sets import TokenSet, read_set
from crane_tasks.calls import HERMES
from crane_tasks.ends import ends_of, without_end
from crane_tasks.evaluate.answers import Answers, Asked, answer_text, grade
from crane_tasks.evaluate.measure import (
    heldout_sets,
    measure_ref,
    read_answers,
    repeated,
    samples_of,
)
from crane_tasks.evaluate.models import Model
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.rendering import opens_thinking
from crane_tasks.rows import load_rows
from crane_tasks.session import Context
from crane_tasks.stage import Keys


@dataclass(frozen=True)
class Answered:
    """One model's answer.

    Attributes:
        text: markers included, without the end-of-sequence token.
        tokens: its length.
        ended: whether it, and its target, came to an end by themselves.
        right: whether it counts as right (`answers.grade`).
        why: in a few words.
    """

    text: str
    tokens: int
    ended: bool
    right: bool
    why: str


@dataclass(frozen=True)
class Row:
    """A held-out row and its answers, by model.

    Attributes:
        set: "reasoning" or "agent".
        place: where the row came from.
        sample: which of the answers to its prompt this is.
    """

    set: str
    place: str
    sample: int
    prompt: str
    target: str
    answers: Mapping[str, Answered]

    def lost(self, model: str) -> int:
        """1 if the base is right here and the model is not, -1 the other way, 0 otherwise."""
        return int(self.answers["base"].right) - int(self.answers[model].right)

    def as_json(self) -> dict[str, Any]:
        """One line of `crane evaluate --rows`."""
        return asdict(self)


def answers_of(ctx: Context, name: str, answers: list[list[int]], wanted: TokenSet) -> Answers:
    """Decoded answers, token ids each, beside a held-out set's first targets and rows."""
    tokenizer, count = load_tokenizer(ctx.base), samples_of(ctx.recipe)
    ends = ends_of(ctx, tokenizer)
    plain = [without_end(ids, ends) for ids in answers]
    given = repeated(wanted.targets(), count)[: len(answers)]
    targets = [without_end(ids, ends) for ids in given]
    opened = repeated([opens_thinking(tokenizer, ids) for ids in wanted.prompts()], count)

    def texts(sides: list[list[int]]) -> list[str]:
        pairs = zip(sides, opened, strict=False)
        return [answer_text(tokenizer, ids, opened=within) for ids, within in pairs]

    asked = repeated(_asked(ctx, name, wanted), count)[: len(answers)]
    unended = frozenset(
        n
        for n, (ids, target, row) in enumerate(zip(answers, given, asked, strict=True))
        # A target tells what is right only where the row does not.
        if _unended(ids, ends) or (not _says(row) and _unended(target, ends))
    )
    lengths = [len(ids) for ids in plain]
    syntax = ctx.syntax() or HERMES  # stage `evaluate` has refused calls that cannot be read
    return Answers(texts(plain), texts(targets), lengths, asked, unended, syntax)


def _asked(ctx: Context, name: str, wanted: TokenSet) -> list[Asked]:
    """What the rows of a set say; they are those that it was made from, in their order."""
    data = getattr(ctx.recipe.evaluate, name)
    rows, prompts = load_rows(ctx.recipe, data).rows, wanted.prompts()
    pairs = zip(rows, prompts, strict=True)
    return [Asked(len(prompt), row.answer, row.calls) for row, prompt in pairs]


def _says(row: Asked) -> bool:
    return row.answer is not None or row.calls is not None


def _unended(ids: list[int], ends: set[int]) -> bool:
    return not ids or ids[-1] not in ends


def answered_rows(ctx: Context, keys: Keys, models: Mapping[str, Model]) -> Iterator[Row]:
    """The rows that were answered, set by set; none where the answers are not in the store."""
    refs = [measure_ref(ctx, keys, model) for model in models.values()]
    if not ctx.recipe.evaluate.generate or not all(ctx.store.has(ref) for ref in refs):
        return
    opened = dict(zip(models, map(ctx.store.open, refs), strict=True))
    tokenizer = load_tokenizer(ctx.base)
    for name, ref in heldout_sets(ctx, keys).items():
        wanted = read_set(ctx.store.open(ref))
        given = {m: answers_of(ctx, name, read_answers(a, name), wanted) for m, a in opened.items()}
        grades = {
            model: [grade(name, answers, n) for n in range(len(answers.texts))]
            for model, answers in given.items()
        }
        targets = next(iter(given.values())).targets
        count = samples_of(ctx.recipe)
        prompts = repeated(wanted.prompts(), count)[: len(targets)]
        for n, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            answers = {
                model: Answered(
                    a.texts[n], a.lengths[n], n not in a.unended, *astuple(grades[model][n])
                )
                for model, a in given.items()
            }
            text = tokenizer.decode(prompt, skip_special_tokens=False)
            yield Row(name, wanted.places[n // count], n % count, text, target, answers)
