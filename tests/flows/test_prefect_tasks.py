"""The stages as tasks of a flow of one's own, as the documents show it."""

import re
import shutil
from pathlib import Path
from uuid import UUID

import pytest
from conftest import NAMES, TinyPair
from prefect_graph import edges, task_runs

from crane_tasks.errors import CraneError
from crane_tasks.method import keys_of
from crane_tasks.session import open_context
from flows.opening import open_session

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENT = Path(__file__).parents[2] / "docs" / "prefect.md"


def example() -> str:
    """The flow that the document shows."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return next(block for block in blocks if "@flow" in block)


def test_the_flow_of_the_document_runs_and_its_graph_is_the_pipeline(
    server: None, moe_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known: set[UUID] = set()
    task_runs(known)
    code = example().replace('"tiny"', repr(str(moe_pair.recipe_file)))
    exec(compile(code, str(DOCUMENT), "exec"), {"__name__": "mine"})
    runs = {r.task_key.split("-")[0]: r for r in task_runs(known, 1 + len(NAMES))}
    assert runs.keys() == {"inputs", *NAMES}
    assert {r.state.name for r in runs.values()} == {"Completed"}
    assert edges(runs) == {
        "inputs": set(),
        "calibration": {"inputs"},
        "delta": {"inputs"},
        "threshold": {"inputs", "delta"},
        "scores": {"inputs", "delta", "calibration"},
        "projector": {"inputs", "calibration"},
        "apply": {"inputs", "delta", "threshold", "scores", "projector"},
        "evaluate": {"inputs", "apply"},
    }
    ctx = open_context(open_session(str(moe_pair.recipe_file)))
    keys = keys_of(ctx)
    assert all(ctx.store.has(keys.refs[name]) for name in NAMES if name != "calibration")
    assert list((tmp_path / "merged").glob("*/config.json"))


def test_the_graph_of_a_merge_is_the_pipeline(
    server: None, moe_pair: TinyPair, tmp_path: Path
) -> None:
    from flows.prefect.flows import merge_in_prefect

    known: set[UUID] = set()
    task_runs(known)
    file = str(moe_pair.recipe_file)
    place = {"output": tmp_path / "out", "store": tmp_path / "store"}
    merge_in_prefect(open_session(file, **place), file, [])
    runs = {r.task_key.split("-")[0]: r for r in task_runs(known, 1 + len(NAMES))}
    graph = edges(runs)
    assert graph["scores"] >= {"delta", "calibration"}
    assert graph["apply"] >= {"threshold", "scores", "projector"}
    assert graph["evaluate"] >= {"apply"}


def test_a_task_without_its_inputs_says_what_it_wants(
    server: None, moe_pair: TinyPair, tmp_path: Path
) -> None:
    from prefect import flow

    from flows.prefect.tasks import inputs, result_of, threshold

    @flow
    def forgetful() -> None:
        ctx = inputs(open_session(str(moe_pair.recipe_file), store=tmp_path / "store"))
        threshold(ctx)

    with pytest.raises(CraneError, match=r"^give it what the task `delta` gave$"):
        forgetful()
    with pytest.raises(CraneError):
        result_of(forgetful(return_state=True))


def test_a_flow_whose_first_task_fails_fails_itself(
    server: None, moe_pair: TinyPair, tmp_path: Path
) -> None:
    from prefect import flow

    from flows.prefect.tasks import delta, inputs

    pair = tmp_path / "pair"
    shutil.copytree(moe_pair.recipe_file.parent, pair)
    (pair / "donor" / "config.json").unlink()

    @flow
    def doomed() -> None:
        delta(inputs(open_session(str(pair / moe_pair.recipe_file.name), store=tmp_path / "store")))

    state = doomed(return_state=True)
    assert state.is_failed() and str(pair / "donor") in str(state.message)
