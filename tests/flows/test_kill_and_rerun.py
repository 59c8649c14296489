"""kill -9 anywhere, run the same command: finished work is kept, the result is the same."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors
from crane_process import DEADLINE, KILL, crane, reached, script, stopped

from crane_tasks.apply.output import shard_plan
from crane_tasks.models.files.checkpoint import Checkpoint

Pairs = Callable[[str], TinyPair]
POINTS = [("delta", 1), ("calibration", 1), ("scores", 2), ("threshold", 1), ("projector", 1),
          ("apply", 1), ("measure", 1)]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Undisturbed:
    """A merge that nobody killed."""

    pair: TinyPair
    output: dict[str, bytes]
    result: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What every killed merge must end in."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pair = pairs("qwen3")
    result = crane(folder, *command(pair, folder)).json()
    return Undisturbed(pair, files(folder / "out"), result)


def command(pair: TinyPair, folder: Path) -> list[object]:
    """The merge into a folder."""
    return ["merge", pair.recipe_file, "--store", folder / "store", "--output", folder / "out",
            "--set", "run.shard_size=20KB", "--json"]  # fmt: skip


def expected(store: Path, result: dict[str, Any]) -> dict[str, str]:
    """Each stage's status in the next run, from what a kill left on the disk."""
    found = {}
    for stage in result["stages"]:
        name, folder = stage["name"], store / stage["name"]
        log = folder / f".draft-{stage['key']}" / "units.jsonl"
        if (folder / stage["key"] / "manifest.json").exists():
            found[name] = "reused"
        elif log.exists() and b"\n" in log.read_bytes():
            found[name] = "resumed"
        else:
            found[name] = "computed"
    sets = [p for p in (store / "calibration").glob("*") if not p.name.startswith(".lock")]
    drafts = [p for p in sets if p.name.startswith(".draft")]
    found["calibration"] = "reused" if len(sets) == 3 and not drafts else ""
    return found


def check_rerun(folder: Path, undisturbed: Undisturbed) -> dict[str, str]:
    """Run the command again after a kill; the statuses of its stages."""
    wanted = expected(folder / "store", undisturbed.result)
    before = {p: p.stat().st_ino for p in (folder / "store").glob("*/*/manifest.json")}
    result = crane(folder, *command(undisturbed.pair, folder)).json()
    found = {s["name"]: s["status"] for s in result["stages"]}
    assert {n: s for n, s in found.items() if wanted[n]} == {n: s for n, s in wanted.items() if s}
    assert files(folder / "out") == undisturbed.output
    for part in ("scores", "edit", "evaluation"):
        assert result[part] == undisturbed.result[part]
    assert all(p.stat().st_ino == inode for p, inode in before.items()), "not kept"
    left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert left == []
    return found


@pytest.mark.parametrize(("stage", "units"), [("scores", 1), ("apply", 1)])
def test_a_killed_merge_is_finished_by_the_same_command(
    stage: str, units: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    args = command(undisturbed.pair, tmp_path)
    ended = stopped(tmp_path, args, reached(tmp_path / "store", stage, units), KILL)
    assert ended.code == -signal.SIGKILL
    assert ended.out == ""
    check_rerun(tmp_path, undisturbed)


def test_a_merge_killed_again_and_again_arrives(undisturbed: Undisturbed, tmp_path: Path) -> None:
    args = command(undisturbed.pair, tmp_path)
    for stage, units in POINTS:
        ended = stopped(tmp_path, args, reached(tmp_path / "store", stage, units), KILL)
        assert ended.code == -signal.SIGKILL
    found = check_rerun(tmp_path, undisturbed)
    assert found["delta"] == "reused"


def test_the_installed_script_is_killed_and_finished(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    process = script(tmp_path, *command(undisturbed.pair, tmp_path))
    there = reached(tmp_path / "store", "scores", 1)
    limit = time.monotonic() + DEADLINE
    while not there() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = check_rerun(tmp_path, undisturbed)
    assert found["delta"] == "reused"


def test_a_rerun_with_other_shards_after_a_kill_mixes_nothing(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Shards of two plans bear the same names: those of the first must not be kept."""
    plans: dict[tuple[str, ...], list[int]] = {}
    for size in range(5_000, 60_000, 500):
        plan = shard_plan(Checkpoint.open(undisturbed.pair.base), size)
        sizes = plans.setdefault(tuple(s.file for s in plan), [])
        if not sizes or plan[0] != shard_plan(Checkpoint.open(undisturbed.pair.base), sizes[0])[0]:
            sizes.append(size)
    first, other = max((s for s in plans.values() if len(s) > 1), key=lambda s: -s[0])[:2]
    args = [*command(undisturbed.pair, tmp_path), "--force", "--set"]
    there = reached(tmp_path / "store", "apply", 1)
    ended = stopped(tmp_path, [*args, f"run.shard_size={first}"], there, KILL)
    assert ended.code == -signal.SIGKILL
    ended = crane(tmp_path, *args, f"run.shard_size={other}")
    assert ended.code == 0, ended.err
    (tmp_path / "wanted").mkdir()
    for name, data in undisturbed.output.items():
        (tmp_path / "wanted" / name).write_bytes(data)
    found, wanted = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
