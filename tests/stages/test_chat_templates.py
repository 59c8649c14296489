"""What chat templates do to rows: what they lose, where a turn ends, where thinking begins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, TinyPair
from tiny_merge import asked

from crane_tasks.calibration.sets import TokenSet, read_set
from crane_tasks.calibration.stages import AGENT, FORMAT
from crane_tasks.calls import HERMES
from crane_tasks.errors import DataError
from crane_tasks.evaluate.answers import answer_text, final_answer
from crane_tasks.method import keys_of
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.rendering import own_ends, turn_end
from crane_tasks.session import Context, open_context

USER = {"role": "user", "content": "Is it raining?"}
ANSWER = {"role": "assistant", "content": "No."}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [
    {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}]}  # fmt: skip
# Shows tools and calls, strips the thinking of earlier turns, and begins that of the next.
WHOLE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ text | trim }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", '
    '"arguments": ARGUMENTS}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '' if quick else '<think>\n' }}{% endif %}"
)
OBJECTS = WHOLE.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
TEXTS = WHOLE.replace("ARGUMENTS", "{{ c.function.arguments + '' }}")  # as DeepSeek's
IGNORES = TEMPLATE  # neither tools nor calls, as SmolLM2's


class Desk:
    """A pair whose base's template and data can be given."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair, self.folder = pair.copy(folder / "pair"), folder
        self.notices: list[str] = []

    def context(self, template: str, agent: dict[str, Any], *assignments: str) -> Context:
        """A context over a fresh store, with one agent row."""
        (self.pair.base / "chat_template.jinja").write_text(template)
        (self.pair.folder / "agent.jsonl").write_text(json.dumps(agent) + "\n")
        heard = self.notices.append
        session = asked(self.pair, self.folder / "store", *assignments, notice=heard)
        session.store.prepare()
        return open_context(session)

    def made(self, template: str, agent: dict[str, Any], *assignments: str) -> tuple[str, TokenSet]:
        """The text of the agent set's row, and the set."""
        ctx = self.context(template, agent, *assignments)
        keys = keys_of(ctx)
        AGENT.check(ctx, keys)
        AGENT.build(ctx, keys)
        found = read_set(ctx.store.open(keys[AGENT]))
        return load_tokenizer(ctx.base).decode(found.sequences[0]), found


@pytest.fixture
def desk(pairs: Callable[[str], TinyPair], tmp_path: Path) -> Desk:
    """A dense pair, copied."""
    return Desk(pairs("qwen3"), tmp_path)


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
def test_a_call_is_given_in_the_form_that_the_template_shows(template: str, desk: Desk) -> None:
    row = {"messages": [USER, CALL, {"role": "tool", "content": "yes"}], "tools": [TOOL],
           "completion": "a</think>No."}  # fmt: skip
    text, _ = desk.made(template, row)
    assert '<tool_call>{"name": "rain", "arguments": {"city": "Oslo"}}</tool_call>' in text
    assert desk.notices == []


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": [USER], "tools": [TOOL]}, "the tool 'rain'"),
        ({"messages": [USER, CALL, USER]}, "the call of 'rain' in turn 2"),
    ],
)
def test_what_a_template_loses_is_refused_by_the_row_or_noticed(
    row: dict[str, Any], lost: str, desk: Desk
) -> None:
    row = row | {"completion": "No."}
    with pytest.raises(DataError, match=rf"agent\.jsonl line 1: .*does not show {lost}"):
        desk.made(IGNORES, row)
    desk.made(IGNORES, row, "calibration.agent.on_lost=notice")
    assert len(desk.notices) == 1 and lost in desk.notices[0]


def test_thinking_that_the_template_strips_on_purpose_is_no_loss(desk: Desk) -> None:
    earlier = {"role": "assistant", "content": "<think>clouds</think>No."}
    text, _ = desk.made(OBJECTS, {"messages": [USER, earlier, USER], "completion": "a</think>b"})
    assert "clouds" not in text and "No." in text


