"""What a schedule runs once it is switched on, and that it stays on when all is deployed again."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyPair
from prefect_site import Site, running, wait_until

from flows.prefect.deployments import read_deployments
from flows.prefect.processes import UiError

Pairs = Callable[[str], TinyPair]
EACH_MINUTE, EACH_YEAR = "* * * * *", "0 0 1 1 *"


def deployment(name: str, slug: str = "", cron: str = EACH_YEAR, **parameters: Any) -> Any:
    """A sweep as prefect.yaml has it, with a schedule that is off."""
    found = {
        "name": name,
        "entrypoint": "flows.prefect.flows.sweep_flow",
        "work_pool": {"name": "crane", "job_variables": {"env": {"CRANE_FOLDER": "{{ $PWD }}"}}},
        "enforce_parameter_schema": True,
        "parameters": parameters,
    }
    schedule = {"slug": slug, "cron": cron, "timezone": "UTC", "active": False}
    return found | ({"schedules": [schedule]} if slug else {})


def write(folder: Path, *deployments: Any) -> Path:
    """A prefect.yaml of these."""
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump({"name": "test", "pull": [], "deployments": deployments}))
    return file


def deployed_again(site: Site) -> None:
    """What `crane ui` does once more, without another server."""
    env = os.environ | {"PREFECT_API_URL": f"{site.url}/api", "PREFECT_HOME": str(site.home)}
    command = [sys.executable, "-P", "-m", "flows.prefect.deployments"]
    done = subprocess.run(command, cwd=site.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def switches(site: Site) -> dict[str, dict[str, bool]]:
    """Of every deployment its schedules, and whether they are on."""
    return {
        d["name"]: {s["slug"]: s["active"] for s in d["schedules"]}
        for d in site.find("deployments")
    }


def switch(site: Site, name: str, on: bool) -> None:
    """As the page does, and `prefect deployment schedule resume`: nothing but `active` is sent."""
    found = site.deployment(name, "sweep")
    path = f"/deployments/{found['id']}/schedules/{found['schedules'][0]['id']}"
    site.api("PATCH", path, {"active": on}).raise_for_status()


@pytest.fixture(scope="module")
def own_site(tmp_path_factory: pytest.TempPathFactory, pairs: Pairs) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("scheduled")
    grid: dict[str, Any] = {
        "recipe_file": str(pairs("qwen3").recipe_file),
        "alphas": [0.5, 0.25],
        "taus": [0.03],
        "advanced": {"store": str(folder / "store")},
    }
    often = deployment("nightly", "nightly", EACH_MINUTE, **grid)
    write(folder, often, deployment("sweep", "yearly", **grid), deployment("other", "never"))
    with running(folder) as site:
        yield site


@pytest.mark.slow
def test_a_schedule_that_was_switched_on_runs_its_own_grid(own_site: Site) -> None:
    site = own_site
    switch(site, "nightly", True)
    own = {"name": {"any_": ["nightly"]}}
    started = {"state": {"name": {"not_any_": ["Scheduled", "Late"]}}}
    found = wait_until(
        lambda: site.find("flow_runs", deployments=own, flow_runs=started), f"a run\n{site.log}"
    )
    assert site.state(found[0]["id"]) == "Completed", site.logs(found[0]["id"])
    assert found[0]["parameters"]["alphas"] == [0.5, 0.25]
    points = [name for name in site.tasks(found[0]["id"]) if ": point " in name]
    assert len(points) == 2


@pytest.mark.slow
def test_what_is_on_stays_on_when_all_is_deployed_again(own_site: Site) -> None:
    site = own_site
    for name, on in (("nightly", True), ("sweep", True), ("other", False)):
        switch(site, name, on)
    file = site.folder / "prefect.yaml"
    wanted = yaml.safe_load(file.read_text())["deployments"]
    wanted[1].pop("schedules")  # moved into a deployment of its own, as ours were
    write(site.folder, *wanted, deployment("yearly", "yearly"), deployment("new", "fresh"))
    for _ in range(2):
        deployed_again(site)
        assert switches(site) == {
            "nightly": {"nightly": True},
            "sweep": {},
            "other": {"never": False},
            "yearly": {"yearly": True},
            "new": {"fresh": False},
        }
    assert site.deployment("nightly", "sweep")["parameters"]["taus"] == [0.03]


def test_a_schedule_that_the_page_could_change_is_refused(tmp_path: Path) -> None:
    bare, own = deployment("a", "one"), deployment("b", "two")
    twice, own["schedules"][0]["parameters"] = deployment("c", "one"), {"alphas": [0.1]}
    nameless = deployment("d", "x")
    del nameless["schedules"][0]["slug"]
    with pytest.raises(UiError) as refused:
        read_deployments(write(tmp_path, bare, own, twice, nameless))
    for told in ("schedule two has parameters", "the slug one", "a schedule of d has no slug"):
        assert told in str(refused.value)
    assert read_deployments(write(tmp_path, bare))["deployments"] == [bare]
