"""Make the rows of the shipped format set that are not hand-written whole.

Run ``python tests/make_format_rows.py``: it keeps the first rows of
``flows/recipes/data/format.jsonl``, which were written by hand, and appends as many of each kind
as `WANTED` still asks for. Everything comes from the blocks in ``tests/format_blocks`` and a fixed
seed, so a second run writes the same bytes:

* ``tools.yaml``: the functions that are offered;
* ``cases_*.yaml``: a file with one small defect each, its edit and what the tests print. Reading,
  searching, editing and diffs are computed from the file, in five dialects of tools;
* ``exchanges_*.yaml``: a question that one call answers, some with a first call that fails;
* ``traces.yaml``: conversations of several calls, written whole;
* ``chats.yaml``, ``offered.yaml``: conversations without calls, without and with tools offered.

The kind of a row is a matter of its structure (`kind_of`), not of a field.
"""

from __future__ import annotations

import difflib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

BLOCKS = Path(__file__).parent / "format_blocks"
FORMAT = Path(__file__).parents[1] / "flows/recipes/data/format.jsonl"
HAND_WRITTEN = 48
SEED = 20251126

# The composition of the method's paper: 300 conversations with function calls in five kinds,
# 70 chats, 30 long conversations, 30 completed tasks.
WANTED = {
    "single": 60,
    "parallel": 60,
    "steps": 60,
    "after_error": 60,
    "none_called": 60,
    "chat": 70,
    "long": 30,
    "task": 30,
}
LONG_TURNS = 4  # user turns of a long conversation, at least
LONG_CHAT = 7000  # characters of a long chat, at least: about 1,600 tokens
TASK_ROUNDS = 5  # turns with calls of a completed task, at least

FAILED = re.compile(
    r"(error|fatal)\b|(process ended with )?exit code [1-9]|error from server", re.IGNORECASE
)
TOKENS = re.compile(r"<\|[a-z_]+\|>|</?(think|tool_call|tool_response|tools)>")

Row = dict[str, Any]
Message = dict[str, Any]
Block = dict[str, Any]


# What a row is, and whether it is a good one.


def kind_of(row: Row) -> str:
    """One of `WANTED`."""
    messages = row["messages"]
    users = sum(message["role"] == "user" for message in messages)
    rounds = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    if users >= LONG_TURNS:
        return "long"
    if not row["tools"]:
        return "chat"
    if not rounds:
        return "none_called"
    if messages[0]["role"] == "system" and users == 1 and len(rounds) >= TASK_ROUNDS:
        return "task"
    if _goes_on_after_an_error(messages):
        return "after_error"
    if len(rounds) > 1:
        return "steps"
    return "single" if len(rounds[0]) == 1 else "parallel"


def _goes_on_after_an_error(messages: Sequence[Message]) -> bool:
    failed = False
    for message in messages:
        failed |= message["role"] == "tool" and bool(FAILED.match(message["content"]))
        if failed and message.get("tool_calls"):
            return True
    return False


