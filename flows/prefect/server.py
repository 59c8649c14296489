"""`crane ui`: server, pool, worker and deployments on this machine, until Ctrl-C.

Everything it keeps lies in one folder; nothing runs on after it ended.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from crane_tasks.user_paths import user_path
from flows.prefect.deployments import HEARTBEAT, POOL, deployments_file, read_deployments, set_up
from flows.prefect.processes import Processes, UiError, say

HOST = "127.0.0.1"
# Ctrl-C too: a shell starts what runs in the background with it switched off.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START = 180.0  # seconds until the server must answer: on a busy machine it takes 40
# No --limit: with one, a worker of 3.8 ends when a run is retried that it has just seen die.
# The pool's limit does what is wanted.
WORKER = ("prefect", "worker", "start", "--pool", POOL, "--type", "process")


def environment(port: int, home: Path) -> dict[str, str]:
    """What server, worker and runs are told: our folder, our port, nobody else."""
    ours = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        # As well as --port: else the page asks port 4200.
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
        # `flows` and `artifacts` are common names: those of the folder that we work in are others'.
        "PYTHONSAFEPATH": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
        # In memory a restart of the server would leak what a run held.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        # For `prefect.yaml`: where runs work, and leave store and merges.
        "PWD": os.getcwd(),
    }
    return {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | ours


def require_free(port: int) -> None:
    """Refuse a port on which somebody listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UiError(
                f"port {port} is taken ({error.strerror}): another `crane ui`, or the "
                "server of one that was killed? "
                f"Take a free one: --port {port + 1}"
            ) from error


def serve(port: int, home: Path) -> NoReturn:
    """Run server and worker until a signal, or until one of them ends.

    Raises:
        UiError: the port is taken, prefect.yaml is wrong, or a part does not start or ends.
        KeyboardInterrupt: a signal; all has been stopped.
    """
    require_free(port)
    read_deployments(deployments_file())  # what is wrong with it shows before the server starts
    home.mkdir(parents=True, exist_ok=True)
    env = environment(port, home)
    # Prefect reads its settings when it is imported: not before here.
    os.environ.update({k: v for k, v in env.items() if k.startswith("PREFECT_")})
    processes = Processes(home, env)
    try:
        say(f"Starting Prefect's server (about 15 s); it keeps its data in {home}")
        processes.start("server", "flows.prefect.page", "--host", HOST, "--port", str(port))
        _until_it_answers(processes, env["PREFECT_API_URL"])
        set_up(env)
        processes.start("worker", *WORKER)
        say(f"Merge, sweep or evaluate: http://{HOST}:{port}/v2/deployments")
        say(f"Runs work in {os.getcwd()}, one at a time. Ctrl-C stops everything.")
        while True:
            processes.check("server")
            processes.revive("worker", *WORKER)
            time.sleep(0.5)
    finally:
        for number in SIGNALS:  # a second Ctrl-C would leave the rest running
            signal.signal(number, signal.SIG_IGN)
        processes.stop()


def _until_it_answers(processes: Processes, url: str) -> None:
    import httpx

    limit = time.monotonic() + START
    while time.monotonic() < limit:
        processes.check("server")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").is_success:
                return
        time.sleep(0.3)
    raise UiError(f"the server did not answer within {START:.0f} s; see {processes.log('server')}")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run(port: int, home: Path) -> int:
    """Serve until stopped; 0 when it was, 1 when it cannot start or go on."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        serve(port, user_path(home).absolute())
    except KeyboardInterrupt:
        say("Stopped. What was under way goes on when it is retried.")
        return 0
    except UiError as error:
        sys.stderr.write(f"crane: {error}\n")
        return 1
