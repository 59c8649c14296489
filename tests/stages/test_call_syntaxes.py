"""Tool calls in the syntaxes of several models, and how a model's own is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, TinyPair, write_tokenizer
from tiny_merge import asked

from crane_tasks.calibration.format import format_rows
from crane_tasks.calls import SYNTAXES
from crane_tasks.errors import DataError, RecipeError
from crane_tasks.evaluate.answers import Answers, Asked
from crane_tasks.evaluate.metrics import METRICS, Measured
from crane_tasks.evaluate.uncertainty import mean
from crane_tasks.method import keys_of
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.protocol import QWEN_PATTERNS, format_marks, syntax_of_texts, template_syntax
from crane_tasks.rows import load_rows
from crane_tasks.session import Context, open_context
from flows.checks import check_all
from flows.plan import make_plan

OSLO = [{"name": "weather", "arguments": {"city": "Oslo"}}]
BOTH = [*OSLO, {"name": "time", "arguments": {"city": "Rome"}}]
# As the models write them: one call, two calls.
WRITTEN: dict[str, tuple[str, str]] = {
    "hermes": (
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {"city": "Rome"}}\n</tool_call>',
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
        "</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=time>\n<parameter=city>\nRome\n</parameter>\n"
        "</function>\n</tool_call>",
    ),
    "glm4": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>\n"
        "<tool_call>time\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]',
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]'
        '{"city": "Rome"}',
    ),
    "harmony": (
        "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
        "<|start|>assistant to=functions.time<|channel|>commentary json<|message|>"
        '{"city": "Rome"}',
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}'
        '<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{"city": "Rome"}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "llama3": (
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}',
        '{"name": "weather", "parameters": {"city": "Oslo"}}; '
        '{"name": "time", "parameters": {"city": "Rome"}}',
    ),
}


@pytest.mark.parametrize("name", SYNTAXES)
def test_every_syntax_reads_its_own_calls_and_no_other_reads_them(name: str) -> None:
    one, two = WRITTEN[name]
    assert SYNTAXES[name].read(one) == OSLO
    assert SYNTAXES[name].read(two) == BOTH
    assert {n for n, s in SYNTAXES.items() if s.read(one) or s.read(two)} == {name}
    assert syntax_of_texts(["no call", one, two]) == SYNTAXES[name]


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_broken_call_is_none(name: str) -> None:
    read = SYNTAXES[name].read
    one, two = WRITTEN[name]
    for text in (one.replace("weather", "", 1), f"<think>{one}", "no call", ""):
        assert read(text) is None, text
    assert read(two.rpartition("Rome")[0]) is None  # cut short
    assert read("<think>hm</think>" + one) is None


# Small templates with the traits of the models' own; `c` is a call's function.
ANSWER = {
    "hermes": '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n'
    "</tool_call>",
    "qwen3_coder": "<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "glm4": "<tool_call>{{ c.name }}\n{% for k, v in c.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}]',
    "harmony": " to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
    "{{ c.arguments | tojson }}<|call|>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "{{ c.name }}\n```json\n{{ c.arguments + '' }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama3": '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}',
}


def template(name: str, *, thinks: bool = False) -> str:
    """A chat template with a syntax; `thinks` begins the thinking in the prompt."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for t in m.tool_calls or [] %}{% set c = t.function %}" + ANSWER[name] + "{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        + ("<think>\n" if thinks else "")
        + "{% endif %}"
    )


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("name", SYNTAXES)
def test_the_chat_template_says_which_it_is(name: str, thinks: bool, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template(name, thinks=thinks))
    found = template_syntax(load_tokenizer(tmp_path))
    assert found is not None and found.name == name


def test_a_template_without_calls_says_nothing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert template_syntax(load_tokenizer(tmp_path)) is None