def faults(row: Row) -> Iterator[str]:
    """What is wrong with a row: nothing, for a good one."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
    due = 0  # results that are still to come
    for number, message in enumerate(row["messages"]):
        role, calls = message["role"], message.get("tool_calls", [])
        if TOKENS.search(json.dumps(message)):
            yield f"message {number} holds a format token"
        if role == "tool":
            due -= 1
        if (role == "tool" and due < 0) or (role != "tool" and due > 0):
            yield f"message {number}: results do not follow their calls"
        if role != "assistant" and calls:
            yield f"message {number}: calls by {role}"
        if not message["content"] and not calls:
            yield f"message {number} is empty"
        due = max(due, 0) + len(calls)
        for call in calls:
            function = call["function"]
            if function["name"] not in schemas:
                yield f"message {number} calls {function['name']}, which is not offered"
            else:
                yield from _misfits(function["arguments"], schemas[function["name"]], number)
    last = row["messages"][-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        yield "does not end with an answer"


def _misfits(arguments: dict[str, Any], schema: dict[str, Any], number: int) -> Iterator[str]:
    for name in sorted(set(schema.get("required", [])) - set(arguments)):
        yield f"message {number} lacks the argument {name}"
    for name, value in arguments.items():
        wanted = schema["properties"].get(name)
        if wanted is None or not _fits(value, wanted):
            yield f"message {number}: {name} = {value!r} does not fit the schema"


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    types: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
    }
    kind = schema.get("type")
    if kind is not None:
        if not isinstance(value, types[kind]) or isinstance(value, bool) != (kind == "boolean"):
            return False
        if kind == "array" and "items" in schema:
            return all(_fits(item, schema["items"]) for item in value)
    return value in schema.get("enum", [value])


# Messages.


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def turn(say: str, calls: Sequence[Sequence[Any]], results: Sequence[Any]) -> list[Message]:
    """A turn with calls, (name, arguments) each, and their results."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    called = [{"type": "function", "function": function} for function in functions]
    return [
        {"role": "assistant", "content": say, "tool_calls": called},
        *({"role": "tool", "content": _as_text(result)} for result in results),
    ]


def _as_text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def called_in(messages: Sequence[Message]) -> list[str]:
    """The names of the functions that are called, without repetition."""
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    return list(dict.fromkeys(call["function"]["name"] for call in calls))


def _schema(name: str, block: Sequence[Any]) -> dict[str, Any]:
    """The schema of a tool from its short form in tools.yaml."""
    names = {"s": "string", "i": "integer", "n": "number", "b": "boolean", "o": "object"}
    properties, required = {}, []
    for parameter, short in block[1].items():
        kind, description = short.split(" ", 1)
        if kind.endswith("!"):
            required.append(parameter)
        kind = kind.rstrip("!")
        if kind.startswith("["):
            shape: dict[str, Any] = {"type": "array", "items": {"type": names[kind[1]]}}
        elif "|" in kind:
            shape = {"type": "string", "enum": kind.split("|")}
        else:
            shape = {"type": names[kind]}
        properties[parameter] = {**shape, "description": description}
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": block[0], "parameters": parameters},
    }


# A defect in a file, seen through the tools of one dialect. Each function gives the call and
# its result.

Seen = tuple[list[Any], str]


@dataclass(frozen=True)
class Case:
    block: Block

    def __getattr__(self, name: str) -> str:
        text: str = self.block[name]
        return text

    @property
    def lines(self) -> list[str]:
        return self.code.splitlines()

    @property
    def hits(self) -> str:
        found = [(n, text) for n, text in enumerate(self.lines, 1) if self.find in text]
        return "\n".join(f"{self.path}:{n}:{text}" for n, text in found)

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def diff(self) -> str:
        after = self.code.replace(self.old, self.new)
        hunks = difflib.unified_diff(
            self.code.splitlines(True),
            after.splitlines(True),
            f"a/{self.path}",
            f"b/{self.path}",
        )
        return "".join(hunks)

    def swap(self, text: str) -> str:
        """A text of this file, indented the other way."""
        if "\t" in self.code:
            return text.replace("\t", "    ")
        return text.replace("    ", "\t")

    @property
    def mistyped(self) -> str:
        """The text to replace, indented the other way."""
        return self.swap(self.old).rstrip("\n")


def numbered(lines: Sequence[str], gap: str = "  ", width: int = 0) -> str:
    return "\n".join(f"{n:>{width}}{gap}{line}".rstrip() for n, line in enumerate(lines, 1))


