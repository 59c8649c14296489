"""What a model's answers are worth: tool calls and final answers against their targets."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


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


def tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls of a well-formed answer, in order; None if there is none or any is broken.

    Well-formed: every tag is paired and holds one JSON object with a name and an object of
    arguments. Text may stand before a call, a thinking block may not: the base's protocol
    has none, and a client of an Instruct model does not strip it.
    """
    blocks = CALL.findall(text)
    tags = {text.count("<tool_call>"), text.count("</tool_call>")}
    if not blocks or tags != {len(blocks)} or "<think>" in text or "</think>" in text:
        return None
    calls = []
    for block in blocks:
        try:
            call = json.loads(block)
        except ValueError:
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        if not isinstance(call.get("arguments"), dict):
            return None
        calls.append({"name": call["name"], "arguments": call["arguments"]})
    return calls
