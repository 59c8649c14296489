"""The syntaxes in which models write tool calls, and how each is read.

A syntax reads an answer without its end token, with all its markers. What its model's chat
template shows of a call it reads back exactly; which syntax that is, `protocol.py` finds.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Call = dict[str, Any]  # {"name": str, "arguments": {...}}
THINKING = ("<think>", "</think>")
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Syntax:
    """One way to write calls.

    Attributes:
        models: whose it is, for people.
        marks: its literal markers; where they are in an answer, the format is at stake.
        calls: the calls of a well-formed answer in their order, None of a broken one.
    """

    name: str
    models: str
    marks: tuple[str, ...]
    calls: Callable[[str], list[Call] | None]

    def read(self, text: str) -> list[Call] | None:
        """The calls of a well-formed answer, in order; None if there is none or any is broken.

        Text may stand before a call, a thinking block may not: the base's protocol has none,
        and a client of an Instruct model does not strip it.
        """
        if any(mark in text for mark in THINKING):
            return None
        return self.calls(text) or None


def _json(text: str) -> Any:
    """What a JSON text says; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(name: Any, arguments: Any) -> Call | None:
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return {"name": name, "arguments": arguments}


def _all(calls: Sequence[Call | None]) -> list[Call] | None:
    """The calls, if none of them is broken."""
    whole = [call for call in calls if call is not None]
    return whole if len(whole) == len(calls) else None


def _blocks(text: str, opening: str, closing: str) -> list[str]:
    """What stands between paired marks; nothing if any mark has no partner."""
    found = re.findall(f"{re.escape(opening)}(.*?){re.escape(closing)}", text, re.DOTALL)
    paired = {text.count(opening), text.count(closing)} == {len(found)}
    return found if paired else []


def _tagged(read: Callable[[str], Call | None]) -> Callable[[str], list[Call] | None]:
    return lambda text: _all([read(b) for b in _blocks(text, "<tool_call>", "</tool_call>")])


def _hermes(block: str) -> Call | None:
    said = _json(block)
    return _call(said.get("name"), said.get("arguments")) if isinstance(said, dict) else None


def _xml(block: str) -> Call | None:
    function = re.fullmatch(r"\s*<function=([^>\s]+)>(.*)</function>\s*", block, re.DOTALL)
    if function is None:
        return None
    parameter = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
    rest = parameter.sub("", function[2])
    return None if rest.strip() else _call(function[1], dict(parameter.findall(function[2])))


def _glm(block: str) -> Call | None:
    pair = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
    name, _, rest = block.strip().partition("<arg_key>")
    rest = "<arg_key>" + rest if _ else ""
    if re.sub(pair, "", rest, flags=re.DOTALL).strip() or len(name.split()) != 1:
        return None
    return _call(name.strip(), dict(re.findall(pair, rest, re.DOTALL)))


def _llama(text: str) -> list[Call] | None:
    """The whole answer is JSON objects, `;` between them."""
    rest, calls = text.replace("<|python_tag|>", "", 1).strip(), list[Call | None]()
    while rest:
        try:
            said, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            return None
        named = isinstance(said, dict)
        calls.append(_call(said.get("name"), said.get("parameters")) if named else None)
        rest = rest[end:].lstrip("; \n")
    return _all(calls)


def _mistral(text: str) -> list[Call] | None:
    """`[TOOL_CALLS] [{...}, ...]`, or since 2025 `[TOOL_CALLS]name[ARGS]{...}` each."""
    _, *parts = text.split("[TOOL_CALLS]")
    if len(parts) == 1 and parts[0].lstrip().startswith("["):
        said = _json(parts[0])
        listed = said if isinstance(said, list) and all(isinstance(s, dict) for s in said) else []
        return _all([_call(one.get("name"), one.get("arguments")) for one in listed])
    split = [re.sub(r"\[CALL_ID\]\w*", "", part).partition("[ARGS]") for part in parts]
    return _all([_call(name.strip(), _json(arguments)) for name, _, arguments in split])


def _harmony(text: str) -> list[Call] | None:
    """Each call is a message to a function; its end token may have been cut off."""
    message = r"to=functions\.([\w.-]+)(?:(?!<\|message\|>).)*<\|message\|>(.*?)(?:<\|call\|>|$)"
    found = re.findall(message, text, re.DOTALL)
    if len(found) != text.count("to=functions."):
        return None
    return _all([_call(name, _json(arguments)) for name, arguments in found])


def _deepseek(text: str) -> list[Call] | None:
    """V3 names the kind first and fences the arguments; V3.1 does neither."""
    marks = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
    if text.count("<｜tool▁calls▁begin｜>") != text.count("<｜tool▁calls▁end｜>"):
        return None
    calls: list[Call | None] = []
    for block in _blocks(text, *marks):
        head, _, body = block.partition("<｜tool▁sep｜>")
        fenced = re.fullmatch(r"([^\n]+)\n```json\n(.*)\n```", body.strip(), re.DOTALL)
        name, arguments = (fenced[1], fenced[2]) if fenced else (head, body)
        calls.append(_call(name.strip(), _json(arguments)))
    return _all(calls)


TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SYNTAXES: dict[str, Syntax] = {
    syntax.name: syntax
    for syntax in (
        Syntax("hermes", "Qwen2.5, Qwen3, Hermes", TAGS, _tagged(_hermes)),
        Syntax(
            "qwen3_coder", "Qwen3-Coder",
            (*TAGS, "<function=", "</function>", "<parameter=", "</parameter>"), _tagged(_xml),
        ),
        Syntax(
            "glm4", "GLM-4.5, GLM-4.6",
            (*TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), _tagged(_glm),
        ),
        Syntax("mistral", "Mistral", ("[TOOL_CALLS]", "[ARGS]"), _mistral),
        Syntax(
            "harmony", "gpt-oss",
            ("<|channel|>", "<|message|>", "<|call|>", "to=functions."), _harmony,
        ),
        Syntax(
            "deepseek", "DeepSeek V3, V3.1",
            ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
             "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"), _deepseek,
        ),
        # Last: an answer that is nothing but JSON.
        Syntax("llama3", "Llama 3.1 to 3.3", ("<|python_tag|>", '{"name": "', '"parameters": {'),
               _llama),
    )
}  # fmt: skip
HERMES = SYNTAXES["hermes"]