class Files:
    names = ("list_directory", "read_file", "edit_file", "search_text", "run_tests", "write_file")

    def search(self, case: Case) -> Seen:
        return ["search_text", {"query": case.find, "path": case.folder}], case.hits

    def read(self, case: Case) -> Seen:
        return ["read_file", {"path": case.path}], numbered(case.lines)

    def misread(self, path: str) -> Seen:
        return ["read_file", {"path": path}], f"error: {path}: no such file in the workspace"

    def edit(self, case: Case) -> Seen:
        old, new = case.old.rstrip("\n"), case.new.rstrip("\n")
        arguments = {"path": case.path, "old_text": old, "new_text": new}
        return ["edit_file", arguments], f"ok: 1 replacement in {case.path}"

    def misedit(self, case: Case) -> Seen:
        new = case.new.rstrip("\n")
        arguments = {"path": case.path, "old_text": case.mistyped, "new_text": new}
        return ["edit_file", arguments], f"error: old_text does not occur in {case.path}"

    def run(self, command: str, output: str) -> Seen:
        return ["run_tests", {"command": command}], output


class Bash(Files):
    names = ("bash", "file_info", "find_files", "search_docs")

    def search(self, case: Case) -> Seen:
        return ["bash", {"command": f"grep -rnF '{case.find}' {case.folder}"}], case.hits

    def read(self, case: Case) -> Seen:
        return ["bash", {"command": f"cat -n {case.path}"}], numbered(case.lines, "\t", 6)

    def misread(self, path: str) -> Seen:
        out = f"exit code 1\ncat: {path}: No such file or directory"
        return ["bash", {"command": f"cat -n {path}"}], out

    def edit(self, case: Case) -> Seen:
        return ["bash", {"command": f"git apply <<'EOF'\n{case.diff}EOF"}], "(no output)"

    def misedit(self, case: Case) -> Seen:
        wrong = _badly_indented(case)
        out = f"exit code 1\nerror: {case.path}: patch does not apply"
        return ["bash", {"command": f"git apply <<'EOF'\n{wrong}EOF"}], out

    def run(self, command: str, output: str) -> Seen:
        return ["bash", {"command": command, "timeout": 300}], output


class Views(Files):
    names = ("View", "Search", "Replace", "Run", "lint")

    def search(self, case: Case) -> Seen:
        arguments = {"regex": re.escape(case.find).replace("\\ ", " "), "glob": f"{case.folder}/**"}
        return ["Search", arguments], case.hits

    def read(self, case: Case) -> Seen:
        arguments = {"file": case.path, "from": 1, "count": 80}
        return ["View", arguments], f"{case.path} ({len(case.lines)} lines)\n" + case.code.rstrip()

    def misread(self, path: str) -> Seen:
        return ["View", {"file": path}], f"Error: cannot open {path}: file does not exist"

    def edit(self, case: Case) -> Seen:
        old, new = case.old.rstrip("\n"), case.new.rstrip("\n")
        return ["Replace", {"file": case.path, "old": old, "new": new}], "1 occurrence replaced"

    def misedit(self, case: Case) -> Seen:
        arguments = {"file": case.path, "old": case.mistyped, "new": case.new.rstrip("\n")}
        return ["Replace", arguments], "Error: 0 occurrences found, nothing was changed"

    def run(self, command: str, output: str) -> Seen:
        return ["Run", {"cmd": command, "reason": "Run the tests that belong to the file"}], output


class Editor(Files):
    names = ("str_replace_editor", "execute_bash")

    def search(self, case: Case) -> Seen:
        return ["execute_bash", {"command": f"git grep -nF '{case.find}'"}], case.hits

    def read(self, case: Case) -> Seen:
        head = f"The result of `cat -n` on {case.path}:\n"
        call = ["str_replace_editor", {"command": "view", "path": case.path}]
        return call, head + numbered(case.lines, "\t", 6)

    def misread(self, path: str) -> Seen:
        out = f"ERROR: the path {path} does not exist. Give a valid path."
        return ["str_replace_editor", {"command": "view", "path": path}], out

    def edit(self, case: Case) -> Seen:
        old, new = case.old.rstrip("\n"), case.new.rstrip("\n")
        first = case.code[: case.code.index(case.old)].count("\n") + 1
        shown = enumerate(new.splitlines(), first)
        snippet = "\n".join(f"{n:>6}\t{line}" for n, line in shown)
        arguments = {"command": "str_replace", "path": case.path, "old_str": old, "new_str": new}
        return (
            ["str_replace_editor", arguments],
            f"The file {case.path} has been edited. The changed lines:\n{snippet}",
        )

    def misedit(self, case: Case) -> Seen:
        arguments = {
            "command": "str_replace",
            "path": case.path,
            "old_str": case.mistyped,
            "new_str": case.new.rstrip("\n"),
        }
        out = f"ERROR: no replacement was made, old_str does not occur verbatim in {case.path}."
        return ["str_replace_editor", arguments], out

    def run(self, command: str, output: str) -> Seen:
        return ["execute_bash", {"command": command}], output


