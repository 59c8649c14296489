"""The deployments of `prefect.yaml` on a server, with their pool and the watch over dead runs.

A second time changes nothing that was changed in the page: which schedules are on stays as it is.
`python -m flows.prefect.deployments` does it on the server of PREFECT_API_URL.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from flows.prefect.processes import UiError, say

POOL = "crane"
# A run that is silent for three of its heartbeats is dead. 30 s is the least Prefect takes.
HEARTBEAT = 30
SILENCE = 3 * HEARTBEAT

Place = tuple[str, str]  # a deployment's entrypoint and name
Known = Mapping[
    Place, Mapping[str, bool]
]  # of the deployments there: each schedule, and if it is on


def set_up(env: Mapping[str, str]) -> None:
    """Pool, automation and deployments, on the server that Prefect is set to.

    Args:
        env: of the `prefect` commands; PWD is where runs will work.

    Raises:
        UiError: there is no prefect.yaml, or it is not to be deployed.
    """
    file = deployments_file()
    wanted = read_deployments(file)
    _make_pool()
    mark_dead_runs()
    _deploy(file, wanted, env)


def deployments_file() -> Path:
    """This folder's prefect.yaml if it deploys flows of ours, or else our own."""
    own = Path.cwd() / "prefect.yaml"
    if own.is_file() and "flows.prefect." in own.read_text(errors="replace"):
        return own
    return Path(__file__).with_name("prefect.yaml")


def read_deployments(file: Path) -> dict[str, Any]:
    """A prefect.yaml, whose schedules must be such that the page cannot change what they run.

    Raises:
        UiError: a schedule has parameters of its own, or no slug, or another's slug.
    """
    wanted: dict[str, Any] = yaml.safe_load(file.read_text())
    problems, slugs = [], set()
    for deployment, schedule in _schedules(wanted):
        slug, name = schedule.get("slug"), deployment["name"]
        if not slug:
            problems.append(
                f"a schedule of {name} has no slug: name it, or each deploy makes another"
            )
        elif slug in slugs:
            problems.append(f"two schedules have the slug {slug}")
        if schedule.get("parameters"):
            problems.append(
                f"the schedule {slug} has parameters, which Prefect empties when it is switched on "
                "in the page: give them to a deployment of its own"
            )
        slugs.add(slug)
    if problems:
        raise UiError(f"{file}: " + "; ".join(problems))
    return wanted


def _schedules(wanted: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for deployment in wanted["deployments"]:
        for schedule in deployment.get("schedules") or ():
            yield deployment, schedule


def _place(deployment: Mapping[str, Any]) -> Place:
    return deployment["entrypoint"], deployment["name"]


def keep_switches(wanted: Mapping[str, Any], known: Known) -> None:
    """Take from the file what it says of schedules that are known: a switch is the page's.

    A schedule that has moved from one deployment to another stays as it was there.
    """
    for deployment, schedule in _schedules(wanted):
        slug = schedule["slug"]
        if slug in known.get(_place(deployment), {}):
            schedule.pop("active", None)  # what is not sent stays
        elif elsewhere := [at[slug] for at in known.values() if slug in at]:
            schedule["active"] = any(elsewhere)


def _deploy(file: Path, wanted: dict[str, Any], env: Mapping[str, str]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    names = DeploymentFilterName(any_=[d["name"] for d in wanted["deployments"]])
    own = {_place(d) for d in wanted["deployments"]}
    homes = {schedule["slug"]: _place(deployment) for deployment, schedule in _schedules(wanted)}
    with get_client(sync_client=True) as client:
        found = client.read_deployments(deployment_filter=DeploymentFilter(name=names))
        there = {(str(d.entrypoint), d.name): d for d in found if (d.entrypoint, d.name) in own}
        known = {p: {str(s.slug): s.active for s in d.schedules} for p, d in there.items()}
        keep_switches(wanted, known)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / file.name
            copy.write_text(yaml.safe_dump(wanted, sort_keys=False))
            # There, because Prefect imports flows from the folder it is in before all others.
            _run_command(env, "deploy", "--all", "--prefect-file", str(copy), cwd=folder)
        for place, deployment in there.items():
            for schedule in deployment.schedules:
                if homes.get(str(schedule.slug), place) != place:
                    client.delete_deployment_schedule(deployment.id, schedule.id)


def _run_command(env: Mapping[str, str], *args: str, cwd: str) -> None:
    """A `prefect` command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *args],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UiError(f"prefect {' '.join(args)} failed:\n{done.stdout}{done.stderr}")


def _make_pool() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
            client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=1))


def mark_dead_runs() -> None:
    """Have a run that stopped its heartbeat, whose machine went off, end as Crashed."""
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture

    name = "crane: mark dead runs as crashed"
    wanted = Automation(
        name=name,
        description="A run whose process was killed together with its worker sends no heartbeat.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=SILENCE),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No sign of life for {SILENCE} s: the process, its worker or its machine "
                "died. Finished work is kept: Retry goes on from there.",
            )
        ],
    )
    read: Any = Automation.read  # typed as if it were to be awaited
    try:
        read(name=name)
    except ValueError:
        wanted.create()


def main() -> int:
    """`python -m flows.prefect.deployments`; 0 when all is deployed, 1 when it cannot be."""
    try:
        set_up({**os.environ, "PWD": os.getcwd()})
    except UiError as error:
        sys.stderr.write(f"crane: {error}\n")
        return 1
    say(f"Deployed; runs will work in {os.getcwd()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
