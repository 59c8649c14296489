"""What a merge costs on idle and on busy cores, by how torch's threads wait for work.

    python tests/benchmarks/busy_cores.py [--load 6]

prints seconds and CPU seconds of `crane merge tiny` (no answers) with threads that spin, as they do
by themselves, with ours (OMP_WAIT_POLICY=PASSIVE), and with one thread, idle and beside `--load`
processes that keep a core busy each.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAYS = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "as torch has it": {"OMP_WAIT_POLICY": ""},
    "ours": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but count."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def merge(env: dict[str, str], folder: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds, of a merge from nothing."""
    command = [sys.executable, "-m", "flows.cli", "merge", "tiny", "--set", "evaluate.generate=0",
               "--output", folder / "out", "--store", folder / "store"]  # fmt: skip
    own = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | env
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env=own, check=True, capture_output=True)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, sum(after[:2]) - sum(before[:2])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=int, default=3 * (os.cpu_count() or 1))
    load = parser.parse_args().load
    say(f"{os.cpu_count()} cores; load {load}")
    for title, processes in (("idle", 0), ("busy", load)):
        found = {}
        for way, env in WAYS.items():
            with tempfile.TemporaryDirectory() as folder, busy(processes):
                found[way] = merge(env, Path(folder))
        for way, (seconds, cpu) in found.items():
            ratio = seconds / found["ours"][0]
            say(f"{title}  {way:<16} {seconds:7.1f} s  {cpu:7.1f} CPU s  {ratio:5.2f}")


if __name__ == "__main__":
    main()
