"""Make the shipped held-out rows that say what a right answer is.

Run ``python tests/make_graded_rows.py``: it writes ``graded_reasoning.jsonl`` and
``graded_agent.jsonl`` of ``flows/recipes/data`` from fixed seeds, the same bytes each time. Every
answer is computed: programs are run, puzzles are solved by trying everything, and a defect is one
that tests find. Kinds follow one another in turn, so that the first rows are of all kinds.
"""

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "flows" / "recipes" / "data"
Row = dict[str, Any]
NAMES = ("Ada", "Ben", "Cleo", "Dev", "Elif", "Finn", "Gita", "Hugo")
SYSTEM = "You are a coding agent. Use the tools where they are needed; otherwise answer in text."


def asked(text: str, answer: Row) -> Row:
    return {"messages": [{"role": "user", "content": text}], "answer": answer}


# Reasoning: {a}, {b}, {c} are small numbers.
PROGRAMS = (
    "total = 0\nfor i in range({a}, {b}):\n    if i % {c} == 1:\n        total += i\n    else:\n"
    "        total -= 1\nprint(total)",
    "x, y = {a}, {b}\nwhile y:\n    x, y = y, x % y + ({c} if x > 40 else 0)\n    if x > 60:\n"
    "        break\nprint(x * 10 + y)",
    "stack = []\nfor n in range({b}):\n    if n % {c} == 0 and stack:\n        stack.pop()\n"
    "    else:\n        stack.append(n + {a})\nprint(sum(stack[-3:]))",
    "def f(n):\n    return {a} if n < 2 else f(n - 1) + {c} * f(n - 2)\n\nprint(f({b} % 6 + 4))",
    "seen = {{}}\nfor i, c in enumerate('abracadabra' * {c}):\n"
    "    seen[c] = seen.get(c, 0) + i % {a}\nprint(seen['a'] - seen['b'] + {b})",
    "grid = [[(r * {a} + c * {b}) % {c}7 for c in range(4)] for r in range(4)]\n"
    "print(sum(grid[i][3 - i] for i in range(4)))",
)


def ran(program: str) -> str:
    said: list[str] = []
    # The programs are the ones above.
    exec(program, {"print": lambda value: said.append(str(value))})
    return said[0]


def program_output(draw: random.Random) -> Row:
    program = draw.choice(PROGRAMS).format(
        a=draw.randint(2, 9), b=draw.randint(10, 30), c=draw.randint(2, 5)
    )
    question = "What does this Python program print? Give the number alone behind your reasoning."
    return asked(f"{question}\n\n```python\n{program}\n```", {"number": int(ran(program))})


CLUES: tuple[tuple[str, Callable[[Sequence[str], str, str], bool]], ...] = (
    ("{x} finished before {y}.", lambda o, x, y: o.index(x) < o.index(y)),
    ("{x} finished directly after {y}.", lambda o, x, y: o.index(x) == o.index(y) + 1),
    ("{x} and {y} did not finish next to each other.",
     lambda o, x, y: abs(o.index(x) - o.index(y)) > 1),
    ("{x} finished two places ahead of {y}.", lambda o, x, y: o.index(x) + 2 == o.index(y)),
)  # fmt: skip


def order_puzzle(draw: random.Random) -> Row:
    """Clues are added until one order of five is left."""
    people = draw.sample(NAMES, 5)
    truth, left, clues = draw.sample(people, 5), list(itertools.permutations(people)), list[str]()
    while len(left) > 1:
        (text, holds), (x, y) = draw.choice(CLUES), draw.sample(people, 2)
        rest = [order for order in left if holds(order, x, y)]
        if holds(truth, x, y) and len(rest) < len(left):
            clues.append(text.format(x=x, y=y))
            left = rest
    place = draw.randint(1, 5)
    question = (
        f"{', '.join(people)} ran a race, no two together. {' '.join(clues)} "
        f"Who came in as number {place}? Answer with the name alone."
    )
    return asked(question, {"text": truth[place - 1]})


