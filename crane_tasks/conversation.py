"""A record as a conversation, whatever form it was written in.

Data sets write the same turn in several ways: tools, calls and arguments as objects or as JSON
text (OpenAI's wire format has `arguments` as text), content as text or as a list of parts, absent
fields as nulls. A chat template expects one of them and renders the others wrongly or as nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

from crane_tasks.errors import DataError

Message = dict[str, Any]


def messages_of(record: Mapping[str, Any], place: str) -> list[Message]:
    """The turns of a record: `content` is text, calls and their arguments are objects.

    Raises:
        DataError: no conversation, a part that is not text, or JSON text that is broken.
    """
    messages = _parsed(record.get("messages"), f"{place}: `messages`")
    if messages is None and record.get("prompt") is not None:
        messages = _turns(record, place)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: needs `messages`, a list of {{role, content}}, or a `prompt`")
    return [_message(message, place) for message in messages]


def tools_of(record: Mapping[str, Any], place: str) -> list[Any] | None:
    """The function schemas that a record offers, or None.

    Raises:
        DataError: they are no list of objects.
    """
    tools = _parsed(record.get("tools"), f"{place}: `tools`")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{place}: `tools` is a list of function schemas")
    tools = [_parsed(tool, f"{place}: `tools`") for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: every one of `tools` is an object")
    return tools


def template_options(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a record hands to the chat template besides the conversation.

    Raises:
        DataError: it is no object.
    """
    options = _parsed(record.get("chat_template_kwargs"), f"{place}: `chat_template_kwargs`")
    if not isinstance(options or {}, dict):
        raise DataError(f"{place}: `chat_template_kwargs` is an object")
    return dict(options or {})


def characters(value: Any) -> int:
    """How many characters of text a value holds, keys included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(characters(k) + characters(v) for k, v in value.items())
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 0


def _parsed(value: Any, what: str) -> Any:
    """A value, or what its JSON text says; empty text is nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is text, but not JSON: {error}") from error


def _turns(record: Mapping[str, Any], place: str) -> list[Message]:
    """The messages of a row that is a `prompt`, a user's turn, perhaps behind a `system` one."""
    turns: list[Message] = []
    for key, role in (("system", "system"), ("prompt", "user")):
        text = record.get(key)
        if text is None:
            continue
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: `{key}` is text, and not empty")
        turns.append({"role": role, "content": text})
    return turns


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{place}: every message needs a role")
    # Templates ask whether a field is there, not whether it is null.
    known = {k: v for k, v in message.items() if v is not None}
    calls = _parsed(known.pop("tool_calls", None), f"{place}: `tool_calls`")
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{place}: `tool_calls` is a list")
        known["tool_calls"] = [_call(call, place) for call in calls]
    elif "content" not in known and "reasoning_content" not in known:
        raise DataError(f"{place}: a message of the {known['role']} has no content and no calls")
    content = _text(known.get("content", ""), place)
    return {"role": known.pop("role"), "content": content} | {
        k: v for k, v in known.items() if k != "content"
    }


def _text(content: Any, place: str) -> str:
    """Content as text: text, or text parts one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place}: the content of a message is text, or a list of text parts")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, dict) and part.get("type", "text") == "text":
            text = part.get("text")
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(f"{place}: a part of the content of a message is not text: {kind!r}")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    call = _parsed(call, f"{place}: `tool_calls`")
    if not isinstance(call, dict):
        raise DataError(f"{place}: every one of `tool_calls` is an object")
    call = {k: v for k, v in call.items() if v is not None}
    wrapped = isinstance(call.get("function"), dict)
    function = {k: v for k, v in call["function"].items() if v is not None} if wrapped else call
    if not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a tool call has no name")
    arguments = _parsed(function.get("arguments"), f"{place}: the arguments of a tool call")
    if arguments is None:  # a call of a function that takes none
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: the arguments of a tool call are no object: {arguments!r:.80}")
    function = function | {"arguments": arguments}
    return call | {"function": function} if wrapped else function
