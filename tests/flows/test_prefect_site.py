"""The real thing: a Prefect server, a worker and the deployments, as `crane ui` starts them."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import NAMES, TinyPair
from crane_process import reached
from prefect_site import Site, end_family, running, wait_until

from artifacts.store import Store
from crane_tasks.session import Session
from flows.merge import merge
from flows.prefect.processes import AT_ONCE

Pairs = Callable[[str], TinyPair]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Job:
    """A merge of a random pair into a folder of its own."""

    pair: TinyPair
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def parameters(self, **more: Any) -> dict[str, Any]:
        """As the form gives them."""
        return {
            "recipe_file": str(self.pair.recipe_file),
            "output": str(self.output),
            "advanced": {"store": str(self.store), "overrides": ["run.shard_size=20KB"]},
            **more,
        }

    def undisturbed(self) -> dict[str, bytes]:
        """What the merge gives when nobody disturbs it."""
        place = self.folder / "undisturbed"
        recipe = self.pair.recipe(f"run.output={place}", "run.shard_size=20KB")
        merge(Session(recipe, Store(self.folder / "other")))
        return files(place)


@pytest.fixture
def job(pairs: Pairs, tmp_path: Path) -> Job:
    return Job(pairs("qwen3"), tmp_path)


def on_disk(store: Path) -> dict[str, str]:
    """What the next run must say of each stage, from what lies in the store."""
    found = {}
    for stage in NAMES:
        if stage == "calibration":  # three artifacts in one stage
            continue
        if any((store / stage).glob("[!.]*/manifest.json")):
            found[stage] = "Cached"
        elif any(log.read_bytes() for log in (store / stage).glob(".draft-*/units.jsonl")):
            found[stage] = "Resumed"
        else:
            found[stage] = "Completed"
    return found


def killed_in_scores(site: Site, job: Job) -> str:
    """Start a merge and kill -9 its process while it scores; the run's id."""
    run = site.start("merge", **job.parameters())
    process = wait_until(lambda: site.flow_process(run), "the flow's process")
    wait_until(reached(job.store, "scores", 1), f"a scored layer\n{site.log}", pause=0.001)
    process.kill()
    return run


@dataclass(frozen=True)
class Retried:
    """A merge that was killed, seen, and retried until it was done."""

    job: Job
    run: str
    seen: str
    wanted: dict[str, str]
    kept: dict[Path, int]


