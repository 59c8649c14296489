"""Stages on two processes of a real Dask cluster: the same bits as in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair, load_tensors
from prefect_site import wait_until

from artifacts.store import Store
from crane_tasks.errors import RecipeError
from crane_tasks.session import Session
from flows.merge import Merged, merge
from flows.opening import open_session
from flows.sweep import sweep

pytestmark = pytest.mark.filterwarnings("ignore")
PRELOAD = ["distributed", "prefect_dask", "flows.prefect.flows", "flows.sweep", "matplotlib.pyplot",
           "transformers.models.qwen3_moe.modeling_qwen3_moe"]  # fmt: skip
GRID = {"alphas": [0.2, 0.4], "taus": [0.01]}


@pytest.fixture(scope="module", autouse=True)
def warm_workers() -> Iterator[None]:
    """Dask's workers are forked from one process that has imported what they need."""
    import dask
    from distributed.utils import get_mp_context

    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(PRELOAD)
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A scheduler with two worker processes, as two machines would have one each."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as found:
        yield str(found.scheduler_address)


def unit_names() -> list[str]:
    """The names of the units that workers were given."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [run.name for run in client.read_task_runs() if "unit" in run.task_key]


def spread_merge(pair: TinyPair, workers: str, store: Path, output: Path, *more: str) -> Merged:
    from flows.prefect.flows import merge_in_prefect

    changes = [f"run.workers={workers}", "run.shard_size=60000", *more]
    file = str(pair.recipe_file)
    return merge_in_prefect(open_session(file, changes, output=output, store=store), file, changes)


def numbers(store: Path) -> dict[str, Any]:
    """What the finished artifacts hold, by stage and key."""
    place = Store(store)
    found = {}
    for path in place.artifacts():
        artifact = place.open_path(path)
        found[str(path.relative_to(store))] = {
            (unit, name): artifact.read(unit, name).flatten().tolist()
            for unit in artifact.units()
            for name in artifact.arrays(unit)
        }
    return found


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one_process(
    moe_pair: TinyPair, server: None, cluster: str, tmp_path: Path
) -> None:
    spread = spread_merge(moe_pair, cluster, tmp_path / "s2", tmp_path / "o2")
    recipe = moe_pair.recipe(f"run.output={tmp_path / 'o1'}", "run.shard_size=60000")
    alone = merge(Session(recipe, Store(tmp_path / "s1")))
    ours, theirs = load_tensors(tmp_path / "o1"), load_tensors(tmp_path / "o2")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].equal(theirs[n]) for n in ours)
    assert repr(numbers(tmp_path / "s1")) == repr(numbers(tmp_path / "s2"))  # NaN is NaN
    assert spread.evaluation["models"] == alone.evaluation["models"]
    # The server hears of them a while after the flow's end.
    for stage in ("delta", "threshold", "apply", "evaluate"):
        wait_until(lambda s=stage: any(f": {s} 2 of " in n for n in unit_names()), stage)


@pytest.mark.slow
def test_points_of_a_sweep_are_measured_by_workers(
    moe_pair: TinyPair, server: None, tmp_path: Path
) -> None:
    """By a cluster that the run starts itself, from the number of processes."""
    from flows.prefect.flows import result_of, sweep_flow
    from flows.prefect.forms import SweepSettings

    settings = SweepSettings(overrides=["run.workers=2"], store=str(tmp_path / "s2"))
    state = sweep_flow(
        recipe_file=str(moe_pair.recipe_file), **GRID, output=str(tmp_path / "o2"),
        advanced=settings, return_state=True,
    )  # fmt: skip
    found = result_of(state)
    alone = sweep(
        Session(moe_pair.recipe(), Store(tmp_path / "s1")), GRID["alphas"], GRID["taus"],
        folder=tmp_path / "o1",
    )  # fmt: skip
    assert [p.status for p in found.points] == ["computed", "computed"]
    assert [p.metrics for p in found.points] == [p.metrics for p in alone.points]


def test_no_scheduler_is_said_in_one_line(moe_pair: TinyPair, server: None, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.workers: no Dask scheduler answers at tcp://"):
        spread_merge(moe_pair, "tcp://127.0.0.1:1", tmp_path / "s", tmp_path / "o")
    assert not (tmp_path / "o").exists()