class Patches(Files):
    names = ("shell", "apply_patch", "git_diff")

    def search(self, case: Case) -> Seen:
        return ["shell", {"argv": ["rg", "-n", "-F", case.find, case.folder]}], case.hits

    def read(self, case: Case) -> Seen:
        return ["shell", {"argv": ["cat", case.path]}], case.code.rstrip("\n")

    def misread(self, path: str) -> Seen:
        out = f"exit code 1\ncat: {path}: No such file or directory"
        return ["shell", {"argv": ["cat", path]}], out

    def edit(self, case: Case) -> Seen:
        return ["apply_patch", {"patch": case.diff}], "applied: 1 file changed"

    def misedit(self, case: Case) -> Seen:
        wrong = _badly_indented(case)
        out = f"error: {case.path}: hunk 1 does not apply; nothing was changed"
        return ["apply_patch", {"patch": wrong}], out

    def run(self, command: str, output: str) -> Seen:
        argv = command.split()
        return ["shell", {"argv": argv, "timeout_ms": 300000}], output


def _badly_indented(case: Case) -> str:
    """The diff, with what it removes or keeps indented the other way."""
    head, *hunks = case.diff.partition("@@")
    lines = "".join(hunks).splitlines(True)
    kept = [line if line[0] in "+@" else line[0] + case.swap(line[1:]) for line in lines]
    return head + "".join(kept)


DIALECTS: tuple[Files, ...] = (Files(), Bash(), Views(), Editor(), Patches())

# What is typed first and fails, per language, before the command of the case.
MISTYPED_TESTS = {
    "python": ("pytest -q", "bash: pytest: command not found", "`pytest` is not on the path here"),
    "typescript": ("npm test", 'npm error Missing script: "test"', "There is no script `test`"),
    "go": ("gotestsum", "bash: gotestsum: command not found", "gotestsum is not installed"),
    "rust": ("cargo nextest run", "error: no such command: `nextest`", "nextest is not installed"),
    "java": ("./mvnw -q test", "./mvnw: No such file or directory", "There is no Maven wrapper"),
    "c": ("ctest", "No test configuration file found!", "This project does not use CMake"),
}

