"""What the report says of the targets."""

from collections.abc import Callable

import pytest
import torch
from conftest import TinyPair

from crane_tasks.calibration.sets import TokenSet
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.report.tables import NONE
from crane_tasks.report.targets import target_table, unended_note

Pairs = Callable[[str], TinyPair]


@pytest.mark.parametrize(("unended", "shown"), [([], "100.0%"), (["a 2"], "66.7%"), (None, NONE)])
def test_a_set_is_shown_by_its_targets_alone(
    unended: list[str] | None, shown: str, pairs: Pairs
) -> None:
    tokenizer = load_tokenizer(pairs("qwen3").base)
    texts = [("</think>prompt", "ab"), ("x", "<think>a</think>bc"), ("y", "<think>")]
    pieces = [tuple(tokenizer(t)["input_ids"] for t in text) for text in texts]
    tokens = TokenSet(
        [torch.tensor(prompt + target) for prompt, target in pieces],
        [len(target) for _, target in pieces],
        [],
        ["a 1", "a 2", "a 3"],
        unended,
    )
    head, rows = target_table({"reasoning": tokens}, tokenizer)
    cut = NONE if unended is None else str(len(unended))
    targets = sum(len(target) for _, target in pieces)
    whole = targets + sum(len(prompt) for prompt, _ in pieces)
    assert len(head) == len(rows[0]) == 9
    assert rows == [["reasoning", "3", str(whole), str(targets), "2.7", "5", "33.3%", shown, cut]]
    note = unended_note({"reasoning": tokens})
    assert note.endswith("reasoning: a 2.") if unended else note == ""


def test_many_places_are_the_first_and_how_many_more() -> None:
    places = [f"r.jsonl line {n}" for n in range(1, 12)]
    note = unended_note({"agent": TokenSet([], [], [], places, places)})
    assert note.endswith("agent: " + ", ".join(places[:8]) + " and 3 more.")
