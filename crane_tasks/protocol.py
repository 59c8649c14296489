"""What a model's chat template says of its protocol: how it writes calls, which marks it sets.

Found by rendering a conversation and looking at what the template adds, so that no list of models
has to be kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from crane_tasks.calls import CHAT_MARKS, SYNTAXES, TAGS, THINKING, Syntax
from crane_tasks.models.files.tokenizer import added_ids
from crane_tasks.rendering import (
    NO_OPTIONS,
    OPENING,
    REFUSALS,
    Messages,
    forms,
    ids_of,
    mark,
    own_ends,
    writer,
)

# What the paper's script protects, in its order: the marks of a model that has them all as tokens.
QWEN_PATTERNS = (*TAGS, *CHAT_MARKS)
CALL_ID = "abcdefghi"  # nine characters, as Mistral's template demands
PROBE: dict[str, Any] = {"name": "zqxname", "arguments": {"zqxkey": "zqx value"}}


@lru_cache(maxsize=4)
def template_syntax(tokenizer: Any) -> Syntax | None:
    """The syntax in which the chat template shows a call; None if it shows none that is known."""
    answer = answered_call(tokenizer, PROBE)
    bare = answer.rpartition(THINKING[1])[2]  # some templates write an empty thinking block
    return next((s for s in SYNTAXES.values() if s.read(bare) == [PROBE]), None)


def syntax_of_texts(texts: Iterable[str]) -> Syntax | None:
    """The syntax in which most of some answers hold calls; None if no answer holds any."""
    read = dict.fromkeys(SYNTAXES, 0)
    for text in texts:
        for name, syntax in SYNTAXES.items():
            read[name] += syntax.read(text) is not None
    best = max(read, key=read.__getitem__)
    return SYNTAXES[best] if read[best] else None


def format_marks(tokenizer: Any, syntax: Syntax | None) -> tuple[str, ...]:
    """The texts whose tokens hold a model's format, by its template and the syntax of its calls.

    Those of the paper where the model has them all as tokens. Else the added tokens that the
    template sets, and the syntax's own marks. Not those of thinking, which are to move, nor the
    token that begins every text: its activations are like no others, and hold no format.
    """
    vocabulary = tokenizer.get_vocab()
    if all(pattern in vocabulary for pattern in QWEN_PATTERNS) and (
        syntax is None or set(syntax.marks) <= {*QWEN_PATTERNS}
    ):
        return QWEN_PATTERNS
    added, found = added_ids(tokenizer), dict[str, None]()
    for text in probe_texts(tokenizer, PROBE):
        known = (i for i in ids_of(tokenizer, text) if i in added)
        found |= dict.fromkeys(tokenizer.convert_ids_to_tokens(list(known)))
    own = dict.fromkeys(syntax.marks if syntax is not None else ())
    other = {*THINKING, tokenizer.bos_token}
    return tuple(mark for mark in {**own, **found} if mark.strip() and mark not in other)


def answered_call(tokenizer: Any, call: Mapping[str, Any]) -> str:
    """What the template writes as the answer that is one call: no header, no end token.

    Empty if it shows no calls.
    """
    question: Messages = [{"role": "user", "content": mark(0)}]
    tools = [_offered(call)]
    for turns in forms([*question, _called(call)]):
        try:
            text = writer(tokenizer, False, NO_OPTIONS)(turns, tools)
            header = writer(tokenizer, True, NO_OPTIONS)(question, tools)
        except REFUSALS:
            continue
        # Thinking templates begin a block in the prompt that a bare answer does not have.
        stem = header.rstrip().removesuffix(OPENING).rstrip()
        answer = text.removeprefix(stem) if text.startswith(stem) else text.rpartition(mark(0))[2]
        if call["name"] in answer:
            ends = tokenizer.convert_ids_to_tokens(list(own_ends(tokenizer)))
            return _without_ends(answer, ends)
    return ""


def probe_texts(tokenizer: Any, call: Mapping[str, Any]) -> list[str]:
    """Conversations by the template: a plain one, and one with a call and its response."""
    plain: Messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    response = {"role": "tool", "content": "e", "name": call["name"], "tool_call_id": CALL_ID}
    texts = []
    for turns, tools in (
        (plain, None),
        (plain[1:], None),
        ([*plain[:2], _called(call), response, plain[2]], [_offered(call)]),
    ):
        for form in forms(turns):
            try:
                texts.append(writer(tokenizer, False, NO_OPTIONS)(form, tools))
            except REFUSALS:
                continue
            break
    return texts


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"type": "function", "id": CALL_ID, "function": dict(call)}
    return {"role": "assistant", "content": "", "tool_calls": [function]}


def _offered(call: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {k: {"type": "string"} for k in call["arguments"]},
    }
    function = {"name": call["name"], "description": "a function", "parameters": parameters}
    return {"type": "function", "function": function}


def _without_ends(text: str, ends: Sequence[str]) -> str:
    """A text up to the end token that closes it."""
    stripped = text.rstrip()
    return next((stripped.removesuffix(e) for e in ends if stripped.endswith(e)), text)
