"""The server and the worker as processes: started, watched, and ended with all they started."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

AT_ONCE = 30.0  # seconds: what ends sooner after its start would end again
GRACE = 15.0  # seconds that a process gets to end by itself


class UiError(Exception):
    """Why it cannot start or go on, for a person."""


class Processes:
    """The server and the worker; their output goes to files."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self._home = home
        self._env = env
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}

    def start(self, name: str, *args: str) -> None:
        """Start a Python module in a session of its own: Ctrl-C is ours to pass on."""
        self._started[name] = time.monotonic()
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", *args],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self._home / f"{name}.log"

    def check(self, name: str) -> None:
        """Refuse to go on without one of them."""
        if self._running[name].poll() is not None:
            last = self.log(name).read_text(errors="replace").splitlines()[-15:]
            raise UiError(f"the {name} ended:\n" + "\n".join(last))

    def revive(self, name: str, *args: str) -> None:
        """Start one of them again if it ended, unless it had only just been started."""
        if self._running[name].poll() is None:
            return
        if time.monotonic() - self._started[name] < AT_ONCE:
            self.check(name)
        say(f"The {name} ended, another one takes over; see {self.log(name)}")
        self.start(name, *args)

    def stop(self) -> None:
        """End the runs, then the worker that reports them, then the server."""
        for name in reversed(self._running):
            process = self._running[name]
            try:
                family = psutil.Process(process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                family = []
            if name == "worker":
                _end(family, GRACE)
                _until_told(bool(family))
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            _end(family, 1.0)
            process.kill()
            process.wait()


def _until_told(stopped: bool) -> None:
    """Let the worker report that its run was stopped, within the grace."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState
    from prefect.client.schemas.filters import FlowRunFilterStateType as Type
    from prefect.client.schemas.objects import StateType

    running = FlowRunFilter(state=FlowRunFilterState(type=Type(any_=[StateType.RUNNING])))
    limit = time.monotonic() + GRACE
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        while stopped and time.monotonic() < limit:
            if not client.read_flow_runs(flow_run_filter=running):
                return
            time.sleep(0.3)


def _end(processes: list[psutil.Process], grace: float) -> None:
    """Ask processes to end, then make them."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, grace)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def say(text: str) -> None:
    """A line for the person in front of the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