def arithmetic(draw: random.Random) -> Row:
    """What a build costs, in several steps."""
    jobs, minutes, share = draw.randint(12, 60), draw.randint(3, 14), draw.choice((20, 25, 40, 50))
    runners, price, days = draw.randint(2, 6), draw.randint(2, 9), draw.randint(5, 22)
    cached = jobs * share // 100
    total = (jobs - cached) * minutes + cached
    question = (
        f"A pipeline has {jobs} jobs of {minutes} minutes each. {share} % of the jobs, rounded "
        f"down, are found in the cache and take 1 minute. The runners are billed {price} cents for "
        f"each minute of a job; besides, each of the {runners} runners costs 15 cents a day. The "
        f"pipeline runs once a day. How many cents are billed for {days} days?"
    )
    return asked(question, {"number": days * (total * price + runners * 15)})


# Sound functions, each with defects: (line, what it becomes), and calls that tell.
DEFECTS: tuple[tuple[str, tuple[tuple[int, str], ...], tuple[str, ...]], ...] = (
    ("def last_index(items, wanted):\n    found = -1\n    for i in range(len(items)):\n"
     "        if items[i] == wanted:\n            found = i\n    return found",
     ((2, "    found = 0"), (3, "    for i in range(len(items) - 1):"),
      (5, "            return i")),
     ("last_index([1, 2, 1], 1)", "last_index([1], 2)", "last_index([4, 4], 4)")),
    ("def binary_search(a, x):\n    low, high = 0, len(a)\n    while low < high:\n"
     "        mid = (low + high) // 2\n        if a[mid] < x:\n            low = mid + 1\n"
     "        else:\n            high = mid\n    return low",
     ((2, "    low, high = 0, len(a) - 1"), (5, "        if a[mid] <= x:"),
      (9, "    return low - 1")),
     ("binary_search([1, 3, 5], 9)", "binary_search([1, 3, 5], 3)", "binary_search([2], 0)")),
    ("def merge(a, b):\n    out, i, j = [], 0, 0\n    while i < len(a) and j < len(b):\n"
     "        if a[i] <= b[j]:\n            out.append(a[i]); i += 1\n        else:\n"
     "            out.append(b[j]); j += 1\n    return out + a[i:] + b[j:]",
     ((3, "    while i < len(a) and j < len(b) - 1:"), (4, "        if a[i] >= b[j]:"),
      (8, "    return out + a[i:] + b[j + 1:]")),
     ("merge([1, 4], [2, 3])", "merge([], [1])", "merge([1, 5], [2, 9, 9])")),
    ("def word_counts(text):\n    counts = {}\n    for word in text.lower().split():\n"
     "        word = word.strip('.,!?')\n        if word:\n"
     "            counts[word] = counts.get(word, 0) + 1\n    return counts",
     ((3, "    for word in text.split():"), (4, "        word = word.lstrip('.,!?')"),
      (6, "            counts[word] = counts.get(word, 1) + 1")),
     ("word_counts('A a, b!')", "word_counts('x. x')", "word_counts('... a')")),
    ("def running_mean(values, width):\n    means = []\n"
     "    for end in range(width, len(values) + 1):\n"
     "        window = values[end - width:end]\n        means.append(sum(window) / width)\n"
     "    return means",
     ((3, "    for end in range(width, len(values)):"),
      (4, "        window = values[end - width:end - 1]"),
      (5, "        means.append(sum(window) // width)")),
     ("running_mean([1, 2, 4], 2)", "running_mean([5], 1)", "running_mean([1, 2, 3, 5], 3)")),
)  # fmt: skip


def outcome(program: str, call: str) -> str:
    names: Row = {}
    exec(program, names)
    try:
        return repr(eval(call, names))
    except Exception as error:
        return type(error).__name__


def defect(draw: random.Random) -> Row:
    """One line is wrong; the calls show what it gives and what it should."""
    sound, changes, calls = draw.choice(DEFECTS)
    number, changed = draw.choice(changes)
    lines = sound.splitlines()
    lines[number - 1] = changed
    broken = "\n".join(lines)
    told = [
        f"- `{call}` gives {outcome(broken, call)}, and should give {outcome(sound, call)}."
        for call in draw.sample(calls, len(calls))
        if outcome(broken, call) != outcome(sound, call)
    ]
    assert told, (broken, calls)
    code = "\n".join(f"{n}: {line}" for n, line in enumerate(lines, start=1))
    pad = draw.choice(("a review", "a failing build", "a bug report", "a night of fuzzing"))
    question = (
        f"After {pad} we know that one line of this function is wrong:\n\n```\n{code}\n```\n\n"
        + "\n".join(told)
        + "\n\nWhich line has to change? Give its number alone behind your reasoning."
    )
    return asked(question, {"number": number})


