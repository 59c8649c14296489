"""The official code's switches, and what it found its merges to do, on the reference pairs.

`behaviour.txt` has mean token losses on 200 held-out rows: `nllR` reasoning, `nllT` agent; of CRANE
at four alphas and two other taus, of task arithmetic, and of CRANE without its projector.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from artifacts.store import Store
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.recipe_file import load_recipe
from crane_tasks.session import Session
from flows.sweep import sweep

# The script's router and head; in its tokenizer's place every row of the head moves.
OFFICIAL = {"router": "slerp"}
HEAD = {"lm_head": {"scale": 0.03, "keep_special": False}}  # where it is not the embedding
ROWS = {
    **{f"crane_a{alpha}": (alpha, 0.03, {}) for alpha in (0.25, 0.5, 0.75, 1.0)},
    **{f"crane_a0.5_tau{tau}": (0.5, tau, {}) for tau in (0.003, 0.3)},
    **{f"ta_a{a}": (a, 0.03, {"method": "task_arithmetic"}) for a in (0.25, 0.5, 0.75)},
    "nogsp_a0.5": (0.5, 0.03, {"projection": "none"}),
}


def behaviours(reference: Path) -> dict[str, dict[str, float]]:
    """The numbers of `behaviour.txt` by row."""
    lines = (reference / "official" / "behaviour.txt").read_text().splitlines()
    matches = (re.match(r"(\S+)\s+(\{.*?\})", line) for line in lines)
    return {m[1]: ast.literal_eval(m[2]) for m in matches if m}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """A folder per pair, made when it is first asked for."""

    class Folders(dict[Path, Path]):
        def __missing__(self, pair: Path) -> Path:
            self[pair] = tmp_path_factory.mktemp(pair.name)
            return self[pair]

    return Folders()


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_switch_does_what_it_does_in_the_official_code(
    row: str, reference: Path, stores: dict[Path, Path]
) -> None:
    alpha, tau, changes = ROWS[row]
    folder = stores[reference]
    head = {} if Checkpoint.open(reference / "base").tied else HEAD
    data: dict[str, Any] = {
        "name": "behaviour",
        "base": str(reference / "base"),
        "donor": str(reference / "donor"),
        "alpha": alpha,
        "tau": tau,
        "calibration": {
            kind: {"data": str(reference / f"{kind}.jsonl")}
            for kind in ("reasoning", "agent", "format")
        },
        "merge": {**OFFICIAL, **head, **changes},
        "evaluate": {
            kind: str(reference / f"heldout_{kind}.jsonl") for kind in ("reasoning", "agent")
        },
        "run": {"device": "cpu"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    session = Session(load_recipe(file), Store(folder / "store"))
    found = sweep(session, folder=folder / "grid").points[0].metrics
    official = behaviours(reference)[row]
    assert found["reasoning_loss"] == pytest.approx(official["nllR"], rel=0.03, abs=0.005)
    assert found["agent_loss"] == pytest.approx(official["nllT"], rel=0.04, abs=0.005)
