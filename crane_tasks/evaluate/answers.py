"""Answers as they are graded: without their end, and behind their thinking."""

from collections.abc import Iterable, Sequence
from typing import Any


def share(hits: Iterable[bool]) -> float:
    """The share that is true; 0 of nothing."""
    outcomes = list(hits)
    return sum(outcomes) / max(1, len(outcomes))


def answer_text(tokenizer: Any, ids: Sequence[int], *, opened: bool = False) -> str:
    """The text of an answer without its end token, markers included.

    Args:
        opened: the prompt has begun a thinking block. Then the answer is what stands behind its
            end: the thinking is the template's protocol, not an addition to it.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    if not opened:
        return text
    thought, closing, answer = text.partition("</think>")
    return answer if closing else f"<think>{thought}"


def final_answer(text: str) -> str:
    """What stands behind the thinking: the text after the last `</think>`, stripped."""
    return text.rpartition("</think>")[2].strip()
