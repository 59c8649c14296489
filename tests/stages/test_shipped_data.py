"""The shipped format set: what it is made of, that each row is a good one, that it is made anew."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from make_format_rows import (
    FORMAT,
    HAND_WRITTEN,
    LONG_TURNS,
    TASK_ROUNDS,
    WANTED,
    called_in,
    faults,
    kind_of,
    made_rows,
)

from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe_file import load_recipe
from crane_tasks.rendering import render
from crane_tasks.rows import Row, load_rows

DATA = FORMAT.parent
RECIPE = DATA.parent / "crane-30b.yaml"
# The real tokenizer and template of Qwen3, not part of the repository.
QWEN3 = Path(__file__).parents[3] / "shared/tokenizers/qwen3"
LONG_TOKENS = range(1500, 4001)

needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason=f"no tokenizer of Qwen3 in {QWEN3}")


def lines() -> list[str]:
    return FORMAT.read_text("utf-8").splitlines()


@cache
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines()]


def talk(*calls: int, users: int = 1, tools: bool = True, fails: bool = False) -> dict[str, Any]:
    """A row with turns of so many calls each; the first result is an error if it `fails`."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    messages += [{"role": "user", "content": "u"}] * users
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for count in calls:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call] * count})
        result = "error: no such file" if fails and len(messages) == users + 2 else "ok"
        messages += [{"role": "tool", "content": result}] * count
    schema = {"type": "object", "properties": {}, "required": []}
    offered = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    messages.append({"role": "assistant", "content": "done"})
    return {"messages": messages, "tools": offered if tools else []}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (talk(1), "single"),
        (talk(2), "parallel"),
        (talk(1, 1), "steps"),
        (talk(1, 1, fails=True), "after_error"),
        (talk(1, fails=True), "single"),  # nothing is tried after the error
        (talk(), "none_called"),
        (talk(tools=False), "chat"),
        (talk(1, users=LONG_TURNS), "long"),
        (talk(*[1] * TASK_ROUNDS), "task"),
    ],
)
def test_the_kind_of_a_row_is_seen_in_its_structure(row: dict[str, Any], kind: str) -> None:
    assert kind_of(row) == kind
    assert not list(faults(row))


def test_a_broken_row_is_told_from_a_good_one() -> None:
    row = talk(2)
    row["messages"][3]["content"] = "<tool_call>"
    del row["messages"][4]
    row["messages"][2]["tool_calls"][0]["function"]["arguments"] = {"x": 1}
    found = "\n".join(faults(row))
    assert "format token" in found and "do not follow" in found and "x = 1" in found


def test_the_composition_is_that_of_the_methods_paper() -> None:
    kinds = Counter(map(kind_of, rows()))
    functions = ("single", "parallel", "steps", "after_error", "none_called")
    assert kinds == WANTED
    assert sum(kinds[kind] for kind in functions) == 300
    assert (kinds["chat"], kinds["long"], kinds["task"]) == (70, 30, 30)
    for name, least in (("reasoning", 36), ("agent", 16)):
        assert len((DATA / f"{name}.jsonl").read_text("utf-8").splitlines()) >= least


def test_the_functions_are_many() -> None:
    called = {name for row in rows() for name in called_in(row["messages"])}
    assert len(called) >= 40


def test_no_two_rows_are_alike() -> None:
    talks = [json.dumps(row["messages"][-2:] + row["messages"][:-2]) for row in rows()]
    without_system = [
        json.dumps([m for m in row["messages"] if m["role"] != "system"]) for row in rows()
    ]
    assert len(set(talks)) == len(set(without_system)) == len(rows())


def test_every_row_is_a_good_one() -> None:
    """Arguments fit, results follow, no format token in plain text, an answer ends it."""
    found = {n: list(faults(row)) for n, row in enumerate(rows(), 1)}
    assert not {n: some for n, some in found.items() if some}
    assert all(set(row) == {"messages", "tools"} for row in rows())


def test_the_generator_gives_the_rows_that_are_shipped() -> None:
    made = made_rows(rows()[:HAND_WRITTEN])
    assert [json.dumps(row, ensure_ascii=False) for row in made] == lines()[HAND_WRITTEN:]


def test_the_reader_keeps_the_rows_as_they_are() -> None:
    """`from` is a line here and a currency there: no reader may give both one type."""
    read = load_rows(load_recipe(RECIPE), "data/format.jsonl").rows
    assert [(list(row.messages), row.tools or []) for row in read] == [
        (row["messages"], row["tools"]) for row in rows()
    ]


def in_qwen3() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each row as the real template renders it: place, row, text."""
    for number, row in enumerate(rows(), 1):
        place = f"row {number}"
        loaded = Row(place, row["messages"], row["tools"] or None, None)
        yield place, row, render(load_tokenizer(QWEN3), loaded, prompt=False)


def pieces_of(message: dict[str, Any]) -> Iterator[str]:
    """What of a message the text must hold, in this order."""
    if message["role"] == "tool":
        yield f"<tool_response>\n{message['content']}\n</tool_response>"
    elif message["role"] != "system":  # the template merges it with the tools
        yield message["content"].strip("\n")
    for call in message.get("tool_calls", []):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        said = f'{{"name": "{function["name"]}", "arguments": {arguments}}}'
        yield f"<tool_call>\n{said}\n</tool_call>"


@needs_qwen3
def test_every_call_and_result_stands_in_the_text_of_the_real_template() -> None:
    for place, row, text in in_qwen3():
        assert all(m["content"] in text for m in row["messages"] if m["role"] == "system"), place
        at = text.index("<|im_start|>user")  # the tools' instructions hold a call as an example
        for piece in (piece for message in row["messages"] for piece in pieces_of(message)):
            found = text.find(piece, at)
            assert found >= 0, f"{place}: {piece}"
            at = found + len(piece)


@needs_qwen3
def test_long_conversations_are_long_and_none_is_cut() -> None:
    limit = load_recipe(RECIPE).calibration.format.max_length
    for place, row, text in in_qwen3():
        length = len(load_tokenizer(QWEN3)(text, add_special_tokens=False)["input_ids"])
        assert length <= limit, place
        if kind_of(row) == "long":
            assert length in LONG_TOKENS, f"{place}: {length} tokens"