def test_the_marks_are_what_the_template_adds_but_those_of_thinking(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template("hermes", thinks=True))
    tokenizer = load_tokenizer(tmp_path)
    assert format_marks(tokenizer, SYNTAXES["hermes"]) == QWEN_PATTERNS
    glm = format_marks(tokenizer, SYNTAXES["glm4"])
    assert set(glm) >= {"<arg_key>", "</arg_value>", "<tool_call>", "<|im_start|>", "<|im_end|>"}
    assert not {"<think>", "</think>"} & {*glm}
    # Of a template with marks of its own.
    own = template("llama3").replace("<|im_start|>", "<|begin|>").replace("<|im_end|>", "<|stop|>")
    tokenizer.add_tokens(["<|begin|>", "<|stop|>", "<|unused|>"], special_tokens=True)
    tokenizer.chat_template = own
    assert set(format_marks(tokenizer, SYNTAXES["llama3"])) == {
        *SYNTAXES["llama3"].marks, "<|begin|>", "<|stop|>"
    }  # fmt: skip


Contexts = Callable[..., Context]


@pytest.fixture
def contexts(pairs: Callable[[str], TinyPair], tmp_path: Path) -> Contexts:
    """Contexts of a copy of the random pair under a template and a completion."""

    def make(chat: str, completion: str | None, *assignments: str) -> Context:
        pair = pairs("qwen3").copy(tmp_path / f"pair {len(list(tmp_path.iterdir()))}")
        (pair.base / "chat_template.jinja").write_text(chat)
        row: dict[str, Any] = {"messages": [{"role": "user", "content": "weather in Oslo?"}]}
        row |= {} if completion is None else {"completion": completion}
        for name in ("agent", "heldout_agent"):
            (pair.folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        return open_context(asked(pair, tmp_path / "store", "evaluate.generate=1", *assignments))

    return make


def test_what_the_rows_write_comes_before_the_template_and_a_name_before_both(
    contexts: Contexts,
) -> None:
    by_rows = contexts(template("hermes"), WRITTEN["glm4"][0], "evaluate.calls=auto")
    assert by_rows.syntax() == SYNTAXES["glm4"]
    assert "<arg_key>" in (by_rows.settled.calibration.format.patterns or ())
    plan = make_plan(by_rows.session)
    assert plan.calls == "glm4" and "<arg_key>" in plan.patterns


def test_where_nothing_says_it_the_measurement_is_refused(contexts: Contexts) -> None:
    ctx = contexts(TEMPLATE, "it rains", "evaluate.calls=auto")
    with pytest.raises(RecipeError, match=r"evaluate\.calls: neither .* hermes, qwen3_coder"):
        check_all(ctx, keys_of(ctx))


def test_a_name_settles_it(contexts: Contexts) -> None:
    ctx = contexts(TEMPLATE, "it rains", "evaluate.calls=llama3")
    check_all(ctx, keys_of(ctx))
    assert ctx.syntax() == SYNTAXES["llama3"]


def test_where_the_template_sets_no_marks_they_are_asked_for(contexts: Contexts) -> None:
    ctx = contexts(TEMPLATE, "it rains")
    section = ctx.recipe.calibration.format
    assert section.patterns is None
    rows = load_rows(ctx.recipe, section.data)
    with pytest.raises(DataError, match=r"calibration\.format\.patterns: .* sets no marks"):
        format_rows(load_tokenizer(ctx.base), section, rows)


def test_an_answer_that_was_cut_is_none() -> None:
    call = WRITTEN["hermes"][0]
    answers = Answers([call, call], [call, call], [9, 9], [Asked(3)] * 2, frozenset({1}))
    thought = ["<think>a</think> 4"] * 2, ["<think>b</think> 4"] * 2
    said = Answers(*thought, [9, 9], [Asked(3)] * 2, frozenset({0}))
    measured = Measured({}, {"agent": answers, "reasoning": said}, float("nan"))
    found = {
        m.name: mean(m.each(measured)) for m in METRICS if "answers" in m.needs and m.each(measured)
    }
    assert (found["tool_calls"], found["exact_tool_calls"], found["right_answers"]) == (0.5,) * 3


def test_another_syntax_is_another_key_and_hermes_is_the_old_one(contexts: Contexts) -> None:
    keys = {
        name: keys_of(contexts(TEMPLATE, "it rains", f"evaluate.calls={name}")).refs["evaluate"]
        for name in ("hermes", "llama3")
    }
    assert "calls" not in keys["hermes"].config and keys["llama3"].config["calls"] == "llama3"
