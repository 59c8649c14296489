"""`crane sweep`: what it prints and writes, what it refuses, and that a kill costs little."""

import csv
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import Bench as Shared
from conftest import TinyPair, load_tensors
from crane_process import KILL, Ended, crane, stopped

Pairs = Callable[[str], TinyPair]
GRID = ("--alpha", "0.5,0.25", "--tau", "0.03")
FILES = {"sweep.json", "sweep.csv", "sweep.md", "sweep.html", "sweep.png"}
POINT_KEYS = {"name", "alpha", "tau", "set", "status", "seconds", "key", "metrics", "intervals",
              "pareto", "meets"}  # fmt: skip


class Bench(Shared):
    """A pair that was swept once by the command line."""

    @property
    def output(self) -> Path:
        return self.folder / "grid"

    def run(self, *args: object, command: str = "sweep") -> Ended:
        """A command on the pair's recipe and store."""
        return self.crane(command, *args)


@pytest.fixture(scope="module")
def bench(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Shared by the tests that only look or add."""
    folder = tmp_path_factory.mktemp("sweep")
    pair = pairs("qwen3").copy(folder / "pair")
    bench = Bench(pair, folder, {})
    bench.result.update(bench.run(*GRID, "--output", bench.output, "--json").json())
    return bench


def test_a_sweep_prints_one_json_object_and_writes_no_checkpoint(bench: Bench) -> None:
    found = bench.result
    assert (found["name"], found["output"]) == ("tiny-random", str(bench.output))
    assert [(p["alpha"], p["tau"]) for p in found["points"]] == [(0.5, 0.03), (0.25, 0.03)]
    for point in found["points"]:
        assert point.keys() == POINT_KEYS
        assert point["status"] == "computed" and point["set"] == {} and point["meets"]
        assert point["metrics"].keys() >= {"reasoning_loss", "agent_loss"}
    assert found["models"].keys() == {"base", "donor"}
    losses = [p["metrics"]["reasoning_loss"] for p in found["points"]]
    assert found["best"] == losses.index(min(losses))
    assert found["best"] in found["pareto"]
    assert [p["pareto"] for p in found["points"]] == [i in found["pareto"] for i in range(2)]
    assert found["written"] is None
    assert {p.name for p in bench.output.iterdir()} == FILES
    assert not [
        p for p in bench.folder.rglob("*.safetensors") if bench.pair.folder not in p.parents
    ]
    assert json.loads((bench.output / "sweep.json").read_text())["points"] == found["points"]
    with (bench.output / "sweep.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [float(line["reasoning_loss"]) for line in lines] == losses
    page = (bench.output / "sweep.html").read_text()
    assert "data:image/png;base64," in page and "reasoning loss" in page


def test_a_person_gets_a_table_with_the_front_marked_and_the_reports_path(bench: Bench) -> None:
    ended = bench.run(*GRID, "--output", bench.folder / "again")
    assert ended.code == 0, ended.err
    assert "★" in ended.out and str(bench.folder / "again" / "sweep.html") in ended.out
    assert "donor" in ended.out and "reasoning" in ended.out
    assert "point alpha0.5-tau0.03" in ended.err and ended.err.count("reused") == 2


def test_the_best_alone_is_written_as_the_merge_that_it_is(bench: Bench) -> None:
    place = bench.folder / "written"
    args = (*GRID, "--output", place, "--write", "best", "--require", "agent_loss<=100")
    found = bench.run(*args, "--json").json()
    best = found["points"][found["best"]]
    assert found["written"] == str(place / best["name"])
    assert {p.name for p in place.iterdir()} == FILES | {best["name"], f"{best['name']}-report"}
    merged = bench.run("--alpha", best["alpha"], "--output", bench.folder / "merge", "--json",
                       command="merge").json()  # fmt: skip
    assert merged["evaluation"]["models"]["merged"] == best["metrics"]
    ours, theirs = load_tensors(Path(found["written"])), load_tensors(bench.folder / "merge")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = bench.run(*args, "--json")
    assert again.json()["written"] == found["written"]
    assert "computed" not in again.err


def test_if_no_point_meets_what_is_required_nothing_is_written_and_the_end_is_1(
    bench: Bench,
) -> None:
    place = bench.folder / "unmet"
    ended = bench.run(*GRID, "--output", place, "--write", "best", "--json", "--require",
                      "reasoning_loss<0.001")  # fmt: skip
    assert ended.code == 1
    found = json.loads(ended.out)
    assert found["best"] is None and found["written"] is None and found["pareto"]
    assert not any(p["meets"] for p in found["points"])
    assert "No point meets reasoning_loss < 0.001" in ended.err and "short" in ended.err
    assert "Traceback" not in ended.err
    assert {p.name for p in place.iterdir()} == FILES


NUMBERS = ",".join(f"0.{n:02}" for n in range(1, 100))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--alpha", "0.9,-1"], "alpha-1-tau.*alpha: .*greater than or equal to 0"),
        (["--tau", "0.03,2"], "tau: "),
        (["--alpha", "0.9;1"], "--alpha 0.9;1"),
        (["--alpha", ""], "--alpha"),
        (["--alpha", "0.9,0.90"], "same point twice"),
        (["--alpha", NUMBERS, "--tau", NUMBERS], "9,801 points.*1,000 at most"),
        (["--set-grid", "merge.router"], "--set-grid merge.router: write"),
        (["--set-grid", "merge.router="], "--set-grid merge.router=: write"),
        (["--set-grid", "=1,2"], "--set-grid =1,2: write"),
        (["--set-grid", "merge.router=[gated"], "not YAML"),
        (["--set-grid", "merge.router=gated,sideways"], "merge.router: .*sideways"),
        (["--set-grid", "merge.ruoter=gated,slerp"], "ruoter: unknown key"),
        (["--set-grid", "alpha=0.1,0.2"], "--alpha 0.1,0.2"),
        (["--set-grid", "run.threads=1,2"], "run.threads changes nothing"),
        (["--set-grid", "gate.store_gradients=true,false"], "same point twice"),
        (["--set-grid", "tau.x=1"], "--tau|no section"),
        (["--set-grid", "gate.baseline=ffn,expert"], "gate.baseline: .*no 'expert'"),
        (["--set-grid", "evaluate.agent=heldout_agent.jsonl,nowhere.jsonl"], "nowhere.jsonl"),
        (["--require", "tool_calls>=0.9"], "tool_calls is not measured"),
        (["--require", "charm>=0.9"], "no metric 'charm'"),
        (["--require", "agent_loss=1"], "METRIC>=NUMBER"),
        (["--write", "all"], "--write all"),
        (["--write", "best", "--set", "evaluate.reasoning=null"], "reasoning_loss is not measured"),
        (["--set", "evaluate={}"], "no held-out rows"),
    ],
)
def test_bad_input_is_refused_before_the_first_point_is_computed(
    args: list[str], message: str, bench: Bench, tmp_path: Path
) -> None:
    before = bench.artifacts()
    grid = [] if "--alpha" in args else ["--alpha", "0.9,0.8"]
    ended = bench.run(*grid, *args, "--output", tmp_path / "bad", "--json")
    assert ended.code == 2, ended.err
    assert ended.out == "" and "Traceback" not in ended.err and ended.err.count("crane:") == 1
    assert re.search(message, ended.err, re.DOTALL), ended.err
    assert bench.artifacts() == before
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("place", ["pair/base", "pair/donor", "pair/base/grid", "store", "."])
def test_an_output_that_touches_an_input_is_refused(place: str, bench: Bench) -> None:
    ended = bench.run(*GRID, "--output", bench.folder / place)
    assert ended.code == 2 and "would overwrite the" in ended.err


def test_a_folder_with_other_things_is_not_spoiled(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "sweep.csv").write_text("years of work")
    ended = bench.run(*GRID, "--output", tmp_path)
    assert ended.code == 2 and "of no sweep" in ended.err
    (tmp_path / "sweep.csv").rename(tmp_path / "thesis.csv")
    assert bench.run(*GRID, "--output", tmp_path).code == 0
    assert bench.run(*GRID, "--output", tmp_path).code == 0
    assert (tmp_path / "thesis.csv").read_text() == "years of work"
    shutil.copytree(bench.pair.base, tmp_path / "copy")
    ended = bench.run(*GRID, "--output", tmp_path / "copy")
    assert ended.code == 2 and "is a checkpoint" in ended.err


def test_the_report_lies_beside_the_merge_if_nothing_else_is_said(
    bench: Bench, tmp_path: Path
) -> None:
    args = ["sweep", bench.pair.recipe_file, "--store", bench.store, *GRID, "--json"]
    found = crane(tmp_path, *args).json()
    assert found["output"] == str(tmp_path / "merged" / "tiny-random-sweep")
    found = crane(tmp_path, *args, "--set", f"run.output={tmp_path}/out").json()
    assert found["output"] == str(tmp_path / "out-sweep")


def finished_units(folder: Path) -> dict[str, int]:
    """The files of the finished units of a draft or artifact, by inode."""
    log = folder / "units.jsonl"
    whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    names = [json.loads(line)["record"]["unit"] for line in whole]
    return {
        str(p.relative_to(folder)): p.stat().st_ino
        for name in names
        for p in (folder / "data.zarr" / name).rglob("*")
        if p.is_file()
    }


def test_a_killed_sweep_goes_on_in_the_point_it_was_in(pairs: Pairs, tmp_path: Path) -> None:
    pair, store = pairs("qwen3"), tmp_path / "store"
    args = ["sweep", pair.recipe_file, "--alpha", "0.2,0.4,0.6", "--json", "--set",
            "evaluate.generate=2", "--set", "evaluate.max_new_tokens=6", "--store"]  # fmt: skip

    def in_the_second_point() -> bool:
        """Its losses are there, as the third point's are, from one walk; and one set of answers."""
        logs = list(store.glob("measure/.draft-*/units.jsonl"))
        done = list(store.glob("evaluate/[!.]*/manifest.json"))
        return len(done) > 1 or (
            len(done) == 1 and any(log.read_bytes().count(b"\n") >= 5 for log in logs)
        )

    place = ["--output", tmp_path / "grid"]
    ended = stopped(tmp_path, [*args, store, *place], in_the_second_point, KILL)
    assert ended.code == -signal.SIGKILL and ended.out == ""
    # What is finished can be seen already.
    assert "1 of 3 points" in (tmp_path / "grid" / "sweep.md").read_text()
    assert len(json.loads((tmp_path / "grid" / "sweep.json").read_text())["points"]) == 1
    drafts = list(store.glob("measure/.draft-*"))
    kept = [finished_units(draft) for draft in drafts]
    assert len(kept) == 2 and all(kept)
    found = crane(tmp_path, *args, store, *place).json()
    assert [p["status"] for p in found["points"]] == ["reused", "resumed", "resumed"]
    for draft, units in zip(drafts, kept, strict=True):
        whole = store / "measure" / draft.name.removeprefix(".draft-")
        assert {name: (whole / name).stat().st_ino for name in units} == units
    fresh = crane(tmp_path, *args, tmp_path / "other", "--output", tmp_path / "fresh").json()
    for ours, theirs in zip(found["points"], fresh["points"], strict=True):
        assert (ours["key"], ours["metrics"]) == (theirs["key"], theirs["metrics"])
