"""`crane ui` as it is: a Prefect server, a worker, the deployments; asked by its API."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

DEADLINE = 420.0  # only against a hang: every wait ends with what it waits for
ENDED = ("Completed", "Failed", "Crashed", "Cancelled")


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(there: Callable[[], Any], what: str, pause: float = 0.2) -> Any:
    """What `there` gives as soon as that is true."""
    limit = time.monotonic() + DEADLINE
    while time.monotonic() < limit:
        if found := there():
            return found
        time.sleep(pause)
    raise AssertionError(f"waited in vain for {what}")


def end_family(pid: int) -> None:
    """kill -9 a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass
class Site:
    """A running `crane ui`."""

    folder: Path
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        files = [self.folder / "ui.log", *sorted(self.folder.glob("home/*.log"))]
        return "\n".join(f"{f.name}:\n{f.read_text()[-3000:]}" for f in files if f.exists())

    def api(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Ask the server; while SQLite is busy it says 503, and wants to be asked again."""

        def answer() -> httpx.Response | None:
            found = httpx.request(method, f"{self.url}/api{path}", json=body, timeout=60)
            return None if found.status_code == httpx.codes.SERVICE_UNAVAILABLE else found

        found = wait_until(lambda: [r] if (r := answer()) is not None else None, path)
        response: httpx.Response = found[0]
        return response

    def get(self, path: str) -> Any:
        """An object that must be there."""
        return self.api("GET", path).raise_for_status().json()

    def find(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """The objects of a kind that pass the filters."""
        found: list[dict[str, Any]] = (
            self.api("POST", f"/{kind}/filter", filters).raise_for_status().json()
        )
        return found

    def deployment(self, name: str, flow: str | None = None) -> dict[str, Any]:
        """`merge`, `sweep` or `evaluate`, or another of these flows."""
        found: dict[str, Any] = self.get(f"/deployments/name/crane-{flow or name}/{name}")
        return found

    def submit(self, name: str, **parameters: Any) -> httpx.Response:
        """Ask for a run, as the form does."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.api("POST", path, {"parameters": parameters})

    def start(self, name: str, **parameters: Any) -> str:
        """Ask for a run; its id."""
        return str(self.submit(name, **parameters).raise_for_status().json()["id"])

    def run(self, run: str) -> dict[str, Any]:
        """A flow run."""
        found: dict[str, Any] = self.get(f"/flow_runs/{run}")
        return found

    def history(self, run: str) -> list[str]:
        """The types of all states that a run was in."""
        found = self.get(f"/flow_run_states/?flow_run_id={run}")
        return [s["type"] for s in sorted(found, key=lambda state: state["timestamp"])]

    def newest(self, name: str) -> str | None:
        """The latest run of this name, if there is one."""
        found = self.find("flow_runs", flow_runs={"name": {"any_": [name]}}, sort="START_TIME_DESC")
        return str(found[0]["id"]) if found else None

    def state(self, run: str, wanted: Sequence[str] = ENDED) -> str:
        """The name of a run's state as soon as it is one of these."""
        name = wait_until(lambda: self._named(run, wanted), f"{wanted} of {run}\n{self.log}")
        return str(name)

    def _named(self, run: str, wanted: Sequence[str]) -> str | None:
        name: str = self.run(run)["state"]["name"]
        return name if name in wanted else None

    def tasks(self, run: str) -> dict[str, str]:
        """The latest state of each of a run's tasks, by the task's name."""
        return {name: states[-1] for name, states in self.attempts(run).items()}

    def attempts(self, run: str) -> dict[str, list[str]]:
        """The states that each of a run's tasks came to, the latest last, by the task's name."""
        found = self.find("task_runs", flow_runs={"id": {"any_": [run]}})
        ended: dict[str, list[str]] = {}
        for task in sorted(found, key=lambda t: t["start_time"] or ""):
            ended.setdefault(task["name"], []).append(task["state"]["name"])
        return ended

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """A run's artifacts by key."""
        found = self.find("artifacts", flow_runs={"id": {"any_": [run]}})
        return {a["key"]: a for a in found}

    def logs(self, run: str) -> str:
        """What a run said; the server gives 200 lines at a time."""
        lines: list[str] = []
        while True:
            asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"}
            found = self.find("logs", **asked, offset=len(lines))
            if not found:
                return "\n".join(lines)
            lines += [line["message"] for line in found]

    def flow_process(self, run: str) -> psutil.Process | None:
        """The process in which a run's flow is, once it is there."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.environ().get("PREFECT__FLOW_RUN_ID") == run and (
                    "prefect.engine" in process.cmdline()
                ):
                    return process
        return None

    def prefect(self, *args: str, unless: str | None = None) -> None:
        """A `prefect` command against this server; it may fail if it says `unless`."""
        env = os.environ | {"PREFECT_API_URL": f"{self.url}/api", "PREFECT_HOME": str(self.home)}
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *args],
            env=env,
            capture_output=True,
            text=True,
        )
        told = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 0 or (unless is not None and unless in told), told

    def retry(self, run: str) -> None:
        """`prefect flow-run retry` until it takes: for ten seconds after a crash the worker
        may report it once more, and what was scheduled meanwhile is Crashed again. Or it was
        not, and runs by the time that the command asks.
        """

        def taken() -> bool:
            found = self.run(run)
            if found["run_count"] == 1 and found["state"]["name"] in ENDED:
                self.prefect("flow-run", "retry", run, unless="and cannot be retried")
            return bool(found["run_count"] > 1)

        wait_until(taken, f"the second attempt\n{self.log}", pause=1.0)

    @property
    def home(self) -> Path:
        return self.folder / "home"


@contextmanager
def running(folder: Path, python: Path = Path(sys.executable)) -> Iterator[Site]:
    """Start it in a folder, by an environment's own command, and end it with all it started."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [python.with_name("crane"), "ui", "--port", str(port), "--home", "home"]
    for name in ("flows", "artifacts", "crane_tasks"):  # a folder may have packages so called
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    with (folder / "ui.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, text=True, start_new_session=True
        )
    site = Site(folder, port, process)
    try:
        wait_until(lambda: _ready(site), "`crane ui`")
        yield site
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        end_family(process.pid)


def _ready(site: Site) -> bool:
    assert site.process.poll() is None, site.log
    return "Ctrl-C stops everything" in (site.folder / "ui.log").read_text()