EXPRESSIONS = (
    "[x for x in range({n}) if x % {m} == 0][-1]", "len(set(x % {m} for x in range({n})))",
    "sum(divmod({n}, {m}))", "int(str({n})[::-1]) % {m}", "bin({n}).count('1') * {m}",
    "sorted(str({n} * {m}))[-1]", "({n} ^ {m}) & 15", "max(map(int, str({n} ** 2))) - {m}",
)  # fmt: skip


def expression(draw: random.Random) -> Row:
    """Which of four expressions has a value that the others have not."""
    while True:
        n, m = draw.randint(13, 90), draw.randint(3, 9)
        four = draw.sample(EXPRESSIONS, 4)
        values = [str(eval(text.format(n=n, m=m))) for text in four]
        if len(set(values)) == 4:
            break
    right = draw.randrange(4)
    options = "\n".join(
        f"{letter}) `{text.format(n=n, m=m)}`" for letter, text in zip("ABCD", four, strict=True)
    )
    question = f"Which of these Python expressions has the value {values[right]}?\n\n{options}\n\n"
    return asked(question + "Answer with the letter.", {"choice": "ABCD"[right]})


# Agent rows.
def tool(name: str, about: str, required: Sequence[str], **fields: Any) -> Row:
    parameters = {"type": "object", "properties": fields, "required": list(required)}
    return {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": parameters},
    }


def text(about: str, **more: Any) -> Row:
    return {"type": "string", "description": about, **more}


def whole(about: str) -> Row:
    return {"type": "integer", "description": about}


TOOLS = {
    "read_file": tool(
        "read_file", "Read a text file of the workspace.", ["path"],
        path=text("Path relative to the workspace root."),
        start_line=whole("First line to read."), end_line=whole("Last line to read.")),
    "list_files": tool(
        "list_files", "List the files of a folder.", ["folder"], folder=text("Relative path."),
        recursive={"type": "boolean", "description": "Also folders below; default false."}),
    "search": tool(
        "search", "Search the workspace for a literal text.", ["query"], query=text("The text."),
        glob=text("Only files that match, e.g. *.py")),
    "run_tests": tool(
        "run_tests", "Run the tests of a path.", ["path"], path=text("File or folder."),
        keyword=text("Only tests whose name contains this.")),
    "run_command": tool(
        "run_command", "Run a shell command.", ["command"], command=text("The command line."),
        timeout=whole("Seconds; default 60.")),
    "git_log": tool(
        "git_log", "The last commits.", ["count"], count=whole("How many."),
        path=text("Only those that touch it.")),
    "set_config": tool(
        "set_config", "Set a configuration value.", ["key", "value"], key=text("Dotted key."),
        value={"description": "Any JSON value."}),
    "delete_file": tool("delete_file", "Delete a file.", ["path"], path=text("Relative path.")),
}  # fmt: skip
PATHS = ("src/app.py", "src/db/models.py", "lib/cache.ts", "cmd/serve/main.go", "docs/setup.md",
         "tests/test_login.py", "pkg/queue/worker.rs", "scripts/deploy.sh")  # fmt: skip
FOLDERS = ("src", "tests", "lib/plugins", "docs", "infra/k8s")
WORDS = ("TODO", "max_retries", "parse_date", "deprecated", "SELECT *", "getUser", "timeout=30")
KEYS = ("server.port", "log.max_files", "cache.ttl_seconds", "db.pool_size")


def call(name: str, **arguments: Any) -> Row:
    return {"name": name, "arguments": arguments}


