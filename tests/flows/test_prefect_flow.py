"""The same merge as a Prefect flow: same bits, same stages, and the UI sees what was reused."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from conftest import NAMES, TinyPair, load_tensors, save_tensors
from prefect_graph import task_runs
from prefect_site import free_port

from artifacts.store import Store
from artifacts.tensors import chunk_files
from crane_tasks.session import Session
from flows.merge import merge
from flows.opening import open_session

# Prefect's own imports and its server warn of many things that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
Pairs = Callable[[str], TinyPair]


def run(pair: TinyPair, folder: Path) -> Any:
    """The merge as a flow."""
    from flows.prefect.flows import merge_in_prefect

    changes, file = ["name=as-a-flow"], str(pair.recipe_file)
    place = {"output": folder / "out", "store": folder / "store"}
    return merge_in_prefect(open_session(file, changes, alpha=0.4, **place), file, changes)


def test_the_flow_gives_the_same_bits_and_shows_what_was_reused(
    server: None, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3")
    done: set[UUID] = set()
    task_runs(done)
    first = run(pair, tmp_path)
    assert [b.ref.stage for b in first.stages] == list(NAMES)
    assert {b.status for b in first.stages} == {"computed"}
    seen = task_runs(done, len(NAMES) + 1)
    names = [f"as-a-flow: {stage}" for stage in NAMES]
    assert sorted(r.name for r in seen) == sorted([*names, "as-a-flow: inputs"])
    assert {r.state.name for r in seen} == {"Completed"}

    again = run(pair, tmp_path)
    assert {b.status for b in again.stages} == {"reused"}
    seen = task_runs(done, len(NAMES) + 1)
    cached = {r.name: r.state.type.value for r in seen if r.state.name == "Cached"}
    assert cached == dict.fromkeys(names, "COMPLETED")

    recipe = pair.recipe("alpha=0.4", "name=as-a-flow", f"run.output={tmp_path / 'plain'}")
    plain = merge(Session(recipe, Store(tmp_path / "other")))
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


def test_a_server_that_is_not_there_is_one_readable_line(pairs: Pairs, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    command = [Path(sys.executable).with_name("crane"), "merge", pairs("qwen3").recipe_file]
    ended = subprocess.run(
        [*map(str, command), "--store", str(tmp_path / "store")],
        cwd=tmp_path,
        env=os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert url in ended.stderr and "crane ui" in ended.stderr and "--no-prefect" in ended.stderr
    assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "store" / "delta").exists()


class Flaky:
    """Work that fails some times before it succeeds."""

    def __init__(self, times: int, error: Exception) -> None:
        self.calls, self._times, self._error = 0, times, error

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return "done"


def attempt(work: Flaky) -> Any:
    """Run work as a task of a flow, with three further attempts at once."""
    from prefect import flow, task
    from prefect.states import Completed

    from flows.prefect.tasks import OPTIONS, refusing, result_of
    from flows.prefect.tasks import attempt as attempted

    @task(name="work", **OPTIONS | {"retry_delay_seconds": [0.0, 0.0, 0.0]})
    def once() -> Any:
        return attempted("work", lambda: Completed(data=work()))

    @flow(name="attempts", persist_result=False)
    def attempts() -> Any:
        return refusing(lambda: result_of(once(return_state=True)))

    return attempts(return_state=True)


def test_a_full_disk_is_tried_again_a_bounded_number_of_times(server: None) -> None:
    from flows.prefect.tasks import result_of

    full = OSError(errno.ENOSPC, "No space left on device", "/store")
    freed = Flaky(2, full)
    assert result_of(attempt(freed)) == "done" and freed.calls == 3
    never = Flaky(100, full)
    state = attempt(never)
    assert never.calls == 4
    assert state.name == "Failed" and "No space left on device: '/store'" in state.message
    with pytest.raises(OSError, match="/store"):
        result_of(state)


def test_bad_input_is_told_once_and_never_tried_again(server: None) -> None:
    from crane_tasks.errors import DataError
    from flows.prefect.tasks import result_of

    done: set[UUID] = set()
    task_runs(done)
    wrong = Flaky(1, DataError("rows.jsonl, line 3: no messages"))
    state = attempt(wrong)
    assert wrong.calls == 1
    assert state.message == "rows.jsonl, line 3: no messages"
    told = [r.state.message for r in task_runs(done, 1)]
    assert told == ["work: rows.jsonl, line 3: no messages"]
    with pytest.raises(DataError):
        result_of(state)


@pytest.mark.slow
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
    assert {s for s in NAMES if status[s] != "reused"} == {"threshold", "apply"}
    found = load_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], before[name]) for name in before)
