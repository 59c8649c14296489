"""The shipped graded rows: made anew to the byte, each with an answer that its own grade takes."""

import json
from collections import Counter
from typing import Any

import pytest
from make_graded_rows import DATA, SETS, made_rows

from crane_tasks.calls import HERMES
from crane_tasks.grades import grade_answer, grade_calls
from crane_tasks.recipe_file import load_recipe
from crane_tasks.rows import Row, load_rows

RECIPE = DATA.parent / "crane-30b.yaml"
COUNTS = {
    "graded_reasoning": {"number": 70, "text": 25, "choice": 25},
    "graded_agent": {"calls": 80, "no call": 20, "json-schema": 30, "regex": 20},
}


def shipped(name: str) -> tuple[Row, ...]:
    return load_rows(load_recipe(RECIPE), f"crane:{name}").rows


def kind_of(row: Row) -> str:
    if row.answer is not None:
        return next(iter(row.answer))
    return "calls" if row.calls else "no call"


@pytest.mark.parametrize("name", SETS)
def test_the_rows_are_made_anew_to_the_byte(name: str) -> None:
    lines = (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()
    assert [json.dumps(row, ensure_ascii=False) for row in made_rows(name)] == lines
    assert dict(Counter(map(kind_of, shipped(name)))) == COUNTS[name]
    assert len({json.dumps(list(row.messages)) for row in shipped(name)}) == len(lines)


def right_answer(row: Row) -> str:
    """An answer as a good model writes it."""
    assert row.answer is not None
    ((kind, wanted),) = row.answer.items()
    prompt = row.messages[-1]["content"]
    if kind == "json-schema":
        values = {
            key: value["items"]["enum"] if "items" in value else value["const"]
            for key, value in wanted["properties"].items()
        }
        return json.dumps(values)
    if kind != "regex":
        return f"Let me see: 17, or B, or Zoe?\n\n{wanted}"
    if "diff" in prompt:
        old = prompt.split("from ")[1].split()[0]
        body = f"--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-{old}\n+{int(old) + 1}\n"
        return f"```diff\n{body}```"
    if "numbered" in prompt:
        return f"1. build\n2. test\n3. ship\n{prompt.split()[-1].strip('.')}"
    if "dollar" in prompt:
        return f"${prompt.split()[2]}$"
    words = prompt.split("line: ")[1].split()
    return f"{words[0]} {words[-1].strip('.')}"


@pytest.mark.parametrize("name", SETS)
def test_a_right_answer_is_right_and_an_empty_one_is_not(name: str) -> None:
    for row in shipped(name):
        if row.answer is not None:
            found = grade_answer(right_answer(row), row.answer)
            assert found.right, (row.place, found.why, right_answer(row))
            assert not grade_answer("I do not know.", row.answer).right
            continue
        assert row.calls is not None and row.tools
        calls = [_first_alternatives(call) for call in row.calls]
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
        for call in calls:
            parameters = offered[call["name"]]
            assert set(parameters["required"]) <= set(call["arguments"])
            assert set(call["arguments"]) <= set(parameters["properties"])
        written = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
        assert grade_calls(HERMES.read(written) or [], row.calls).right
        assert not grade_calls([*calls, {"name": "delete_file", "arguments": {"path": "x"}}],
                               row.calls).right  # fmt: skip
        assert grade_calls([], row.calls).right is (not row.calls)


def _first_alternatives(call: Any) -> dict[str, Any]:
    arguments = {
        name: values[0] if isinstance(values, list) else values
        for name, values in call["arguments"].items()
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    return {"name": call["name"], "arguments": given}
