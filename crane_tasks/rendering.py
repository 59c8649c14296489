"""Conversations as text, by the base's chat template, and as tokens.

Templates differ in the form in which they show a call, and some show none, or no tools: what they
lose is found by rendering the conversation a second time with a mark in each of its parts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from crane_tasks.calls import THINKING
from crane_tasks.errors import DataError
from crane_tasks.models.files.tokenizer import added_ids
from crane_tasks.rows import Row

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
# A template is a program of others.
REFUSALS = (
    TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip
OPENING, CLOSING = THINKING
TAIL = 16  # of a prompt's tokens: enough to see a `<think>` that is no token of its own
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and what of it the template shows nowhere: "the tool 'f'"."""

    text: str
    lost: list[str]


def rendered(
    tokenizer: Any, row: Row, *, prompt: bool, options: Mapping[str, Any] = NO_OPTIONS
) -> Rendered:
    """The conversation by the chat template; `prompt` adds the assistant header.

    A call is given in the form in which the template shows all of it: Qwen's and Llama's want
    arguments as objects, DeepSeek's as text.

    Args:
        options: what the recipe hands to the template; the row's own come first.

    Raises:
        DataError: the template refuses the conversation, in every form.
    """
    if prompt and row.messages[-1]["role"] == "assistant":
        raise DataError(
            f"{row.place}: ends with the assistant's turn; put that text into `completion`"
        )
    best, refusal = None, None
    for messages in forms(row.messages):
        write = writer(tokenizer, prompt, {**options, **row.options})
        try:
            text = write(messages, row.tools)
        except REFUSALS as error:
            refusal = refusal or error
            continue
        found = Rendered(text, _lost(write, messages, row.tools))
        if best is None or len(found.lost) < len(best.lost):
            best = found
        if not best.lost:
            break
    if best is None:
        raise DataError(f"{row.place}: the chat template refuses it: {refusal}") from refusal
    return best


def render(
    tokenizer: Any, row: Row, *, prompt: bool, options: Mapping[str, Any] = NO_OPTIONS
) -> str:
    """The text of `rendered`."""
    return rendered(tokenizer, row, prompt=prompt, options=options).text


def prompt_ids(tokenizer: Any, row: Row, options: Mapping[str, Any] = NO_OPTIONS) -> list[int]:
    """The token ids of a row up to and with the assistant's header.

    Raises:
        DataError: as `rendered`.
    """
    return ids_of(tokenizer, render(tokenizer, row, prompt=True, options=options))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that has all its markers."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def completion_ids(tokenizer: Any, completion: str, *, opened: bool = False) -> list[int]:
    """The token ids of a target that the data gives: all of its text, and its end.

    A completion that has an end token at its end keeps that alone.

    Args:
        opened: the prompt has begun a thinking block, which the text need not begin again.
    """
    if opened and completion.lstrip().startswith(OPENING):
        completion = completion.lstrip().removeprefix(OPENING).lstrip("\n")
    ids = ids_of(tokenizer, completion)
    ended = bool(ids) and ids[-1] in own_ends(tokenizer) | {call_end(tokenizer)}
    return ids if ended else [*ids, turn_end(tokenizer)]