def one_need(draw: random.Random) -> tuple[str, Row]:
    """A request that one call answers, and the call with its alternatives."""
    path, folder, word = draw.choice(PATHS), draw.choice(FOLDERS), draw.choice(WORDS)
    first = draw.randint(1, 80)
    last, count, key = first + draw.randint(5, 40), draw.randint(2, 15), draw.choice(KEYS)
    span = {"start_line": [1, None], "end_line": [None]}
    return draw.choice((
        (f"Show me {path}.", call("read_file", path=path, **span)),
        (f"Show me lines {first} to {last} of {path}.",
         call("read_file", path=path, start_line=first, end_line=last)),
        (f"What files are directly in the folder {folder}?",
         call("list_files", folder=[folder, f"./{folder}", f"{folder}/"], recursive=[False, None])),
        (f"List everything below {folder}, with all folders in it.",
         call("list_files", folder=[folder, f"./{folder}", f"{folder}/"], recursive=True)),
        (f"Where in the workspace does the text `{word}` stand?",
         call("search", query=word, glob=["*", "**/*", None])),
        (f"Find `{word}` in the Python files.",
         call("search", query=word, glob=["*.py", "**/*.py"])),
        (f"Run the tests in {path}.", call("run_tests", path=path, keyword=[None])),
        (f"Run only those tests in tests/ whose name contains {word.split('=')[0].split()[0]}.",
         call("run_tests", path=["tests", "tests/"], keyword=word.split("=")[0].split()[0])),
        (f"What were the last {count} commits?", call("git_log", count=count, path=[None])),
        (f"Which {count} commits were the last that touched {path}?",
         call("git_log", count=count, path=path)),
        (f"Set {key} to {first}.", call("set_config", key=key, value=[first])),
        (f"Run `make build` and give it {last * 10} seconds.",
         call("run_command", command="make build", timeout=last * 10)),
    ))  # fmt: skip


def offered(draw: random.Random, *needed: str) -> list[Row]:
    """The tools that are needed and some others, in any order."""
    others = [name for name in TOOLS if name not in needed]
    names = [*needed, *draw.sample(others, draw.randint(2, 4))]
    return [TOOLS[name] for name in draw.sample(sorted(set(names)), len(set(names)))]


def turns(*said: tuple[str, Any]) -> list[Row]:
    found: list[Row] = [{"role": "system", "content": SYSTEM}]
    for role, content in said:
        if role == "calls":
            calls = [{"type": "function", "function": c} for c in content]
            found.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            found.append({"role": role, "content": content})
    return found


def single(draw: random.Random) -> Row:
    need, wanted = one_need(draw)
    tools = offered(draw, wanted["name"])
    return {"messages": turns(("user", need)), "tools": tools, "calls": [wanted]}


def parallel(draw: random.Random) -> Row:
    needs: list[tuple[str, Row]] = []
    while len(needs) < draw.randint(2, 3):
        need = one_need(draw)
        if need[1] not in [n[1] for n in needs]:
            needs.append(need)
    told = "Do these at once, in one turn:\n" + "\n".join(f"- {need}" for need, _ in needs)
    wanted = [one for _, one in needs]
    tools = offered(draw, *(one["name"] for one in wanted))
    return {"messages": turns(("user", told)), "tools": tools, "calls": wanted}


def after_result(draw: random.Random) -> Row:
    """The second call follows from what the first one gave."""
    word, line = draw.choice(WORDS), draw.randint(3, 90)
    path = draw.choice([p for p in PATHS if not p.startswith("tests")])
    failing = f"test_{draw.choice(('login', 'retry', 'export', 'dates'))}_{draw.randint(1, 9)}"
    told, first, result, wanted = draw.choice((
        (f"Find the file that contains `{word}` and show it to me whole.",
         call("search", query=word), f"{path}:{line}: {word}",
         call("read_file", path=path, start_line=[1, None], end_line=[None])),
        ("Run the tests in tests/. If exactly one fails, run that one again, by its name.",
         call("run_tests", path="tests/"), f"12 passed, 1 failed: {failing}",
         call("run_tests", path=["tests", "tests/"], keyword=failing)),
        ("Look into docs and delete the only file there that ends with .bak.",
         call("list_files", folder="docs"), f"setup.md\nold-{line}.bak\nindex.md",
         call("delete_file", path=f"docs/old-{line}.bak")),
        (f"Read {path}; if it cannot be found, list the folder src.",
         call("read_file", path=path), f"error: {path}: no such file",
         call("list_files", folder=["src", "src/", "./src"], recursive=[False, None])),
    ))  # fmt: skip
    messages = turns(("user", told), ("calls", [first]), ("tool", result))
    return {"messages": messages, "tools": offered(draw, first["name"], wanted["name"]),
            "calls": [wanted]}  # fmt: skip