def test_the_reasoning_of_the_last_turn_is_not_lost_in_silence(desk: Desk) -> None:
    row = {"messages": [USER, {**ANSWER, "reasoning_content": "clouds"}]}
    (desk.pair.folder / "format.jsonl").write_text(json.dumps(row) + "\n")
    ctx = desk.context(IGNORES, {"prompt": "hi"})
    with pytest.raises(DataError, match="the reasoning of the last turn"):
        FORMAT.check(ctx, keys_of(ctx))
    ctx = desk.context(OBJECTS, {"prompt": "hi"})
    FORMAT.check(ctx, keys_of(ctx))


def test_a_given_target_ends_as_the_template_ends_a_turn_and_only_once(desk: Desk) -> None:
    other = TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    ended = []
    given = [(TEMPLATE, "No."), (TEMPLATE, "No.<|im_end|>"), (other, "No."),
             (other, "No.<|endoftext|>"), (other, "No.<|im_end|>")]  # fmt: skip
    for template, completion in given:
        text, found = desk.made(template, {"messages": [USER], "completion": completion})
        ended.append(text[text.rindex("No.") :])
        assert found.target_lengths == [4]
    assert ended == ["No.<|im_end|>"] * 2 + ["No.<|endoftext|>"] * 2 + ["No.<|im_end|>"]


def test_a_turn_without_an_end_of_its_own_ends_with_eos(desk: Desk) -> None:
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    ctx = desk.context(bare, {"prompt": "hi"})
    tokenizer = load_tokenizer(ctx.base)
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    assert own_ends(tokenizer) == {tokenizer.eos_token_id}


def test_a_completion_goes_on_in_the_thinking_that_the_prompt_begins(desk: Desk) -> None:
    texts = {
        desk.made(OBJECTS, {"messages": [USER], "completion": given})[0]
        for given in ("clouds\n</think>\nNo.", "<think>\nclouds\n</think>\nNo.")
    }
    (text,) = texts
    assert text.endswith("assistant\n<think>\nclouds\n</think>\nNo.<|im_end|>")
    with pytest.raises(DataError, match=r"line 1: .*thinking block.*never ends it"):
        desk.made(OBJECTS, {"messages": [USER], "completion": "No."})


def test_what_recipe_and_row_give_the_template_reaches_it_the_rows_first(desk: Desk) -> None:
    row: dict[str, Any] = {"messages": [USER], "completion": "a</think>No."}
    setting = "calibration.agent.chat_template_kwargs={quick: true}"
    keys, texts = set(), []
    for options, settings in [(None, ()), (None, (setting,)), ({"quick": False}, (setting,)),
                              ({"quick": True}, ())]:  # fmt: skip
        own = row | ({"chat_template_kwargs": options} if options else {})
        texts.append(desk.made(OBJECTS, own, *settings)[0])
        keys.add(keys_of(desk.context(OBJECTS, own, *settings))[AGENT].key)
    assert ["<think>" in text for text in texts] == [True, False, True, False]
    assert len(keys) == 4


def test_an_answer_behind_the_thinking_that_a_prompt_begins_is_read_like_any_other(
    desk: Desk,
) -> None:
    tokenizer = load_tokenizer(desk.pair.base)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'

    def read(text: str, opened: bool) -> str:
        return answer_text(tokenizer, tokenizer(text)["input_ids"], opened=opened)

    assert HERMES.read(read(f"hm</think>\n{call}", True)) == [{"name": "f", "arguments": {}}]
    assert HERMES.read(read(f"hm</think>\n{call}", False)) is None
    assert HERMES.read(read(f"hm {call}", True)) is None  # a call within the thoughts is none
    assert final_answer(read("hm</think>\n4", True)) == "4"
    assert final_answer(read("hm, 4", True)) != final_answer(read("so</think>hm, 4", True))


def test_missing_patterns_are_refused_if_the_recipe_gives_them_else_noticed(desk: Desk) -> None:
    ctx = desk.context(TEMPLATE, {"prompt": "hi"})
    FORMAT.check(ctx, keys_of(ctx))
    (notice,) = desk.notices
    assert "<tool_response>, </tool_response>" in notice and "<tool_call>" not in notice
    ctx = desk.context(
        TEMPLATE, {"prompt": "hi"}, "calibration.format.patterns=['<tool_call>', '<nowhere>']"
    )
    with pytest.raises(DataError, match=r"no row holds the format patterns <nowhere> within"):
        FORMAT.check(ctx, keys_of(ctx))
