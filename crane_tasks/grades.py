"""What a row says a right answer is, and whether an answer is one.

`answer` names one kind of check, as benchmarks have them; what is compared is looked for where
people write it (the last number, `\\boxed{}`, fenced code). `calls` are tool calls with
alternatives per argument, compared as the Berkeley Function Calling Leaderboard's AST check does.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from crane_tasks.errors import DataError

Call = Mapping[str, Any]
# Whether code passes its tests, and what it said if not.
RunTests = Callable[[str, str], tuple[bool, str]]
SHOWN = 80  # characters of a value in a reason
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?"
)
FENCED = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)
CHOSEN = re.compile(r"(?i:answer|option|choice)\W{0,4}(?:(?i:is)\W{0,4})?([A-Z])\b(?!')")
OPTION = re.compile(r"^\W*([A-Z])[).:](.*)$", re.MULTILINE)
LETTER = re.compile(r"\(([A-Z])\)|(?:^|\s)\**([A-Z])(?:[).:]|\**\s*$)", re.MULTILINE)


@dataclass(frozen=True)
class Grade:
    """Whether an answer is right, and why."""

    right: bool
    why: str


@dataclass(frozen=True)
class Kind:
    """One kind of check.

    Attributes:
        refuse: what is wrong with what a row gives; empty if nothing.
        grade: the answer behind its thinking, what the row gives, and what runs code.
    """

    refuse: Callable[[Any], str]
    grade: Callable[[str, Any, RunTests | None], Grade]


def check_answer(given: Any, place: str) -> Mapping[str, Any]:
    """A row's `answer`: a mapping of one kind to what it needs.

    Raises:
        DataError: it is none; the message begins with `place`.
    """
    if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in KINDS:
        raise DataError(
            f"{place}: `answer` is one of {', '.join(KINDS)}, with what is right, such as "
            '{"number": 42}'
        )
    ((kind, wanted),) = given.items()
    if wrong := KINDS[kind].refuse(wanted):
        raise DataError(f"{place}: `answer.{kind}` {wrong}")
    return given


def check_calls(given: Any, place: str) -> Sequence[Call]:
    """A row's `calls`: name and arguments each; [] where none is right.

    Raises:
        DataError: they are none; the message begins with `place`.
    """
    sound = isinstance(given, list) and all(
        isinstance(call, Mapping)
        and set(call) == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], Mapping)
        for call in given
    )
    if not sound:
        raise DataError(
            f'{place}: `calls` is a list of {{"name": text, "arguments": {{name: value, or a list '
            "of values that are as good; null among them if it may be left out}}"
        )
    calls: Sequence[Call] = given
    return calls


def needs_code(answer: Mapping[str, Any] | None) -> bool:
    """Whether code has to be run to grade by it."""
    return answer is not None and "python-tests" in answer


def grade_answer(text: str, answer: Mapping[str, Any], run: RunTests | None = None) -> Grade:
    """Grade what stands behind an answer's thinking."""
    ((kind, wanted),) = answer.items()
    return KINDS[kind].grade(text, wanted, run)


def grade_calls(calls: Sequence[Call] | None, wanted: Sequence[Call]) -> Grade:
    """Every call is wanted and every wanted one is there, in any order.

    Args:
        calls: what an answer has; None if they are broken.
    """
    if calls is None:
        return Grade(
            False, "no well-formed call" if wanted else "a broken call, where none is right"
        )
    if len(calls) != len(wanted):
        return Grade(False, f"{len(calls)} calls where {len(wanted)} are right")
    left = list(wanted)
    for call in calls:
        wrong = [_call_fault(call, one) for one in left]
        if "" not in wrong:
            named = [w for w, one in zip(wrong, left, strict=True) if one["name"] == call["name"]]
            return Grade(False, named[0] if named else f"{call['name']} is not wanted")
        del left[wrong.index("")]
    return Grade(True, "the calls are right")


def _call_fault(call: Call, wanted: Call) -> str:
    if call["name"] != wanted["name"]:
        return f"{call['name']} is not wanted"
    given, allowed = call["arguments"], wanted["arguments"]
    for name in given:
        if name not in allowed:
            return f"{call['name']} has no argument {name} here"
    for name, values in allowed.items():
        values = values if isinstance(values, list) else [values]
        if name not in given:
            if None in values:
                continue
            return f"{call['name']} lacks {name}"
        if not any(_same(given[name], value) for value in values):
            return f"{call['name']}.{name} is {_short(given[name])}, not {_short(values[0])}"
    return ""


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two arguments are the same value: texts but for case and punctuation, numbers by
    value; true is no 1. Syntaxes without types write all as text."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs or (isinstance(ours, str) and ours.lower() == str(theirs).lower())
    if isinstance(ours, str) and isinstance(theirs, str):
        return _bare(ours) == _bare(theirs)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, str) and isinstance(theirs, (int, float, list, dict)):
        try:
            return _same(json.loads(ours), theirs)
        except ValueError:
            return False
    return bool(ours == theirs)


def _bare(text: str) -> str:
    return re.sub(r"[ ,./\-_*^'\"]", "", text).casefold()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def boxed(text: str) -> str | None:
    """What the last `\\boxed{}` holds, its braces paired."""
    begin = text.rfind("\\boxed{")
    depth, at = 1, begin + len("\\boxed{")
    if begin < 0:
        return None
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[at:end]
    return None


def _number_of(value: Any) -> Fraction | None:
    text = re.sub(r"[\s,]", "", str(value))
    try:
        whole, slash, part = text.partition("/")
        return Fraction(Decimal(whole)) / Fraction(Decimal(part) if slash else 1)
    except (InvalidOperation, ValueError, ZeroDivisionError, OverflowError):
        return None


