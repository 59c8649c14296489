"""Answers by a server that was started for them: the same answers, and no process is left."""

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
    theirs = merged(pair, tmp_path / "store", tmp_path / "out", *GIVEN, engine(serve))
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


def test_a_sweep_has_nothing_to_serve(pairs: Pairs, tmp_path: Path) -> None:
    from tiny_merge import asked

    command = engine("true {checkpoint} {port}")
    session = asked(pairs("qwen3"), tmp_path / "store", *GIVEN, command)
    with pytest.raises(RecipeError, match="serves checkpoints, and points are none"):
        sweep(session, [0.3], [0.03], folder=tmp_path / "sweep")
