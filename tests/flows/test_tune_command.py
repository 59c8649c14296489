"""`crane tune`: what it prints, how it ends, and that kill -9 costs one trial."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyPair
from crane_process import KILL, crane, stopped

Pairs = Callable[[str], TinyPair]
BUDGET = 5


@pytest.fixture(scope="module")
def pair(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A random pair with enough held-out rows."""
    pair = pairs("qwen3").copy(tmp_path_factory.mktemp("tune") / "pair")
    for kind in ("reasoning", "agent"):
        rows = [{"messages": [{"role": "user", "content": f"{kind} {i}"}], "completion": f"{i}."}
                for i in range(20)]  # fmt: skip
        (pair.folder / f"heldout_{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return pair


def command(pair: TinyPair, folder: Path, *more: object) -> list[object]:
    """The search into a folder."""
    return ["tune", pair.recipe_file, "--budget", BUDGET, "--store", folder / "store",
            "--output", folder / "found", *more]  # fmt: skip


def trials(folder: Path) -> int:
    """How many trials the journal holds."""
    logs = list((folder / "store" / "tune").glob("*.journal"))
    return logs[0].read_text().count('"record"') if logs else 0


@pytest.mark.slow
def test_a_killed_search_goes_on_to_what_it_would_have_found(
    pair: TinyPair, tmp_path: Path
) -> None:
    places = tmp_path / "killed", tmp_path / "whole"
    for place in places:
        place.mkdir()
    args = command(pair, places[0], "--json")
    assert stopped(places[0], args, lambda: trials(places[0]) >= 2, KILL).code == -KILL
    # The trial whose record was the last line need not have been told: it is chosen again.
    later = crane(places[0], *args).json()
    whole = crane(places[1], *command(pair, places[1], "--json")).json()
    assert 1 <= later["known"] < BUDGET and whole["known"] == 0
    for one in (later, whole):
        assert len(one["points"]) == BUDGET and one["recipe"] is not None
    assert [(p["key"], p["metrics"]) for p in later["points"]] == [
        (p["key"], p["metrics"]) for p in whole["points"]
    ]
    assert later["unseen"] == whole["unseen"]
    again = crane(places[0], *command(pair, places[0]))
    assert again.code == 0 and "This search is finished" in again.err
    assert "task_arithmetic" in again.out and "best.yaml" in again.out


def test_what_cannot_be_kept_ends_with_1_and_bad_input_with_2(
    pair: TinyPair, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    args = command(pair, tmp_path, "--require", "reasoning_loss<=0.001", "--budget", 1)
    ended = crane(tmp_path, *args)
    assert ended.code == 1 and "No point meets reasoning_loss <= 0.001. Nearest" in ended.err
    assert not (tmp_path / "found" / "best.yaml").exists()
    refused = crane(tmp_path, *command(pair, tmp_path, "--budget", 0))
    assert refused.code == 2 and len(refused.err.strip().splitlines()) == 1
