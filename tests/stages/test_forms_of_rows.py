"""The same rows are the same rows, whatever file they lie in and however they were written."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import TinyPair

from crane_tasks.errors import DataError, RecipeError
from crane_tasks.rows import LONGEST_ROW, RowSet, load_rows

USER = {"role": "user", "content": "Is it raining?"}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A function schema."""
    inner = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": inner}}


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    """An assistant's turn that is a call."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


ROWS: list[dict[str, Any]] = [
    {"messages": [USER], "completion": "no"},
    {"messages": [USER, calling("rain", city="Oslo"),
                  {"role": "tool", "name": "rain", "content": "yes"}],
     "tools": [tool("rain", city={"type": "string"})]},
    {"messages": [{"role": "system", "content": "be brief"}, USER, calling("wind", at=[3, 4]),
                  {"role": "assistant", "reasoning_content": "hm", "content": "So it is."}, USER],
     "tools": [tool("wind", at={"type": "array", "items": {"type": "integer"}}), tool("rain")]},
    {"messages": [USER]},
]  # fmt: skip


class Shelf:
    """The folder of a recipe."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair = pair.copy(folder / "pair")

    def rows(self, name: str, data: bytes) -> RowSet:
        """The rows of a file with this content."""
        (self.pair.folder / name).write_bytes(data)
        return load_rows(self.pair.recipe(), name)

    def table(self, rows: list[dict[str, Any]]) -> RowSet:
        """The rows of a Parquet file."""
        file = self.pair.folder / "own.parquet"
        whole = [{"tools": None, "completion": None, **row} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), file)
        return load_rows(self.pair.recipe(), file.name)


@pytest.fixture
def shelf(pairs: Callable[[str], TinyPair], tmp_path: Path) -> Shelf:
    """Of a dense pair, copied."""
    return Shelf(pairs("qwen3"), tmp_path)


def lines(*rows: Any) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_the_same_rows_are_the_same_from_every_kind_of_file(shelf: Shelf) -> None:
    text, whole = lines(*ROWS), json.dumps(ROWS).encode()
    wanted = shelf.rows("own.jsonl", text)
    assert [row.tools for row in wanted.rows] == [row.get("tools") for row in ROWS]
    found = [
        shelf.rows("own.jsonl.gz", gzip.compress(text)),
        shelf.rows("own.json", whole),
        shelf.rows("own.json.gz", gzip.compress(whole)),
        shelf.table(ROWS),
        shelf.rows("marked.jsonl", "\N{BYTE ORDER MARK}".encode() + text),
        shelf.rows("blank.jsonl", b"\n" + text.replace(b"\n", b"\r\n \n\n")),
    ]
    assert [rows.digest for rows in found] == [wanted.digest] * len(found)
    assert [row.place for row in found[-1].rows] == [f"blank.jsonl line {n}" for n in (2, 5, 8, 11)]


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row with tools and arguments as JSON text, and its turns' content in parts."""
    messages = []
    for message in row["messages"]:
        message = dict(message)
        if "content" in message:
            half = len(message["content"]) // 2
            halves = message["content"][:half], message["content"][half:]
            message["content"] = [{"type": "text", "text": text} for text in halves]
        if "tool_calls" in message:
            function = message["tool_calls"][0]["function"]
            function = function | {"arguments": json.dumps(function["arguments"])}
            message["tool_calls"] = [message["tool_calls"][0] | {"function": function}]
        messages.append(message)
    tools = {"tools": json.dumps(row["tools"])} if "tools" in row else {}
    return row | {"messages": messages} | tools


def test_json_text_and_parts_are_what_they_say(shelf: Shelf) -> None:
    wanted = shelf.rows("own.jsonl", lines(*ROWS)).digest
    assert shelf.rows("text.jsonl", lines(*map(as_text, ROWS))).digest == wanted
    assert shelf.table([as_text(row) for row in ROWS]).digest == wanted
    calls = [row | {"messages": [m | {"tool_calls": json.dumps(m["tool_calls"])}
                                 if "tool_calls" in m else m for m in row["messages"]]}
             for row in ROWS]  # fmt: skip
    assert shelf.rows("calls.jsonl", lines(*calls)).digest == wanted
    tools = [row | ({"tools": [json.dumps(t) for t in row["tools"]]} if "tools" in row else {})
             for row in ROWS]  # fmt: skip
    assert shelf.rows("tools.jsonl", lines(*tools)).digest == wanted


def test_null_fields_of_a_turn_are_absent_fields_and_a_written_null_argument_stays(
    shelf: Shelf,
) -> None:
    full = {"tool_calls": None, "name": None, "function_call": None}
    rows = [row | {"messages": [full | m for m in row["messages"]]} for row in ROWS]
    assert (
        shelf.rows("null.jsonl", lines(*rows)).digest == shelf.rows("a.jsonl", lines(*ROWS)).digest
    )
    row = {"messages": [USER, calling("rain", city=None), USER]}
    found = shelf.rows("argument.jsonl", lines(row)).rows[0].messages[1]
    assert found["tool_calls"][0]["function"]["arguments"] == {"city": None}
    text = as_text({"messages": [USER | {"content": "hi"}, row["messages"][1], USER]})
    again = shelf.table([text]).rows[0].messages[1]
    assert again["tool_calls"] == found["tool_calls"]


def test_rows_whose_arguments_or_schemas_are_ordered_otherwise_are_others(shelf: Shelf) -> None:
    """A template writes them in their order, so the tokens differ."""
    calls = [calling("rain", a=1, b=2), calling("rain", b=2, a=1)]
    sets = [shelf.rows(f"{n}.jsonl", lines({"messages": [USER, call, USER]}))
            for n, call in enumerate(calls)]  # fmt: skip
    assert sets[0].digest != sets[1].digest
    tools = [tool("rain", a={}, b={}), tool("rain", b={}, a={})]
    sets = [shelf.rows(f"{n}t.jsonl", lines({"messages": [USER], "tools": [one]}))
            for n, one in enumerate(tools)]  # fmt: skip
    assert sets[0].digest != sets[1].digest