SYSTEMS = {
    "code": (
        "You are a coding agent. Change as little as needed and prove it by the tests.",
        "You work in a repository through tools. Read before you edit.",
        "You are a careful software engineer. Explain the cause before the cure.",
        "You fix defects. One defect, one edit, one test run. Report briefly.",
        "You are a terminal-based coding assistant. The repository is the current folder.",
        "Senior engineer on call for this code base. Never guess what a file holds: look.",
        "You repair software. End with what you changed, why, and what you left alone.",
    ),
    "office": (
        "You are a personal assistant. Times are local unless a zone is named.",
        "You help with calendar, messages and everyday questions. Answer briefly.",
        "You are a friendly assistant with tools. Use them only where they are needed.",
        "Assistant of a small company. You never send e-mails yourself, you draft them.",
        "You assist the user. If something is missing that you need, ask for it.",
    ),
    "data": (
        "You are a data analyst with a read-only connection. Give numbers with their period.",
        "You answer questions about the company's data. Never change any of it.",
        "You help with SQL and tables. Check the schema when you are not sure.",
        "Analyst's assistant. Results first, remarks after.",
    ),
    "ops": (
        "You operate a Kubernetes cluster. Look before you change anything.",
        "You are the on-call assistant. State what you saw and what it means.",
        "Platform assistant. Changes in production need the user's word.",
        "You watch over a few servers. Answer with facts from the tools.",
    ),
    "git": (
        "You help maintain a repository and its tracker.",
        "You are connected to the project's forge. Be exact about numbers and branches.",
        "Release assistant. You prepare, people decide.",
        "You look after issues, branches and CI of one project.",
    ),
    "dev": (
        "You are a developer's assistant inside an editor.",
        "You answer questions about the workspace by looking, not by guessing.",
        "Coding assistant. Short answers, exact paths.",
        "You help with a code base of several languages.",
    ),
    "chat": (
        "You are a helpful assistant.",
        "You explain software to developers. Be exact and brief.",
        "You are a patient tutor.",
        "You answer questions of colleagues. Plain words, an example where it helps.",
        "Answer in Markdown.",
        "You are an experienced engineer who mentors juniors.",
    ),
}
LOOK_UP = ("I look it up.", "Let me check.", "I check that.", "One look will tell.", "", "", "", "")
JOINED = (
    "{0}\n{1}",
    "Two things. {0} And: {1}",
    "1. {0}\n2. {1}",
    "{0} Also: {1}",
    "First: {0}\nSecond: {1}",
    "{0} And while you are at it: {1}",
)
NEXT = ("{}", "Next: {}", "Thanks. {}", "Good. {}", "And another one: {}", "Fine. {}")
TASKS = (
    "Task: {}\n\nKeep the change small and run the tests in the end.",
    "{}\n\nReproduce it first, then fix it. Do not change the tests.",
    "Please work on this until it is done; I will read your summary later.\n\n{}",
    "From the tracker:\n\n> {}\n\nThe failing test is in the repository already.",
    "{} There is a test for it that fails today.",
)


# The rows.


