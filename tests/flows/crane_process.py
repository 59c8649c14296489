"""Running the `crane` command in processes of its own, many of them quickly.

A server process imports the heavy libraries once and forks for every command. Each command
is a real process: it has its own exit code, and can be interrupted and killed.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

DEADLINE = 300.0  # only against a hang: every wait ends with what it waits for

SERVER = """
import gc, json, os, signal, sys, traceback, warnings
warnings.filterwarnings("ignore")
import torch, matplotlib.pyplot, datasets, rich.live, rich.progress, PIL.Image, PIL.ImageOps
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
# The code of the models, too: with it come a thousand modules, of accelerate and others.
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
import flows.cli, flows.merge, flows.plan, flows.sweep, flows.evaluate, flows.stability
import artifacts.cleaning

def command():
    try:
        flows.cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

PIL.Image.init()
gc.collect()
gc.freeze()  # else the first collection in a child copies all of its memory
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(job["cwd"])
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ["crane", *job["args"]]
        code = command()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an orderly end would take the libraries down once per command
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its stdout, which must be one JSON object or list and nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)


class Server:
    """The forking process."""

    def __init__(self, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200", **env},
        )
        atexit.register(self._process.kill)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _stream(self, stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def start(self, args: Sequence[str], cwd: Path) -> int:
        """Start a command; its process id."""
        self._files = cwd / "stdout", cwd / "stderr"
        job = {"args": list(args), "cwd": str(cwd), "out": str(self._files[0]),
               "err": str(self._files[1])}  # fmt: skip
        stdin = self._stream(self._process.stdin)
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        return int(self._stream(self._process.stdout).readline())

    def end(self) -> Ended:
        """Wait for the command."""
        status = int(self._stream(self._process.stdout).readline())
        out, err = (file.read_text(errors="backslashreplace") for file in self._files)
        return Ended(os.waitstatus_to_exitcode(status), out, err)


@cache
def server() -> Server:
    """The one server of this test run."""
    return Server()


def crane(cwd: Path, *args: object) -> Ended:
    """Run a command to its end."""
    server().start([str(a) for a in args], cwd)
    return server().end()


def stopped(cwd: Path, args: Sequence[object], when: Callable[[], bool], how: int) -> Ended:
    """Run a command and send it a signal as soon as something is the case."""
    pid = server().start([str(a) for a in args], cwd)
    limit = time.monotonic() + DEADLINE
    while not when() and time.monotonic() < limit:
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, how)
    return server().end()


def script(cwd: Path, *args: object) -> subprocess.Popen[str]:
    """The installed console script as it is."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("crane"), *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reached(store: Path, stage: str, units: int) -> Callable[[], bool]:
    """Whether a stage has so many units on disk, or is finished."""

    def look() -> bool:
        folder = store / stage
        if any(folder.glob("[!.]*/manifest.json")):
            return True
        logs = folder.glob(".draft-*/units.jsonl")
        return any(_lines(log) >= units for log in logs)

    return look


def _lines(log: Path) -> int:
    try:
        return log.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


KILL, INTERRUPT = signal.SIGKILL, signal.SIGINT