def opens_thinking(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends at the start of a thinking block, as those of Thinking templates do."""
    text: str = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
    return text.rstrip().endswith(OPENING)


@lru_cache(maxsize=4)
def turn_end(tokenizer: Any) -> Any:
    """The id of the token with which the template ends an assistant's turn, or else EOS, or None.

    EOS need not be it: tokenizers name `<eos>` or `<|endoftext|>` where the template writes
    `<end_of_turn>` or `<|im_end|>`.
    """
    ids = ids_of(tokenizer, _behind_mark(tokenizer, {"content": mark(0)}).lstrip())
    return ids[0] if ids and ids[0] in added_ids(tokenizer) else tokenizer.eos_token_id


def own_ends(tokenizer: Any) -> set[int]:
    """EOS, and what the chat template ends an assistant's turn with."""
    return {tokenizer.eos_token_id, turn_end(tokenizer)} - {None}


@lru_cache(maxsize=4)
def call_end(tokenizer: Any) -> int | None:
    """The id of the last added token behind a call: what may end an answer that is one, or None.

    gpt-oss ends a call with `<|call|>`. Nothing to stop at: templates write `<|end|>` there,
    too, which also stands between thinking and answer.
    """
    function = {"name": "f", "arguments": {"x": mark(0)}}
    call = {"content": "", "tool_calls": [{"type": "function", "function": function}]}
    added = added_ids(tokenizer)
    ends = [i for i in ids_of(tokenizer, _behind_mark(tokenizer, call)) if i in added]
    return ends[-1] if ends else None


def _behind_mark(tokenizer: Any, turn: Mapping[str, Any]) -> str:
    """What the template writes behind the mark in an assistant's turn; empty if it shows none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", **turn}]
    try:
        text: str = writer(tokenizer, False, NO_OPTIONS)(turns, None)
    except REFUSALS:
        return ""
    return text.rpartition(mark(0))[2] if mark(0) in text else ""


def writer(tokenizer: Any, prompt: bool, options: Mapping[str, Any]) -> Any:
    """The chat template as a function of messages and tools."""

    def write(messages: Messages, tools: Sequence[Any] | None) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **options
        )
        return text

    return write


def forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[Messages]:
    """The forms in which the calls of a conversation can be given; one if there are none."""
    plain = [dict(message) for message in messages]
    yield plain
    if any("tool_calls" in message for message in plain):
        yield [_with_calls(message, _as_text) for message in plain]


def _with_calls(message: dict[str, Any], change: Any) -> dict[str, Any]:
    """A message with the function of each of its calls changed."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        wrapped = "function" in call
        function = change(call["function"] if wrapped else call)
        calls.append(call | {"function": function} if wrapped else function)
    return message | {"tool_calls": calls}


def _as_text(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def mark(number: int) -> str:
    """A word that no conversation has, and that no template escapes or trims."""
    return f"zqx{number}kept{number}xqz"


class _Marks:
    """Marks that were set into a conversation, and what each stands in."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def new(self, place: str) -> str:
        """A mark for a part."""
        self.places.append(place)
        return mark(len(self.places))

    def missing(self, text: str) -> list[str]:
        """The parts whose mark a text lacks."""
        numbered = enumerate(self.places, start=1)
        return list(dict.fromkeys(p for n, p in numbered if mark(n) not in text))


def _lost(write: Any, messages: Messages, tools: Sequence[Any] | None) -> list[str]:
    """What of turns, tools and calls the template shows nowhere.

    Earlier thinking, which templates strip on purpose, is none of it: a mark stands behind it.
    """
    marks = _Marks()
    turns = [_marked(m, n, marks) for n, m in enumerate(messages, start=1)]
    last = turns[-1]
    if last["role"] == "assistant" and last.get("reasoning_content"):
        mark = marks.new("the reasoning of the last turn")
        turns[-1] = last | {"reasoning_content": last["reasoning_content"] + mark}
    offered = [_marked_tool(tool, marks) for tool in tools] if tools else None
    try:
        return marks.missing(write(turns, offered))
    except REFUSALS:  # it wants to know the names: it showed the true ones, or refused them
        return []


def _marked(message: dict[str, Any], number: int, marks: _Marks) -> dict[str, Any]:
    def function(call: Mapping[str, Any]) -> dict[str, Any]:
        place = f"the call of {call['name']!r} in turn {number}"
        name, argument, given = call["name"] + marks.new(place), marks.new(place), call["arguments"]
        if isinstance(given, str):
            return {**call, "name": name, "arguments": f"{given[:-1]}{argument}{given[-1:]}"}
        return {**call, "name": name, "arguments": {**given, argument: ""}}

    if message["content"] and message["content"].strip():
        mark = marks.new(f"turn {number} ({message['role']})")
        message = message | {"content": message["content"] + mark}
    return _with_calls(message, function)


def _marked_tool(tool: Mapping[str, Any], marks: _Marks) -> dict[str, Any]:
    function = tool.get("function", tool)
    name = str(function.get("name"))
    marked = {**function, "name": name + marks.new(f"the tool {name!r}")}
    return {**tool, "function": marked} if "function" in tool else marked
