"""Kills, rot and races against a merge, at random places of a seed; prints what came of them.

    python tests/faults/campaign.py [--seed 0] [--rounds 40]

Every round ends with the same command, run to its end. It must exit 0 with the bits of a merge that
nobody disturbed, or refuse by a message (exit 2) and leave no output; the store must be sound then,
and nothing may lie beside the output. What is not so is printed, and the exit code is 1.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "flows")]

from conftest import TinyPair, build_pair  # noqa: E402
from crane_process import Ended, Server, crane, stopped  # noqa: E402

ALPHAS = (0.2, 0.4, 0.6, 0.8)
KINDS = ("flip", "cut", "empty", "gone", "junk", "folder")


@dataclass
class Field:
    """A pair, the weights that its merges must have, and a folder for each round."""

    folder: Path
    pair: TinyPair
    draw: random.Random
    wanted: dict[float, dict[str, bytes]] = field(default_factory=dict)
    seconds: float = 0.0

    def command(self, place: Path, alpha: float = ALPHAS[0], out: str = "out") -> list[object]:
        folders = ["--store", place / "store", "--output", place / out]
        shards = ["--set", "run.shard_size=20KB"]
        return ["merge", self.pair.recipe_file, *folders, *shards, "--alpha", alpha, "--force"]

    def prepare(self) -> None:
        """The undisturbed merges, and how long one takes."""
        for alpha in ALPHAS:
            place = self.folder / f"whole-{alpha}"
            place.mkdir()
            start = time.monotonic()
            ended = crane(place, *self.command(place, alpha))
            assert ended.code == 0, ended.err
            self.seconds = time.monotonic() - start
            self.wanted[alpha] = weights(place / "out")

    def problems(self, place: Path, ended: Ended, alpha: float = ALPHAS[0]) -> Iterator[str]:
        """What is not as it must be once the command has ended."""
        if "Traceback" in ended.err or ended.code not in (0, 2):
            yield f"exit {ended.code}: {(ended.err.strip().splitlines() or [''])[-1]}"
        elif ended.code == 0 and weights(place / "out") != self.wanted[alpha]:
            yield "other weights"
        if (sound := crane(place, "store", "verify", "--store", place / "store")).code:
            yield f"the store is not sound: {sound.out.strip()}"
        litter = [p.name for p in place.iterdir() if p.name.startswith(".")]
        if ended.code == 0 and litter:
            yield f"left behind: {', '.join(litter)}"


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def killed(ground: Field, place: Path) -> Iterator[str]:
    """kill -9, SIGTERM or Ctrl-C at a random moment, up to three times."""
    for _ in range(ground.draw.randint(1, 3)):
        moment = time.monotonic() + ground.draw.random() * ground.seconds
        how = ground.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        command = ground.command(place)
        ended = stopped(place, command, lambda at=moment: time.monotonic() > at, how)  # type: ignore[misc]
        if "Traceback" in ended.err:
            yield f"{how.name}: a traceback"
    yield from ground.problems(place, crane(place, *ground.command(place)))


def rotten(ground: Field, place: Path) -> Iterator[str]:
    """A file of a finished store or output, or of what a kill has left, becomes another."""
    if ground.draw.random() < 0.5:
        shutil.copytree(ground.folder / f"whole-{ALPHAS[0]}", place, dirs_exist_ok=True)
    else:
        moment = time.monotonic() + ground.draw.uniform(0.3, 0.9) * ground.seconds
        stopped(place, ground.command(place), lambda: time.monotonic() > moment, signal.SIGKILL)
    places = [place / "store", *place.glob("out"), *place.glob(".out.draft-*")]
    files = sorted(p for folder in places for p in folder.rglob("*") if p.is_file())
    for file in ground.draw.sample(files, min(3, len(files))):
        damage(file, ground.draw.choice(KINDS), ground.draw)
    ended = crane(place, *ground.command(place), "--verify")
    if ended.code == 2 and not any(
        told in ended.err for told in ("no merge", "cannot be used as a store", "store format")
    ):
        yield f"refused: {ended.err.strip()}"
    if ended.code != 2:
        crane(place, "store", "verify", "--set-aside", "--store", place / "store")
        yield from ground.problems(place, crane(place, *ground.command(place), "--verify"))
    elif "Traceback" in ended.err:
        yield "a traceback"


def damage(file: Path, kind: str, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == "gone" or (kind == "folder" and not file.name.startswith(".lock")):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        return
    if kind == "flip" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "junk":
        data = bytearray(draw.randbytes(len(data)))
    elif kind == "empty":
        data = bytearray()
    file.write_bytes(data)


def raced(ground: Field, place: Path) -> Iterator[str]:
    """Four merges of unlike alpha at once over one store, into one output or into four."""
    one = ground.draw.random() < 0.5
    servers, ends = [Server() for _ in ALPHAS], []
    try:
        for number, (server, alpha) in enumerate(zip(servers, ALPHAS, strict=True)):
            own = place / f"run{number}"
            own.mkdir()
            out = "out" if one else f"out{number}"
            server.start([str(a) for a in ground.command(place, alpha, out)], own)
        ends = [server.end() for server in servers]
    finally:
        for server in servers:
            server.close()
    for ended in ends:
        if ended.code not in (0, 2) or "Traceback" in ended.err:
            yield f"exit {ended.code}: {ended.err.strip()[-200:]}"
    for number, alpha in enumerate(ALPHAS):
        if not one and weights(place / f"out{number}") != ground.wanted[alpha]:
            yield f"other weights in out{number}"
    if one and weights(place / "out") not in ground.wanted.values():
        yield "a mixture of two merges"
    for alpha in ALPHAS:  # what was measured meanwhile is what is measured now
        yield from ground.problems(place, crane(place, *ground.command(place, alpha)), alpha)


FAULTS: dict[str, tuple[Callable[[Field, Path], Iterator[str]], float]] = {
    "killed": (killed, 0.4),
    "rotten": (rotten, 0.45),
    "raced": (raced, 0.15),
}


def campaign(folder: Path, seed: int, rounds: int, say: Callable[[str], None]) -> int:
    """Run it; the number of rounds in which something was not as it must be."""
    draw = random.Random(seed)
    ground = Field(folder, build_pair(folder / "pair", "qwen3"), draw)
    ground.prepare()
    total = 0
    say(f"{'fault':<10} rounds  wrong")
    for name, (fault, share) in FAULTS.items():
        wrong, count = 0, max(1, round(rounds * share))
        for number in range(count):
            place = folder / f"{name}-{number}"
            place.mkdir()
            if found := list(fault(ground, place)):
                wrong += 1
                say(f"  {name} {number}: {'; '.join(found)}")
            else:
                shutil.rmtree(place)
        say(f"{name:<10} {count:6}  {wrong:5}")
        total += wrong
    return total


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crane-faults-"))
    wrong = campaign(folder, options.seed, options.rounds, say)
    if wrong:
        sys.exit(f"{wrong} rounds were not as they must be; what they left is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