@dataclass
class Maker:
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))

    def __post_init__(self) -> None:
        def blocks(name: str) -> list[Block]:
            files = sorted(BLOCKS.glob(f"{name}*.yaml"))
            return [block for file in files for block in yaml.safe_load(file.read_text("utf-8"))]

        tools = yaml.safe_load((BLOCKS / "tools.yaml").read_text("utf-8"))
        self.tools = {name: _schema(name, block) for name, block in tools.items()}
        self.cases = [Case(block) for block in blocks("cases")]
        self.exchanges = blocks("exchanges")
        self.traces = blocks("traces")
        self.chats = blocks("chats")
        self.offered = blocks("offered")
        self.by_persona: dict[str, list[Block]] = {}
        for block in self.exchanges:
            self.by_persona.setdefault(block["p"], []).append(block)

    def row(
        self,
        about: str,
        messages: list[Message],
        extra: Sequence[str] = (),
        system: bool | None = None,
        offered: Sequence[str] = (),
    ) -> Row:
        """A row with the tools that it calls, those `offered`, some of `extra`, in any order."""
        names = list(dict.fromkeys([*called_in(messages), *offered]))
        others = [name for name in dict.fromkeys(extra) if name not in names]
        names += self.rng.sample(others, min(len(others), self.rng.randint(1, 4)))
        self.rng.shuffle(names)
        if system or (system is None and self.rng.random() < 0.75):
            prompt = self.rng.choice(SYSTEMS[about])
            messages = [{"role": "system", "content": prompt}, *messages]
        return {"messages": messages, "tools": [self.tools[name] for name in names]}

    def of_persona(self, persona: str, messages: list[Message], offered: Sequence[str] = ()) -> Row:
        extra = [block["t"] for block in self.by_persona[persona]]
        return self.row(persona, messages, extra, offered=offered)

    def of_code(self, dialect: Files, messages: list[Message], system: bool | None = None) -> Row:
        return self.row("code", messages, dialect.names, system)

    def shuffled(self, blocks: Sequence[Any]) -> list[Any]:
        return self.rng.sample(blocks, len(blocks))

    def asked(self, block: Block) -> list[Message]:
        """An exchange without its question."""
        say = self.rng.choice(LOOK_UP)
        return [*turn(say, [[block["t"], block["a"]]], [block["r"]]), answer(block["z"])]

    def single(self) -> Iterator[Row]:
        for block in self.shuffled(self.exchanges):
            yield self.of_persona(block["p"], [user(block["u"]), *self.asked(block)])

    def parallel(self) -> Iterator[Row]:
        for block in self.traces:
            if len(block["steps"]) == 1:
                yield self.whole(block)
        personas = cycle(sorted(self.by_persona))
        decks = {name: self.shuffled(blocks) for name, blocks in self.by_persona.items()}
        joined = cycle(JOINED)
        while True:
            persona = next(personas)
            deck = decks[persona]
            if len(deck) < 2:
                deck += self.shuffled(self.by_persona[persona])
            one, two = deck.pop(), deck.pop()
            if one is two:
                continue
            calls = [[block["t"], block["a"]] for block in (one, two)]
            say = self.rng.choice((*LOOK_UP, "I ask for both at once."))
            messages = [
                user(next(joined).format(one["u"], two["u"])),
                *turn(say, calls, [one["r"], two["r"]]),
                answer(f"{one['z']}\n\n{two['z']}"),
            ]
            yield self.of_persona(persona, messages)

    def whole(self, block: Block) -> Row:
        steps = [turn(step["s"], step["c"], step["r"]) for step in block["steps"]]
        messages = [user(block["u"]), *(m for step in steps for m in step), answer(block["z"])]
        return self.of_persona(block["p"], messages)

    def steps(self) -> Iterator[Row]:
        for block in self.traces:
            if len(block["steps"]) > 1:
                yield self.whole(block)
        for number, case in enumerate(self.shuffled(self.cases)):
            dialect = DIALECTS[number % len(DIALECTS)]
            yield self.of_code(dialect, [user(case.report), *self.repair(case, dialect)])

    def repair(self, case: Case, dialect: Files) -> list[Message]:
        """Read (or search and read), edit, test, say what was done."""
        (search, hits), (read, text) = dialect.search(case), dialect.read(case)
        (edit, edited), (run, passed) = dialect.edit(case), dialect.run(case.test, case.passed)
        shape = self.rng.randrange(3)
        if shape == 0:
            looking = turn(f"I read `{case.path}` first.", [read], [text])
        elif shape == 1:
            looking = turn("", [search, read], [hits, text])
        else:
            looking = [
                *turn("I look for the place.", [search], [hits]),
                *turn("", [read], [text]),
            ]
        return [
            *looking,
            *turn(case.cause, [edit], [edited]),
            *turn("", [run], [passed]),
            answer(case.done),
        ]

    def after_error(self) -> Iterator[Row]:
        failing = [block for block in self.exchanges if "bad" in block]
        for block in self.shuffled(failing):
            arguments, error, say = block["bad"]
            messages = [
                user(block["u"]),
                *turn(self.rng.choice(LOOK_UP), [[block["t"], arguments]], [error]),
                *turn(say, [[block["t"], block["a"]]], [block["r"]]),
                answer(block["z"]),
            ]
            yield self.of_persona(block["p"], messages)
        stumbles = (self.wrong_path, self.wrong_text, self.wrong_runner)
        for number, case in enumerate(self.shuffled(self.cases)):
            dialect = DIALECTS[(number + 2) % len(DIALECTS)]
            stumble: Callable[[Case, Files], list[Message]] = stumbles[number % len(stumbles)]
            yield self.of_code(dialect, [user(case.report), *stumble(case, dialect)])

    def wrong_path(self, case: Case, dialect: Files) -> list[Message]:
        name = case.path.rsplit("/", 1)[1]
        guess = f"{case.project}/{name}" if case.folder != case.project else f"src/{name}"
        missed, error = dialect.misread(guess)
        search, hits = dialect.search(case)
        read, text = dialect.read(case)
        edit, edited = dialect.edit(case)
        return [
            *turn("", [missed], [error]),
            *turn("My guess of the path was wrong, so I search.", [search], [hits]),
            *turn("", [read], [text]),
            *turn(case.cause, [edit], [edited]),
            answer(f"{_first(case.done)} I have not run the tests yet; that is `{case.test}`."),
        ]

    def wrong_text(self, case: Case, dialect: Files) -> list[Message]:
        if case.mistyped == case.old.rstrip("\n"):  # nothing in it is indented
            return self.wrong_runner(case, dialect)
        read, text = dialect.read(case)
        missed, error = dialect.misedit(case)
        edit, edited = dialect.edit(case)
        run, passed = dialect.run(case.test, case.passed)
        kept, written = ("tabs", "blanks") if "\t" in case.code else ("blanks", "tabs")
        return [
            *turn(f"I open `{case.path}`.", [read], [text]),
            *turn(case.cause, [missed], [error]),
            *turn(f"The file indents with {kept}, and I wrote {written}.", [edit], [edited]),
            *turn("Now the tests.", [run], [passed]),
            answer(case.done),
        ]

    def wrong_runner(self, case: Case, dialect: Files) -> list[Message]:
        command, error, why = MISTYPED_TESTS[case.lang]
        read, text = dialect.read(case)
        edit, edited = dialect.edit(case)
        code = 127 if error.endswith(("command not found", "No such file or directory")) else 1
        missed, failed = dialect.run(command, f"exit code {code}\n{error}")
        run, passed = dialect.run(case.test, case.passed)
        return [
            *turn("", [read], [text]),
            *turn(case.cause, [edit], [edited]),
            *turn("", [missed], [failed]),
            *turn(f"{why}; `{case.test}` is the way.", [run], [passed]),
            answer(case.done),
        ]

    def task(self) -> Iterator[Row]:
        for number, case in enumerate(self.shuffled(self.cases)):
            dialect = DIALECTS[(number + 4) % len(DIALECTS)]
            (search, hits), (read, text) = dialect.search(case), dialect.read(case)
            (run, failed), (edit, edited) = dialect.run(case.test, case.failed), dialect.edit(case)
            passed = case.passed
            whole = case.test.split(" -Dtest")[0]
            messages = [
                user(TASKS[number % len(TASKS)].format(case.report)),
                *turn("I look for the place in the code.", [search], [hits]),
                *turn("", [read], [text]),
                *turn("Before I change anything I run the tests.", [run], [failed]),
                *turn(f"That reproduces it. {case.cause}", [edit], [edited]),
                *turn("", [run], [passed]),
            ]
            if number % 2:
                again, shown = dialect.read(_after(case))
                messages += turn("A last look at the result.", [again], [shown])
            summaries = (
                f"**Cause.** {case.cause}\n\n**Change.** {case.done}",
                f"{case.done}\n\nChanged: `{case.path}`. Checked with `{case.test}`.",
                f"Done.\n\n- Cause: {case.cause}\n- Result: {case.done}",
                f"{case.cause}\n\n{case.done}\n\nTo repeat the check: `{whole}`",
            )
            yield self.of_code(dialect, [*messages, answer(summaries[number % 4])], system=True)

    def none_called(self) -> Iterator[Row]:
        for block in self.shuffled(self.offered):
            yield self.of_persona(block["s"], _turns(block), block.get("t", ()))

    def chat(self) -> Iterator[Row]:
        for block in self.shuffled(self.chats):
            yield self.without_tools(_talk(block["c"]))

    def without_tools(self, messages: list[Message]) -> Row:
        return self.row("chat", messages) | {"tools": []}

    def long(self) -> Iterator[Row]:
        """In turn: several defects of one project, a day with an assistant, a long chat."""
        code = self.long_code()
        kinds = cycle((code, self.long_day(), self.long_chat(), code))
        for kind in kinds:
            yield next(kind)

    def long_code(self) -> Iterator[Row]:
        projects: dict[str, list[Case]] = {}
        for case in self.cases:
            projects.setdefault(case.project, []).append(case)
        for number, project in enumerate(cycle(sorted(projects))):
            dialect = DIALECTS[(3 * number + 1) % len(DIALECTS)]
            cases = self.shuffled(projects[project])[:4]
            messages: list[Message] = []
            for place, case in enumerate(cases):
                form = NEXT[0] if place == 0 else self.rng.choice(NEXT[1:])
                messages += [user(form.format(case.report)), *self.repair(case, dialect)]
            files = "\n".join(f"- `{case.path}`: {_first(case.done)}" for case in cases)
            messages += [
                user(self.rng.choice(("Sum up what you changed today.", "List your changes."))),
                answer(f"{len(cases)} files, one change each:\n\n{files}"),
            ]
            yield self.of_code(dialect, messages, system=True)

    def long_day(self) -> Iterator[Row]:
        for persona in cycle(sorted(self.by_persona)):
            blocks = self.shuffled(self.by_persona[persona])[: self.rng.randint(10, 11)]
            asides = self.shuffled([block for block in self.offered if block["s"] == persona])
            messages: list[Message] = []
            offered: list[str] = []
            for place, block in enumerate(blocks):
                messages += [user(block["u"]), *self.asked(block)]
                if place % 4 == 3:
                    aside = asides.pop()
                    messages += _turns(aside)
                    offered += aside.get("t", ())
            yield self.row(persona, messages, system=True, offered=offered)

    def long_chat(self) -> Iterator[Row]:
        topics: dict[str, list[Block]] = {}
        for block in self.chats:
            topics.setdefault(block["t"], []).append(block)
        names = sorted(topics)
        for number in range(len(names)):
            messages: list[Message] = []
            for step in (0, 4, 9, 11, 6):
                if sum(len(message["content"]) for message in messages) < LONG_CHAT:
                    for block in self.shuffled(topics[names[(number + step) % len(names)]]):
                        messages += _talk(block["c"])
            yield self.without_tools(messages)