@pytest.fixture(scope="module")
def retried(site: Site, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Retried:
    job = Job(pairs("qwen3"), tmp_path_factory.mktemp("retried"))
    run = killed_in_scores(site, job)
    seen = site.state(run)
    assert not job.output.exists()
    wanted = on_disk(job.store)
    kept = {p: p.stat().st_ino for p in job.store.glob("*/*/manifest.json")}
    site.retry(run)
    assert site.state(run) == "Completed", site.logs(run)
    return Retried(job, run, seen, wanted, kept)


def test_a_run_whose_process_was_killed_shows_as_crashed_and_a_retry_finishes_it(
    site: Site, retried: Retried
) -> None:
    job, wanted = retried.job, retried.wanted
    assert retried.seen == "Crashed"
    assert wanted["delta"] == "Cached" and wanted["apply"] == "Completed"
    # Of each attempt: a busy worker may report the crash once more after the retry, which Prefect
    # then runs twice, and the second finds all of it done.
    found = site.attempts(retried.run)
    assert all(state in found[f"tiny-random: {stage}"] for stage, state in wanted.items()), found
    assert all(p.stat().st_ino == inode for p, inode in retried.kept.items()), "computed again"
    assert files(job.output) == job.undisturbed()


def test_the_report_is_an_artifact_with_its_pictures_inside(site: Site, retried: Retried) -> None:
    found = site.artifacts(retried.run)
    text = found["tiny-random-report"]["data"]
    assert text.count("](data:image/png;base64,") == 4
    assert str(retried.job.output) in text
    rows = json_rows(found["tiny-random-evaluation"])
    assert list(rows[0]) == ["metric", "base", "donor", "merged"]
    assert rows[0]["metric"] == "reasoning loss" and "(" in rows[0]["merged"]
    layers = [row["layer"] for row in json_rows(found["tiny-random-scores"])]
    assert layers == ["0", "1", "all"]
    bars = {k: a["data"] for k, a in found.items() if a["type"] == "progress"}
    assert bars["tiny-random-apply-progress"] == bars["tiny-random-evaluate-progress"] == 100.0
    lines = ("delta: reused in", "scores: started", "scores: resumed in", str(retried.job.output))
    # A run's process hands its log over behind its state.
    wait_until(lambda: all(line in site.logs(retried.run) for line in lines), f"{lines} in the log")


def json_rows(artifact: dict[str, Any]) -> list[dict[str, Any]]:
    """A table artifact's rows."""
    data = artifact["data"]
    rows: list[dict[str, Any]] = json.loads(data) if isinstance(data, str) else data
    return rows


@pytest.mark.slow
def test_a_wrong_value_is_refused_by_the_form_or_at_once(site: Site, job: Job) -> None:
    for wrong in ({"alpha": -1}, {"tau": 0}, {"recipe": "crane-31b"}):
        refused = site.submit("merge", **wrong)
        assert refused.status_code == 409, refused.text
        assert next(iter(wrong)) in refused.text
    wrong_key = {"overrides": ["projector.rnk=3"], "store": str(job.store)}
    run = site.start("merge", **job.parameters(advanced=wrong_key))
    assert site.state(run) == "Failed"
    assert "projector.rnk: unknown key" in site.run(run)["state"]["message"]
    assert "Traceback" not in site.logs(run)
    assert not job.store.exists()


@pytest.mark.slow
def test_two_runs_never_work_at_the_same_time_and_a_swept_point_is_not_computed_again(
    site: Site, job: Job
) -> None:
    grid = {k: v for k, v in job.parameters().items() if k != "output"}
    grid |= {"alphas": [0.5, 0.25], "taus": [0.03], "output": str(job.folder / "grid")}
    runs = [site.start("sweep", **grid), site.start("sweep", **grid)]
    assert [site.state(run) for run in runs] == ["Completed", "Completed"]
    first, second = sorted((site.run(run) for run in runs), key=lambda r: r["start_time"])
    assert second["start_time"] >= first["end_time"]
    points = [s for n, s in site.tasks(second["id"]).items() if ": point " in n]
    assert points == ["Cached", "Cached"]
    table = json_rows(site.artifacts(second["id"])["tiny-random-sweep"])
    assert [row["alpha"] for row in table] == ["base", "donor", "0.5", "0.25"]
    assert "data:image/png" in site.artifacts(second["id"])["tiny-random-sweep-report"]["data"]


@pytest.mark.slow
def test_any_checkpoint_is_evaluated(site: Site, job: Job) -> None:
    parameters = {k: v for k, v in job.parameters().items() if k != "output"}
    run = site.start("evaluate", checkpoint=str(job.pair.donor), **parameters)
    assert site.state(run) == "Completed", site.logs(run)
    rows = json_rows(site.artifacts(run)["tiny-random-evaluation"])
    assert rows and all(row["checkpoint"] == row["donor"] for row in rows)


def test_schedules_come_paused_and_the_pool_takes_one_run_at_a_time(site: Site) -> None:
    schedules = [s for d in site.find("deployments") for s in d["schedules"]]
    assert {s["slug"] for s in schedules} == {"nightly-crane-30b", "weekly-crane-next-80b"}
    assert not any(s["active"] for s in schedules)
    assert site.get("/work_pools/crane")["concurrency_limit"] == 1
    assert [a["name"] for a in site.find("automations")] == ["crane: mark dead runs as crashed"]


def test_a_taken_port_is_named_and_nothing_is_left_running(site: Site, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("crane"), "ui", "--port", str(site.port)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"port {site.port} is taken" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_when_everything_was_killed_the_run_is_marked_dead_and_finished_by_a_retry(
    job: Job, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    with running(folder) as site:
        run = killed_in_scores_with_all(site, job)
    with running(folder) as site:
        assert site.run(run)["state"]["name"] == "Running"
        assert site.state(run) == "Crashed"
        assert "No sign of life" in site.run(run)["state"]["message"]
        site.retry(run)
        assert site.state(run) == "Completed", site.logs(run)
    assert files(job.output) == job.undisturbed()


def killed_in_scores_with_all(site: Site, job: Job) -> str:
    """The same, with the server, the worker and `crane ui` itself: as when the power fails."""
    run = site.start("merge", **job.parameters())
    wait_until(reached(job.store, "scores", 1), "a scored layer", pause=0.001)
    end_family(site.process.pid)
    return run


@pytest.mark.slow
def test_a_worker_that_is_killed_alone_is_replaced_and_its_run_retried(
    job: Job, tmp_path: Path
) -> None:
    with running(tmp_path / "own") as site:
        family = psutil.Process(site.process.pid).children()
        worker = next(p for p in family if "worker" in p.cmdline())
        # One that ends at once after its start would end again: `crane ui` ends with it.
        wait_until(lambda: time.time() - worker.create_time() > AT_ONCE, "an old enough worker")
        run = site.start("merge", **job.parameters())
        wait_until(reached(job.store, "scores", 1), "a scored layer", pause=0.001)
        worker.kill()
        assert site.state(run) == "Crashed", site.logs(run)
        site.retry(run)  # by the worker that took over
        assert site.state(run) == "Completed", site.logs(run)
        assert "another one takes over" in site.log
    assert files(job.output) == job.undisturbed()


@pytest.mark.slow
def test_ctrl_c_stops_a_run_and_leaves_no_process(job: Job, tmp_path: Path) -> None:
    with running(tmp_path / "own") as site:
        run = site.start("merge", **job.parameters())
        wait_until(lambda: site.flow_process(run), "the flow's process")
        family = psutil.Process(site.process.pid).children(recursive=True)
        site.process.send_signal(signal.SIGINT)
        assert site.process.wait(120) == 0
        assert [p for p in family if p.is_running() and p.status() != "zombie"] == []
    with running(tmp_path / "own") as site:
        assert site.state(run) == "Crashed"
