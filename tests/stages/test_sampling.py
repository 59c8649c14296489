"""Several drawn answers to each prompt: their mean is the row's, and the rows are the sample."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyPair
from tiny_merge import merged

from crane_tasks.calls import HERMES
from crane_tasks.evaluate.answers import Answers, Asked
from crane_tasks.evaluate.metrics import Measured, rows_of
from crane_tasks.evaluate.stage import answered_by_merge
from crane_tasks.evaluate.uncertainty import against, intervals_of, mean

Pairs = Callable[[str], TinyPair]
SAMPLING = "evaluate.sampling={temperature: 1.5, samples: 3, seed: 4}"


def test_pass_at_1_is_the_mean_over_a_rows_answers(pairs: Pairs) -> None:
    recipe = pairs("qwen3").recipe("evaluate.generate=2", SAMPLING, "evaluate.agent=null")
    texts, asked = ["4", "5", "4", "6", "7", "8"], [Asked(9, {"number": 4})] * 6
    answers = Answers(texts, [""] * 6, [2, 4, 6, 1, 1, 1], asked, frozenset(), HERMES)
    rows = rows_of(Measured({"reasoning": [1.0, 3.0]}, {"reasoning": answers}, 0.0, 3), recipe)
    assert rows["right_answers"] == [pytest.approx(2 / 3), 0.0]
    assert rows["answer_tokens"] == [4.0, 1.0] and rows["reasoning_loss"] == [1.0, 3.0]
    assert mean(rows["right_answers"]) == pytest.approx(1 / 3)
    low, high = intervals_of(rows)["right_answers"]
    assert low == 0.0 and high == pytest.approx(2 / 3)
    assert "p" not in against(rows, rows)["right_answers"], "a row is no longer right or wrong"


def test_every_prompt_is_answered_so_often_and_the_same_each_time(
    pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3")
    given = ("evaluate.generate=2", "evaluate.max_new_tokens=6", SAMPLING)
    first = merged(pair, tmp_path / "one", tmp_path / "out", *given)
    rows = answered_by_merge(first.ctx, first.keys)
    assert [(row.set, row.sample) for row in rows] == [
        (name, sample) for name in ("reasoning", "agent") for _ in range(2) for sample in range(3)
    ]
    assert len({row.place for row in rows}) == 4
    again = merged(pair, tmp_path / "two", tmp_path / "out2", *given)
    assert answered_by_merge(again.ctx, again.keys) == rows
    other = merged(pair, tmp_path / "two", tmp_path / "out2", *given[:2])
    assert answered_by_merge(other.ctx, other.keys) != rows, "greedy answers are others"
    losses = [r.evaluation["models"]["merged"]["reasoning_loss"] for r in (first, other)]
    assert losses[0] == losses[1]
