"""What rows say of right answers, and who is right by it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair
from tiny_merge import merged, statuses

from crane_tasks.errors import DataError, RecipeError
from crane_tasks.evaluate.stage import answered_by_merge
from crane_tasks.grades import check_answer, check_calls, grade_answer, grade_calls
from crane_tasks.sandbox import require_sandbox, run_tests

SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
RIGHT: list[tuple[dict[str, Any], str]] = [
    ({"number": 42}, "So it is 42."),
    ({"number": 42}, "First 41, then **42**"),
    ({"number": 42}, r"\boxed{42} as there were 7 days"),
    ({"number": -3}, "x = −3"),
    ({"number": 1234567}, "It costs $1,234,567.00"),
    ({"number": 0.5}, r"$\frac{1}{2}$"),
    ({"number": "1/3"}, "the chance is 1/3"),
    ({"number": {"value": 3.14159, "tolerance": 0.01}}, "about 3.14"),
    ({"number": 2}, "5-3 = 2"),
    ({"number": 1e21}, "1e21"),
    ({"choice": "B"}, "B"),
    ({"choice": "B"}, "(b)."),
    ({"choice": "B"}, "A is tempting, but the answer is (B) because C is not."),
    ({"choice": "C"}, "Answer: **C**"),
    ({"choice": "D"}, r"Thus \boxed{\text{D}}"),
    ({"choice": "A"}, "A) since the others fail"),
    ({"choice": "B"}, "A) is 3.\nB) is 4.\nSo it is B."),
    ({"text": "Paris"}, "paris."),
    ({"text": ["New York", "NYC"]}, "I think so.\n**NYC**"),
    ({"text": "yes"}, "The answer is yes."),
    ({"regex": r"^\d{4}-\d\d-\d\d$"}, "2026-11-27"),
    ({"json-schema": SCHEMA}, '{"a": 1}'),
    ({"json-schema": SCHEMA}, 'Here:\n```json\n{"a": 1}\n```\nDone.'),
    ({"json-schema": SCHEMA}, 'Sure: {"a": 1, "b": [2]} as asked'),
]
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"number": 42}, "42, no: 43", "last number 43"),
    ({"number": 42}, "none", "no number"),
    ({"number": 2}, "v2", "no number"),
    ({"number": 0.1}, "0.1000001", "last number"),
    ({"choice": "B"}, "I think it is a tie", "no letter"),
    ({"choice": "B"}, "The answer is C, not B", "chose C"),
    ({"choice": "B"}, "A) `x + 1`\nB) `x - 1`", "no letter"),
    ({"text": "Paris"}, "Not Paris but Lyon", "said Not Paris but Lyon"),
    ({"regex": "^no$"}, "nope", "does not match"),
    ({"json-schema": SCHEMA}, '{"a": "1"}', "not of type 'integer'"),
    ({"json-schema": SCHEMA}, "a is 1", "no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "text"), RIGHT)
def test_right_answers_are_found_where_people_write_them(answer: dict[str, Any], text: str) -> None:
    assert check_answer(answer, "row 1") == answer
    found = grade_answer(text, answer)
    assert found.right, found.why


@pytest.mark.parametrize(("answer", "text", "why"), WRONG)
def test_wrong_answers_are_wrong_and_say_why(answer: dict[str, Any], text: str, why: str) -> None:
    found = grade_answer(text, check_answer(answer, "row 1"))
    assert not found.right and why in found.why


@pytest.mark.parametrize(
    "given",
    [
        42, {}, {"number": 1, "text": "1"}, {"numer": 1}, {"number": True}, {"number": "much"},
        {"number": {"value": 1, "tolerance": "x"}}, {"choice": "BC"}, {"text": []}, {"regex": "("},
        {"json-schema": {"type": "text"}}, {"json-schema": 3}, {"python-tests": "assert ("},
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused_by_its_row(given: Any) -> None:
    with pytest.raises(DataError, match="row 7: `answer"):
        check_answer(given, "row 7")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


WANTED = [
    call("weather", city=["Paris", "Paris, France"], unit=["celsius", None]),
    call("add", x=2, y=[2.5]),
]


@pytest.mark.parametrize(
    "calls",
    [
        [call("weather", city="paris", unit="Celsius"), call("add", x=2, y=2.5)],
        [call("add", x=2.0, y=2.5), call("weather", city="Paris France")],
        [call("add", x="2", y="2.5"), call("weather", city="Paris")],
    ],
)
def test_calls_in_any_order_with_what_is_as_good(calls: list[dict[str, Any]]) -> None:
    assert grade_calls(calls, check_calls(WANTED, "row")).right


@pytest.mark.parametrize(
    ("calls", "why"),
    [
        (None, "no well-formed call"),
        ([WANTED[0]], "1 calls where 2 are right"),
        ([call("weather", city="Lyon"), call("add", x=2, y=2.5)], "weather.city is Lyon"),
        ([call("weather"), call("add", x=2, y=2.5)], "weather lacks city"),
        ([call("weather", city="Paris", days=3), call("add", x=2, y=2.5)], "no argument days"),
        ([call("weather", city="Paris"), call("sub", x=2, y=2.5)], "sub is not wanted"),
        ([call("weather", city="Paris"), call("add", x=True, y=2.5)], "add.x is true"),
        ([call("weather", city="Paris"), call("weather", city="Paris")], "weather"),
    ],
)
def test_other_calls_are_wrong_and_say_why(calls: Any, why: str) -> None:
    found = grade_calls(calls, WANTED)
    assert not found.right and why in found.why


def test_where_no_call_is_right_only_none_is() -> None:
    assert grade_calls([], []).right
    assert not grade_calls([call("add", x=1)], []).right
    assert not grade_calls(None, []).right


contained = pytest.mark.skipif(shutil.which("bwrap") is None, reason="there is no bubblewrap")


@contained
@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("def f(x):\n    return x + 1", True),
        ("Here:\n```python\ndef f(x):\n    return x + 1\n```\nIt adds one.", True),
        ("def f(x):\n    return x", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("f = 1 +", False),
        ("f = bytearray(3 * 10**9)", False),
        ("import socket\nsocket.create_connection(('1.1.1.1', 80), 2)", False),
    ],
)
def test_code_is_run_against_its_tests(code: str, passes: bool) -> None:
    found = grade_answer(code, {"python-tests": "assert f(1) == 2"}, run_tests)
    assert found.right is passes, found.why


@contained
def test_code_sees_and_changes_nothing_of_ours(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    for code in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        "open('/usr/x', 'w')",
    ):
        passed, said = run_tests(code, "")
        assert not passed and ("No such file" in said or "Read-only" in said)
    assert secret.read_text() == "s"


def test_without_bubblewrap_no_code_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=r"evaluate.run_code: .*not installed"):
        require_sandbox()


def test_the_grades_are_no_part_of_what_models_see(tmp_path: Path) -> None:
    from crane_tasks.row_files import read_records
    from crane_tasks.rows import _rows

    plain = {"messages": [{"role": "user", "content": "6 * 7?"}]}
    digests = set()
    for number, more in enumerate(({}, {"answer": {"number": 42}}, {"calls": []})):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({**plain, **more}) + "\n")
        rows = _rows(read_records(file), str(file), file.name)
        digests.add(rows.digest)
        assert bool(rows.grades) is bool(more)
    assert len(digests) == 1


def test_another_grade_of_the_same_answers_decodes_nothing_anew(
    pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    pair = pairs("qwen3_moe").copy(tmp_path / "pair")
    given = ("evaluate.generate=2", "evaluate.max_new_tokens=6")
    file = pair.recipe().locate(str(pair.recipe().evaluate.reasoning))
    assert file is not None
    first = merged(pair, tmp_path / "store", tmp_path / "out", *given)
    before = {row.place: row for row in answered_by_merge(first.ctx, first.keys)}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    said = next(row for row in before.values() if row.set == "reasoning").answers["donor"].text
    rows[0]["answer"] = {"regex": "(?s).*"}  # what only ends is right
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = merged(pair, tmp_path / "store", tmp_path / "out", *given)
    assert statuses(again)["evaluate"] == "computed"
    measured = {
        f"measure/{p.name}" for p in (tmp_path / "store" / "measure").iterdir() if p.is_dir()
    }
    assert len(measured) == 3, "the answers are those that were there"
    graded = next(r for r in answered_by_merge(again.ctx, again.keys) if r.set == "reasoning")
    assert graded.answers["donor"].text == said
    assert graded.answers["donor"].right is graded.answers["donor"].ended
    assert "matches" in graded.answers["donor"].why or not graded.answers["donor"].ended


def test_code_is_run_only_where_the_recipe_says_so(
    pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    file = pair.recipe().locate(str(pair.recipe().evaluate.reasoning))
    assert file is not None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["answer"] = {"python-tests": "assert f(1) == 2"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match=r"line 2: `python-tests` run code.*evaluate\.run_code"):
        merged(pair, tmp_path / "store", tmp_path / "out", "evaluate.generate=2")
    assert not (tmp_path / "out").exists()