def test_a_field_that_first_appears_behind_ten_megabytes_is_read(shelf: Shelf) -> None:
    plain = {"messages": [{"role": "user", "content": "x" * 100_000}]}
    found = shelf.rows("long.jsonl", lines(*[plain] * 110, ROWS[1])).rows
    assert found[-1].tools == ROWS[1]["tools"] and found[0].tools is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
         r"line 2: a part of the content .* 'image'"),
        ({"messages": [{"role": "user", "content": [3]}]}, r"line 2: a part of the content .* 3"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"line 2: .*no content and no c"),
        ({"messages": [USER], "tools": "[{"}, r"line 2: `tools` is text, but not JSON"),
        ({"messages": [USER], "tools": {"name": "f"}}, r"line 2: `tools` is a list"),
        ({"messages": [USER], "tools": [3]}, r"line 2: every one of `tools` is an object"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "{"}]}, r"line 2: `tool_calls`"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{oops"}}]}]}, r"line 2: the arguments of a"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[1]"}}]}]}, r"line 2: .*are no object: \[1\]"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
         r"line 2: a tool call has no name"),
        ({"prompt": "x" * (LONGEST_ROW + 1)}, r"line 2: has 2,000,016 characters"),
        ({"messages": [USER], "chat_template_kwargs": "[1]"}, r"line 2: `chat_template_kwargs`"),
    ],
)  # fmt: skip
def test_a_row_in_no_known_form_is_refused_by_its_line(
    row: dict[str, Any], message: str, shelf: Shelf
) -> None:
    with pytest.raises(DataError, match=message):
        shelf.rows("own.jsonl", lines(ROWS[0], row))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("own.jsonl.gz", b"no gzip", r"own\.jsonl\.gz: cannot be read"),
        ("own.jsonl.gz", gzip.compress(lines(*ROWS))[:-20], r"own\.jsonl\.gz: cannot be read"),
        ("own.parquet", b"no parquet", r"own\.parquet: cannot be read"),
        ("own.parquet.gz", b"", r"JSONL or JSON .*or Parquet, not '\.gz'"),
        ("own.jsonl", b'{"prompt": "\xff"}', r"own\.jsonl line 1: not JSON"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(
    name: str, data: bytes, message: str, shelf: Shelf
) -> None:
    with pytest.raises(DataError, match=message):
        shelf.rows(name, data)


def test_a_part_of_the_rows_is_the_file_of_these_rows(
    pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    file = pair.folder / "format.jsonl"
    lines = file.read_text().splitlines()
    (pair.folder / "first.jsonl").write_text("\n".join(lines[:2]) + "\n")

    def rows(data: str) -> RowSet:
        recipe = pair.recipe(f"calibration.format.data={data}")
        return load_rows(recipe, recipe.calibration.format.data)

    assert rows("{path: format.jsonl, limit: 2}").digest == rows("first.jsonl").digest
    assert rows("{path: format.jsonl, limit: 900}").digest == rows("format.jsonl").digest
    drawn = rows("{path: format.jsonl, limit: 3, seed: 1}")
    assert (
        len(drawn.rows) == 3
        and drawn.digest == rows("{path: format.jsonl, limit: 3, seed: 1}").digest
    )
    whole = [row.content() for row in rows("format.jsonl").rows]
    places = [whole.index(row.content()) for row in drawn.rows]
    assert places == sorted(places) and len(set(places)) == 3
    assert {rows(f"{{path: format.jsonl, limit: 3, seed: {s}}}").digest for s in range(9)} != {
        drawn.digest
    }
    with pytest.raises(DataError, match="a file has neither subset nor split"):
        rows("{path: format.jsonl, split: test}")
    for wrong, told in (
        ("limit: 0", "format.data.limit"),
        ("first: 2", "format.data.first: unknown"),
    ):
        with pytest.raises(RecipeError, match=told):
            rows(f"{{path: format.jsonl, {wrong}}}")


def test_a_datasets_subset_and_split_are_those_that_are_asked_for(
    pairs: Callable[[str], TinyPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes a folder called as an id where the hub's cache would be asked."""
    pair = pairs("qwen3")
    place = tmp_path / "me" / "rows"
    place.mkdir(parents=True)
    configs = []
    for subset in ("code", "prose"):
        files = []
        for split, count in (("train", 4), ("test", 3)):
            rows = [
                {"messages": [USER], "completion": f"{subset} {split} {i}"} for i in range(count)
            ]
            file = place / f"{subset}_{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append(f"  - split: {split}\n    path: {file.name}\n")
        configs.append(f"- config_name: {subset}\n  data_files:\n{''.join(files)}")
    (place / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")

    def said(more: str) -> list[str | None]:
        recipe = pair.recipe(f"calibration.format.data={{path: me/rows, {more}}}")
        with monkeypatch.context() as here:
            here.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
            here.chdir(tmp_path)
            return [
                row.completion for row in load_rows(recipe, recipe.calibration.format.data).rows
            ]

    assert said("subset: code") == [f"code train {i}" for i in range(4)]
    assert said("subset: prose, split: test") == [f"prose test {i}" for i in range(3)]
    assert said("subset: code, split: 'test[1:]', limit: 1") == ["code test 1"]
    with pytest.raises(DataError, match=r"me/rows \(subset poems\): .*did not give it"):
        said("subset: poems")