def _after(case: Case) -> Case:
    """The case with its file as it is after the edit."""
    return Case(case.block | {"code": case.code.replace(case.old, case.new)})


def _first(text: str) -> str:
    """The first sentence."""
    return text.split(". ")[0].rstrip(".") + "."


def _talk(texts: Sequence[str]) -> list[Message]:
    return [answer(text) if n % 2 else user(text) for n, text in enumerate(texts)]


def _turns(block: Block) -> list[Message]:
    return _talk([block[key] for key in ("q", "a", "q2", "a2") if key in block])


def made_rows(kept: Sequence[Row]) -> list[Row]:
    """What the rows that are there leave to be made, in mixed order."""
    maker, have = Maker(), Counter(kind_of(row) for row in kept)
    made = []
    for kind, wanted in WANTED.items():
        rows = getattr(maker, kind)()
        for _ in range(wanted - have[kind]):
            row = next(rows)
            if kind_of(row) != kind:
                raise ValueError(f"made for {kind}, is {kind_of(row)}: {row['messages'][:2]}")
            made.append(row)
    maker.rng.shuffle(made)
    return made


def main() -> int:
    lines = FORMAT.read_text("utf-8").splitlines()[:HAND_WRITTEN]
    rows = made_rows([json.loads(line) for line in lines])
    bad = [f"{fault}: {row['messages']}" for row in rows for fault in faults(row)]
    lines += [json.dumps(row, ensure_ascii=False) for row in rows]
    if bad or len(set(lines)) < len(lines):
        sys.stderr.write("\n".join([*bad, f"{len(lines) - len(set(lines))} rows are repeated\n"]))
        return 1
    FORMAT.write_text("\n".join(lines) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
