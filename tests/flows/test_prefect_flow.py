"""The same merge as a Prefect flow: same bits, same stages, and the UI sees what was reused."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors

from artifacts.store import Store
from artifacts.tensors import chunk_files
from flows.merge import STAGES, merge

# Prefect's own imports and its server warn of many things that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
Pairs = Callable[[str], TinyPair]


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """A Prefect server of its own with a database of its own."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


def run(pair: TinyPair, folder: Path) -> Any:
    """The merge as a flow."""
    from flows.prefect_flow import run_merge

    return run_merge(
        str(pair.recipe_file),
        alpha=0.4,
        tau=None,
        assignments=["name=as-a-flow"],
        output=str(folder / "out"),
        store=str(folder / "store"),
        force=False,
    )


def task_runs(done: set[UUID]) -> list[Any]:
    """The task runs that the server knows, in the order of their start, but those of before."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_task_runs()
    fresh = [r for r in found if r.id not in done]
    done |= {r.id for r in found}
    return sorted(fresh, key=lambda r: r.start_time)


def test_the_flow_gives_the_same_bits_and_shows_what_was_reused(
    server: None, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3")
    done: set[UUID] = set()
    task_runs(done)
    first = run(pair, tmp_path)
    assert [b.ref.stage for b in first.stages] == list(STAGES)
    assert {b.status for b in first.stages} == {"computed"}
    seen = task_runs(done)
    assert {r.name for r in seen} == set(STAGES)
    assert {r.state.name for r in seen} == {"Completed"}

    again = run(pair, tmp_path)
    assert {b.status for b in again.stages} == {"reused"}
    seen = task_runs(done)
    assert sorted(r.name for r in seen) == sorted(STAGES)
    assert {(r.state.name, r.state.type.value) for r in seen} == {("Cached", "COMPLETED")}

    recipe = pair.recipe("alpha=0.4", "name=as-a-flow", f"run.output={tmp_path / 'plain'}")
    plain = merge(recipe, Store(tmp_path / "other"))
    ours, theirs = again.as_json(), plain.as_json()
    for part in ("scores", "edit", "evaluation"):
        assert ours[part] == theirs[part]
    assert [s["key"] for s in ours["stages"]] == [s["key"] for s in theirs["stages"]]
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_failing_stage_fails_the_flow_with_its_own_error(
    server: None, pairs: Pairs, tmp_path: Path
) -> None:
    from crane_tasks.errors import CheckpointError

    pair = pairs("qwen3").copy(tmp_path / "pair")
    tensors = load_tensors(pair.donor)
    tensors["model.norm.weight"][0] = float("nan")
    save_tensors(pair.donor, tensors)
    with pytest.raises(CheckpointError, match=r"NaN.*model\.norm\.weight"):
        run(pair, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_damaged_artifact_is_computed_again_within_the_flow(
    server: None, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3")
    first = run(pair, tmp_path)
    before = load_tensors(tmp_path / "out")
    path = next(b.path for b in first.stages if b.ref.stage == "threshold")
    chunk_files(path / "data.zarr" / "layer.0" / "tensors")[0].unlink()
    shutil.rmtree(tmp_path / "out")
    again = run(pair, tmp_path)
    status = {b.ref.stage: b.status for b in again.stages}
    assert {s for s in STAGES if status[s] != "reused"} == {"threshold", "apply"}
    found = load_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], before[name]) for name in before)
