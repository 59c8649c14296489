"""Answers by a server that was started for them: the same answers, and no process is left."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import TinyPair
from tiny_merge import merged

from crane_tasks.errors import EndpointError, RecipeError
from crane_tasks.evaluate.stage import answered_by_merge
from flows.sweep import sweep

Pairs = Callable[[str], TinyPair]
SCRIPT = Path(__file__).parents[1] / "serve_checkpoint.py"
GIVEN = ("evaluate.generate=2", "evaluate.max_new_tokens=6")


# It asks the server, and tells what only the checkpoint's own folder says.
BENCHMARK = """
import json, sys, urllib.request
endpoint, output, checkpoint = sys.argv[1:]
with urllib.request.urlopen(endpoint + "/models") as answer:
    assert json.load(answer)["data"]
layers = json.load(open(checkpoint + "/config.json"))["num_hidden_layers"]
json.dump({"scores": [{"layers": layers}]}, open(output, "w"))
"""


def engine(command: str) -> str:
    return f"evaluate.engine={{serve: {command!r}}}"


def left(script: Path) -> list[int]:
    """Processes that run the script."""
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])
    ]


@pytest.mark.slow
def test_a_servers_answers_are_those_of_this_process(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3")
    serve = f"{shlex.quote(sys.executable)} {SCRIPT} {{checkpoint}} {{port}}"
    ours = merged(pair, tmp_path / "store", tmp_path / "out", *GIVEN)
    program = tmp_path / "benchmark.py"
    program.write_text(BENCHMARK)
    command = f"{shlex.quote(sys.executable)} {program} {{endpoint}} {{output}} {{checkpoint}}"
    suite = {"name": "mine", "command": command, "metric": "scores.0.layers"}
    given = (*GIVEN, engine(serve), f"evaluate.suites={json.dumps([suite])}")
    theirs = merged(pair, tmp_path / "store", tmp_path / "out", *given)
    layers = theirs.ctx.pair().base.num_layers
    for name in ("base", "donor", "merged"):
        assert theirs.evaluation["suites"][name]["results"] == {"mine": {"layers,none": layers}}
    assert ours.keys.refs["evaluate"].key != theirs.keys.refs["evaluate"].key
    rows = answered_by_merge(theirs.ctx, theirs.keys)
    assert rows == answered_by_merge(ours.ctx, ours.keys) and len(rows) == 4
    assert left(SCRIPT) == []


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("echo {checkpoint}", RecipeError, "{port} is not in the command"),
        ("no-such-server {checkpoint} {port}", RecipeError, "no-such-server is not installed"),
        ("sh 'unclosed {checkpoint} {port}", RecipeError, "is no command"),
        ("sh -c \"echo out of luck; exit 3\" {checkpoint} {port}", EndpointError,
         "ended with 3 before it was ready: ...out of luck"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_serve_is_told_with_its_words(
    command: str, error: type[Exception], message: str, pairs: Pairs, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        merged(pairs("qwen3"), tmp_path / "store", tmp_path / "out", *GIVEN, engine(command))
    assert (tmp_path / "out").exists() is (error is EndpointError), "what was merged is kept"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sh 'unclosed {output}", "mine: is no command"),
        ("sh -c true", "mine: {output} is not in the command"),
        ("no-such-program {output}", "mine: no-such-program is not installed"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused_first(
    command: str, message: str, pairs: Pairs, tmp_path: Path
) -> None:
    suite = {"name": "mine", "command": command, "metric": "score"}
    given = (engine("true {checkpoint} {port}"), f"evaluate.suites={json.dumps([suite])}")
    with pytest.raises(RecipeError, match=message):
        merged(pairs("qwen3"), tmp_path / "store", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_a_sweep_has_nothing_to_serve(pairs: Pairs, tmp_path: Path) -> None:
    from tiny_merge import asked

    command = engine("true {checkpoint} {port}")
    session = asked(pairs("qwen3"), tmp_path / "store", *GIVEN, command)
    with pytest.raises(RecipeError, match="serves checkpoints, and points are none"):
        sweep(session, [0.3], [0.03], folder=tmp_path / "sweep")
