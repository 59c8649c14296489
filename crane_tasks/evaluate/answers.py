"""Answers as they are graded: without their end, and behind their thinking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from crane_tasks.calls import HERMES, THINKING, Syntax
from crane_tasks.grades import Grade, grade_answer, grade_calls
from crane_tasks.rendering import CLOSING
from crane_tasks.sandbox import run_tests

# Metrics, report and every point of a sweep grade the same answers.
_run_once = lru_cache(maxsize=4096)(run_tests)


@dataclass(frozen=True)
class Asked:
    """What a held-out row says of a right answer, and how long its prompt is in tokens."""

    prompt: int
    answer: Mapping[str, Any] | None = None
    calls: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Answers:
    """A model's answers to the first held-out prompts of a set, and the targets there.

    Attributes:
        texts, targets: markers included, without the end-of-sequence token.
        lengths: of the answers, in tokens.
        asked: what the rows say.
        unended: the places of those that were cut for lack of room, or whose target was where
            the row says nothing: such an answer is none.
        syntax: in which calls are read.
    """

    texts: Sequence[str]
    targets: Sequence[str]
    lengths: Sequence[int]
    asked: Sequence[Asked]
    unended: frozenset[int] = frozenset()
    syntax: Syntax = HERMES

    def calls(self, place: int) -> Sequence[Mapping[str, Any]] | None:
        """The calls of an answer: none at all, or None where any is broken or it has thought."""
        text = self.texts[place]
        if (found := self.syntax.read(text)) is not None:
            return found
        return None if any(mark in text for mark in (*self.syntax.marks, *THINKING)) else []


def answer_text(tokenizer: Any, ids: Sequence[int], *, opened: bool = False) -> str:
    """The text of an answer without its end token, markers included.

    Args:
        opened: the prompt has begun a thinking block. Then the answer is what stands behind its
            end: the thinking is the template's protocol, not an addition to it.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    if not opened:
        return text
    thought, closing, answer = text.partition(CLOSING)
    return answer if closing else f"<think>{thought}"


def final_answer(text: str) -> str:
    """What stands behind the thinking: the text after the last `</think>`, stripped."""
    return text.rpartition(CLOSING)[2].strip()


def grade(name: str, answers: Answers, place: int) -> Grade:
    """Whether an answer to a row of a held-out set is right: as the row says it, or else that
    what follows the thinking is the target's, or that the calls are."""
    asked, text = answers.asked[place], answers.texts[place]
    if place in answers.unended:
        return Grade(False, "did not end")
    if name == "agent" and any(mark in text for mark in THINKING):
        return Grade(False, "has a thinking block")
    if asked.calls is not None and name == "agent":
        return grade_calls(answers.calls(place), asked.calls)
    if asked.answer is not None:
        return grade_answer(final_answer(text), asked.answer, _run_once)
    target = answers.targets[place]
    if name == "reasoning":
        right = final_answer(text) == final_answer(target)
        return Grade(right, "the target's answer" if right else "not the target's answer")
    read = answers.syntax.read
    right = (calls := read(text)) is not None and calls == read(target)
    return Grade(right, "the target's calls" if right else "not the target's calls")
