"""Several merges into one folder at once: no evaluation is kept under another merge's key."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair
from crane_process import crane, script

from artifacts.store import Store
from crane_tasks.evaluate.stage import read_comparison

ALPHAS = (0.2, 0.5, 0.8, 1.1)


def comparisons(store: Path) -> dict[str, Any]:
    """What every finished comparison of a store says of the merged model, by key."""
    place = Store(store)
    return {
        path.name: read_comparison(place.open_path(path))["models"]["merged"]
        for path in place.artifacts("evaluate")
    }


@pytest.mark.slow
def test_racing_merges_never_store_each_others_evaluation(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    common = ["merge", moe_pair.recipe_file, "--store", tmp_path / "store", "--json"]
    alone: dict[float, str] = {}
    for alpha in ALPHAS:
        ended = crane(tmp_path, *common, "--alpha", alpha, "--output", tmp_path / f"out{alpha}")
        alone[alpha] = next(s["key"] for s in ended.json()["stages"] if s["name"] == "evaluate")
    wanted = comparisons(tmp_path / "store")
    assert len({repr(metrics) for metrics in wanted.values()}) == len(ALPHAS)
    # What is raced for is to be made anew; the stages before it are there.
    for stage in ("apply", "evaluate", "measure"):
        shutil.rmtree(tmp_path / "store" / stage)

    race = ["--output", tmp_path / "out", "--force"]
    running = {a: script(tmp_path, *common, "--alpha", a, *race) for a in ALPHAS}
    ended_by = {}
    for alpha, process in running.items():
        out, err = process.communicate()
        ended_by[alpha] = (process.returncode, out, err)
    for code, out, err in ended_by.values():
        assert code == 0 or (code == 2 and out == "" and "by another run" in err), err
    won = [alpha for alpha, (code, *_) in ended_by.items() if code == 0]
    stored = comparisons(tmp_path / "store")
    assert stored.keys() >= {alone[alpha] for alpha in won}
    for key, metrics in stored.items():
        assert metrics == wanted[key]
    for alpha in won:
        assert (
            json.loads(ended_by[alpha][1])["evaluation"]["models"]["merged"] == wanted[alone[alpha]]
        )
    kept = json.loads((tmp_path / "out" / "crane.json").read_text())["recipe"]["alpha"]
    assert kept in won
