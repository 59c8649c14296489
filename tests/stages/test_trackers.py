"""What a tracker may do to a sweep: nothing. A real one: test_wheel.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyPair
from tiny_merge import asked

from crane_tasks.errors import RecipeError
from flows.sweep import sweep

Pairs = Callable[[str], TinyPair]
BROKEN = "def init(**kwargs):\n    print('hello')\n    raise ConnectionError('no way there')\n"


def test_a_tracker_that_is_not_installed_is_refused_first(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as Python says that there is none
    session = asked(pairs("qwen3"), tmp_path / "store", "run.tracker=mlflow")
    with pytest.raises(RecipeError, match=r"pip install 'crane-merge\[mlflow\]'"):
        sweep(session, [0.1, 0.2], folder=tmp_path / "grid")
    assert not (tmp_path / "store").exists()


def test_a_tracker_that_fails_costs_no_point(
    pairs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "trackio.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    told: list[str] = []
    changes = ("run.tracker=trackio", "evaluate.generate=0")
    session = asked(pairs("qwen3"), tmp_path / "store", *changes, notice=told.append)
    found = sweep(session, [0.1, 0.2], folder=tmp_path / "grid")
    monkeypatch.delitem(sys.modules, "trackio")
    assert [point.status for point in found.points] == ["computed", "computed"]
    assert [text for text in told if "trackio" in text] == [
        "trackio takes no more points of this run: no way there"
    ]
    assert capsys.readouterr().out == "", "the command's output is the result alone"