NEEDLESS = (
    "What does the HTTP status code {n} mean, roughly? Answer from memory.",
    "Thanks, that was all for now.", "Write a haiku about line {n} of a log file.",
    "Explain in two sentences what a race condition is.",
    "How would you name a function that returns the first {n} primes? Only give the name.",
    "Please book a table for {n} people tonight.", "Translate 'file not found' into French.",
    "Is O(n log n) faster than O(n^2) for {n} million items? Yes or no.",
)  # fmt: skip


def needless(draw: random.Random) -> Row:
    need = draw.choice(NEEDLESS).format(n=draw.choice((3, 5, 7, 12, 200, 404, 503)))
    return {"messages": turns(("user", need)), "tools": offered(draw), "calls": []}


def as_json(draw: random.Random) -> Row:
    name, port = draw.choice(NAMES), draw.randint(1024, 9999)
    tags = draw.sample(("urgent", "backend", "ui", "docs", "flaky", "security"), 2)
    about = f"{name} reported that port {port} is closed; tags are {tags[0]} and {tags[1]}."
    fields = {
        "reporter": {"const": name}, "port": {"const": port},
        "tags": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"enum": tags}},
    }  # fmt: skip
    chosen = sorted(draw.sample(sorted(fields), draw.randint(2, 3)))
    schema = {
        "type": "object", "required": chosen, "additionalProperties": False,
        "properties": {key: fields[key] for key in chosen},
    }  # fmt: skip
    told = (
        f"{about}\nSay this as one JSON object with the keys {', '.join(chosen)} and no others. "
        "Answer with the JSON alone."
    )
    return {"messages": turns(("user", told)), "answer": {"json-schema": schema}}


def marked(draw: random.Random) -> Row:
    number, word = draw.randint(10, 99), draw.choice(("RESULT", "VERDICT", "DONE", "STATUS"))
    told, pattern = draw.choice((
        (f"Reply with exactly one line: {word}: followed by a blank and the number {number}.",
         rf"\A{word}: {number}\Z"),
        (f"Reply with {word} between two dollar signs, and nothing else.", rf"\A\${word}\$\Z"),
        (f"Write a unified diff that changes the only line of a.txt from {number} to {number + 1}. "
         "Put it into one fenced block marked diff, with nothing around it.",
         rf"\A```diff\n(?s:.)*^-{number}$\n^\+{number + 1}$(?s:.)*```\Z"),
        (f"Name the steps build, test, ship as a numbered list of three lines, one word each, and "
         f"a last line that is {word}.", rf"\A1\. build\n2\. test\n3\. ship\n{word}\Z"),
    ))  # fmt: skip
    return {
        "messages": turns(("user", told)),
        "answer": {"regex": f"(?m){pattern}"},
    }


SETS: dict[str, dict[Callable[[random.Random], Row], int]] = {
    "graded_reasoning": {
        program_output: 30, order_puzzle: 25, arithmetic: 25, defect: 15, expression: 25,
    },
    "graded_agent": {
        single: 40, parallel: 20, after_result: 20, needless: 20, as_json: 30, marked: 20,
    },
}  # fmt: skip


def made_rows(name: str) -> list[Row]:
    """The rows of a set; no prompt is there twice."""
    draw = random.Random(name)
    kinds: list[list[Row]] = []
    seen: set[str] = set()
    for kind, count in SETS[name].items():
        own: list[Row] = []
        while len(own) < count:
            row = kind(draw)
            if (prompt := json.dumps(row["messages"])) not in seen:
                seen.add(prompt)
                own.append(row)
        kinds.append(own)
    # In turn, and each kind spread over the whole.
    placed = [
        ((n + 0.5) / len(own), place, row)
        for place, own in enumerate(kinds)
        for n, row in enumerate(own)
    ]
    return [row for *_, row in sorted(placed, key=lambda p: p[:2])]


def main() -> None:
    for name in SETS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made_rows(name)]
        (DATA / f"{name}.jsonl").write_text("".join(lines))
        sys.stdout.write(f"{name}: {len(lines)} rows\n")


if __name__ == "__main__":
    main()