def _refuse_number(wanted: Any) -> str:
    value, tolerance = _number_and_tolerance(wanted)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return "is no number"
    sound = _number_of(value) is not None and _number_of(tolerance) is not None
    return "" if sound else "is no number"


def _number_and_tolerance(wanted: Any) -> tuple[Any, Any]:
    if isinstance(wanted, Mapping):
        return wanted.get("value"), wanted.get("tolerance", 0)
    return wanted, 0


def _grade_number(text: str, wanted: Any, run: RunTests | None) -> Grade:
    value, tolerance = map(_number_of, _number_and_tolerance(wanted))
    assert value is not None and tolerance is not None, "refused when the row was read"
    plain = text.replace("−", "-").replace("\\,", "").replace("\\!", "").replace("$", "")
    plain = re.sub(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", plain)
    places = [one for one in (boxed(plain), plain) if one is not None]
    found = next((f for place in places if (f := NUMBER.findall(place))), [])
    number = _number_of(found[-1]) if found else None
    if number is None:
        return Grade(False, "no number")
    right = abs(number - value) <= tolerance
    return Grade(
        right, f"last number {found[-1]}, wanted {_short(_number_and_tolerance(wanted)[0])}"
    )


def _refuse_choice(wanted: Any) -> str:
    return (
        "" if isinstance(wanted, str) and re.fullmatch("[A-Z]", wanted) else "is a letter, A to Z"
    )


def _grade_choice(text: str, wanted: Any, run: RunTests | None) -> Grade:
    plain = text.strip().strip("*").strip()
    inside = boxed(text)
    if inside is not None:
        named = re.findall(r"\b([A-Z])\b", inside)
    elif re.fullmatch(r"\(?[A-Za-z]\)?\.?", plain):
        named = [plain.strip("().").upper()]
    else:
        # Options that are only repeated are no choice.
        repeated = len({line[0] for line in OPTION.findall(text)}) > 1
        rest = OPTION.sub("", text) if repeated else text
        named = CHOSEN.findall(text) or [a or b for a, b in LETTER.findall(rest)]
    if not named:
        return Grade(False, "no letter")
    return Grade(named[-1] == wanted, f"chose {named[-1]}, wanted {wanted}")


def _refuse_text(wanted: Any) -> str:
    texts = wanted if isinstance(wanted, list) else [wanted]
    return (
        ""
        if texts and all(isinstance(t, str) and t for t in texts)
        else "is text, or a list of texts"
    )


def _grade_text(text: str, wanted: Any, run: RunTests | None) -> Grade:
    allowed = [_plain(t) for t in (wanted if isinstance(wanted, list) else [wanted])]
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    said = re.split(r"(?i)\banswer(?:\s+is)?\s*:?\s", lines[-1])[-1]
    found = [one for one in (boxed(text), text, lines[-1], said) if one is not None]
    right = any(_plain(one) in allowed for one in found)
    return Grade(right, f"said {_short(lines[-1])}, wanted {_short(wanted)}")


def _plain(text: str) -> str:
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,:;!?\"'`*_()[]{}$")


def _refuse_regex(wanted: Any) -> str:
    try:
        re.compile(wanted)
    except (re.error, TypeError) as error:
        return f"is no regular expression: {error}"
    return ""


def _grade_regex(text: str, wanted: Any, run: RunTests | None) -> Grade:
    found = re.search(wanted, text)
    return Grade(found is not None, f"{'matches' if found else 'does not match'} {_short(wanted)}")


def _refuse_schema(wanted: Any) -> str:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(wanted, Mapping):
        return "is no JSON schema"
    try:
        validator_for(wanted).check_schema(wanted)
    except SchemaError as error:
        return f"is no JSON schema: {error.message}"
    return ""


def _grade_schema(text: str, wanted: Any, run: RunTests | None) -> Grade:
    from jsonschema.validators import validator_for

    candidates = [*reversed(FENCED.findall(text)), text]
    values = [value for one in candidates if (value := _json_value(one)) is not None]
    if not values:
        return Grade(False, "no JSON")
    error = next(validator_for(wanted)(wanted).iter_errors(values[0][0]), None)
    return Grade(error is None, "fits the schema" if error is None else _short(error.message))


def _json_value(text: str) -> tuple[Any] | None:
    try:
        return (json.loads(text),)
    except (ValueError, RecursionError):
        pass
    begin = re.search(r"[{\[]", text)
    try:
        return (json.JSONDecoder().raw_decode(text, begin.start())[0],) if begin else None
    except (ValueError, RecursionError):
        return None


def _refuse_tests(wanted: Any) -> str:
    if not isinstance(wanted, str):
        return "is Python code that raises where the answer is wrong"
    try:
        compile(wanted, "python-tests", "exec")
    except (SyntaxError, ValueError) as error:
        return f"is no Python code: {error}"
    return ""


def _grade_tests(text: str, wanted: Any, run: RunTests | None) -> Grade:
    assert run is not None, "refused before anything was answered"
    fenced = FENCED.findall(text)
    right, said = run("\n\n".join(fenced) if fenced else text, wanted)
    return Grade(right, "passes the tests" if right else _short(said))


KINDS: Mapping[str, Kind] = {
    "number": Kind(_refuse_number, _grade_number),
    "choice": Kind(_refuse_choice, _grade_choice),
    "text": Kind(_refuse_text, _grade_text),
    "regex": Kind(_refuse_regex, _grade_regex),
    "json-schema": Kind(_refuse_schema, _grade_schema),
    "python-tests": Kind(_refuse_tests, _grade_tests),
}
