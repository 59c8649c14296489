"""Pairs on the hub: looked at before they are downloaded, and no more of them than is needed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyPair
from crane_process import Ended, Server
from hub_site import COMMIT, Hub, serving
from safetensors.torch import load_file, save_file

from crane_tasks.errors import BadInput, CheckpointError, OutputError, RecipeError
from crane_tasks.identity import name_in_cache
from flows.publish import check_repo, parcel_of, upload
from flows.rebuild import Places, rebuild


class House:
    """A hub, and a process with its address from which commands are run."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.cache = hub, folder / "hf"
        # The hub's newer way of uploading has servers of its own.
        self.env = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_" + 34 * "a",
                    "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(self.cache),
                    "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        self.server = Server(**self.env)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with serving(Hub({}, new=folder / "new")) as hub:
        house = House(hub, folder)
        yield house
        house.server.close()


class Desk:
    """A recipe whose pair is on a hub, and commands."""

    def __init__(self, house: House, pair: TinyPair, folder: Path) -> None:
        self.house, self.hub, self.pair, self.folder = house, house.hub, pair, folder
        shutil.copytree(pair.folder, folder, ignore=shutil.ignore_patterns("base", "donor"))
        self.recipe = folder / "recipe.yaml"
        data = yaml.safe_load(self.recipe.read_text())
        self.write(data | {"base": "tiny/base", "donor": "tiny/donor"})

    def write(self, data: dict[str, Any]) -> None:
        self.recipe.write_text(yaml.safe_dump(data))

    def crane(self, *arguments: str, code: int = 0) -> Ended:
        """A command."""
        self.house.server.start(arguments, self.folder)
        ended = self.house.server.end()
        assert ended.code == code, ended.err
        return ended

    def without_network(self, *arguments: str, code: int = 0) -> str:
        """A command for which nobody is where the hub should be; its stderr."""
        ended = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            env=os.environ | self.house.env | {"HF_ENDPOINT": "http://127.0.0.1:9"},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
        return ended.stderr


@pytest.fixture
def desk(house: House, pairs: Callable[[str], TinyPair], tmp_path: Path) -> Desk:
    """Both sides of a random pair, with what a repository has besides."""
    repos, pair = {}, pairs("qwen3")
    for side in ("base", "donor"):
        repos[f"tiny/{side}"] = own = tmp_path / "hub" / side
        shutil.copytree(pair.folder / side, own)
        (own / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        (own / "LICENSE").write_text("Apache License")
        (own / "consolidated.safetensors").write_bytes(b"x" * 10_000)
        (own / "onnx").mkdir()
        (own / "onnx" / "config.json").write_text("{}")
    shutil.rmtree(house.cache, ignore_errors=True)
    house.hub.repos = repos
    house.hub.asked.clear()
    house.hub.gated.clear()
    return Desk(house, pair, tmp_path / "desk")


@pytest.mark.slow
def test_a_plan_downloads_no_weights_and_its_keys_are_the_merges(desk: Desk) -> None:
    plan = json.loads(desk.crane("plan", "recipe.yaml", "--json").out)
    stages = {s["name"]: s for s in plan["stages"]}
    assert stages["delta"]["status"] == "computed" and stages["delta"]["disk"] > 0
    # Headers alone, of which the library asks for the first 100 KB.
    spans = [span for _, path, span in desk.hub.asked if path.endswith(".safetensors")]
    assert spans and set(spans) == {"bytes=0-100000"}
    assert not list(desk.house.cache.rglob("model*.safetensors"))
    merged = desk.crane("merge", "recipe.yaml", "--json", "--output", "out").json()
    keys = {s["name"]: s["key"] for s in merged["stages"]}
    assert keys == {name: s["key"] for name, s in stages.items()}
    # Nothing that the index does not name.
    asked = {path for _, path, _ in desk.hub.asked}
    assert not [p for p in asked if "consolidated" in p or "onnx/" in p]
    card = (desk.folder / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "tiny/base" in card
    record = json.loads((desk.folder / "out" / "crane.json").read_text())
    assert record["base"]["commit"] == record["donor"]["commit"] == COMMIT


def test_a_mistyped_donor_is_found_before_the_base_is_fetched(desk: Desk) -> None:
    desk.hub.repos["tiny/doner"] = desk.hub.repos.pop("tiny/donor")
    told = desk.crane("merge", "recipe.yaml", code=2).err
    assert "tiny/donor" in told and "Check the spelling" in " ".join(told.split())
    assert desk.hub.fetched(".safetensors") == 0


def test_a_pair_that_does_not_fit_is_refused_from_the_headers(desk: Desk) -> None:
    file = min(desk.hub.repos["tiny/donor"].glob("model*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name] = tensors[name][:, :16].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    told = desk.crane("merge", "recipe.yaml", code=2).err
    assert name in "".join(told.split())
    assert not list(desk.house.cache.rglob("model*.safetensors"))


@pytest.mark.parametrize(
    ("file", "told"), [("m.Q4_K.gguf", "a GGUF model"), ("pytorch_model.bin", "pickles")]
)
def test_a_repository_in_another_form_is_said_to_be_so(desk: Desk, file: str, told: str) -> None:
    donor = desk.hub.repos["tiny/donor"]
    for weight in (*donor.glob("*.safetensors*"), donor / "config.json"):
        weight.unlink()
    (donor / file).write_bytes(b"x")
    said = desk.crane("plan", "recipe.yaml", code=2).err
    assert told in said and "tiny/donor" in said


@pytest.mark.parametrize(
    ("spoil", "told"),
    [("gated", "hf auth login"), ("revision", "no such revision"), ("away", "cannot be reached")],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(desk: Desk, spoil: str, told: str) -> None:
    if spoil == "gated":
        desk.hub.gated.add("tiny/donor")
    elif spoil == "revision":
        desk.write(yaml.safe_load(desk.recipe.read_text()) | {"donor": "tiny/donor@v2"})
    away = spoil == "away"
    plan = ("plan", "recipe.yaml")
    said = desk.without_network(*plan, code=2) if away else desk.crane(*plan, code=2).err
    assert told in " ".join(said.split()) and "Traceback" not in said


@pytest.mark.slow
def test_a_download_that_broke_ends_well_and_without_a_network_the_cache_serves(desk: Desk) -> None:
    base = desk.hub.repos["tiny/base"]
    largest = max(base.glob("model*.safetensors"), key=lambda f: f.stat().st_size)
    desk.hub.breaks[largest.name] = 1000
    told = desk.crane("merge", "recipe.yaml", "--output", "out").err
    assert desk.hub.breaks == {} and "downloading 2 files of weights" in " ".join(told.split())
    desk.without_network("plan", "recipe.yaml")


def test_a_folder_of_the_cache_is_called_by_its_id(tmp_path: Path) -> None:
    place = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    assert name_in_cache(place) == ("Qwen/Qwen3-0.6B", COMMIT)
    assert name_in_cache(tmp_path / "snapshots" / "x") is None


@pytest.fixture
def published(desk: Desk) -> Desk:
    """The demo's merge from a pair on a hub."""
    desk.crane("merge", "recipe.yaml", "--output", "out")
    return desk


def test_a_merge_is_shown_asked_for_pushed_privately_and_made_again_by_others(
    published: Desk, tmp_path: Path
) -> None:
    desk, hub = published, published.hub
    shown = desk.crane("card", "out").out
    assert "base_model" in shown and "model-00001-of-00002.safetensors" in shown
    told = desk.crane("push", "out", "me/merge", code=2).err
    assert "--yes" in told and "private" in told and "me/merge" not in hub.repos
    hub.full = 1
    desk.crane("push", "out", "me/merge", "--yes", code=2)
    before = len(hub.sent)
    desk.crane("push", "out", "me/merge", "--yes")
    assert hub.private == {"me/merge"} and 0 < before < len(hub.sent)
    there = {p.name: p.read_bytes() for p in hub.repos["me/merge"].iterdir()}
    here = {p.name: p.read_bytes() for p in (desk.folder / "out").iterdir()}
    assert b"../reasoning.jsonl" in here.pop("crane_recipe.yaml") and there == here
    assert all(str(desk.folder).encode() not in content for content in there.values())

    stranger = Desk(desk.house, desk.pair, tmp_path / "other")
    for file in stranger.folder.iterdir():  # who has neither recipe nor rows
        file.unlink()
    rows = ("--data", str(desk.pair.folder))
    assert "--data" in stranger.crane("rebuild", "me/merge", code=2).err
    rebuilt = stranger.crane("rebuild", "me/merge", "--json", *rows).json()
    assert rebuilt["same"] and rebuilt["notes"] == []
    assert {"model-00001-of-00002.safetensors", "config.json"} <= rebuilt["files"].keys()

    changed = hub.repos["me/merge"] / "model-00002-of-00002.safetensors"
    flip_last_bit(changed)
    (hub.repos["me/merge"] / "modeling_evil.py").write_text("print()")
    found = stranger.crane("rebuild", "me/merge", *rows, code=1).out
    assert "not made" in found and "differs" in found
    # A merge that is pushed over another leaves none of its weights.
    (hub.repos["me/merge"] / "model-00003-of-00003.safetensors").write_bytes(b"old")
    desk.crane("push", "out", "me/merge", "--yes")
    assert not (hub.repos["me/merge"] / "model-00003-of-00003.safetensors").exists()


def flip_last_bit(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


def test_a_rebuild_says_what_is_missing_before_any_work(published: Desk, tmp_path: Path) -> None:
    copy, store = tmp_path / "merge", tmp_path / "store"
    shutil.copytree(published.folder / "out", copy)
    for rows in published.folder.glob("*.jsonl"):
        shutil.copy(rows, copy)  # rows that lie with the merge are found
    record = json.loads((copy / "crane.json").read_text())

    def told(**changes: Any) -> str:
        (copy / "crane.json").write_text(json.dumps(record | changes))
        with pytest.raises(BadInput) as refused:
            rebuild(str(copy), Places(store=store))
        assert not store.exists()
        return str(refused.value)

    rows = {**record["rows"], "agent": {"rows": 3, "digest": "of others"}}
    assert "not the agent rows" in told(rows=rows) and "--data" in told(rows=rows)
    calibration = {**record["recipe"]["calibration"]}
    calibration["agent"] = {**calibration["agent"], "data": "own.jsonl"}
    gone = told(recipe={**record["recipe"], "calibration": calibration})
    assert "own.jsonl" in gone and "--data" in gone
    (copy / "crane.json").write_text(json.dumps(record))
    with pytest.raises(RecipeError, match="is the published merge itself"):
        rebuild(str(copy), Places(store=store, output=tmp_path / "x" / ".." / "merge"))
    (copy / "crane.json").unlink()
    with pytest.raises(CheckpointError, match=r"no crane\.json"):
        rebuild(str(copy), Places(store=store))


def test_what_was_changed_after_the_merge_is_not_pushed(published: Desk, tmp_path: Path) -> None:
    copy = tmp_path / "merge"
    shutil.copytree(published.folder / "out", copy)
    file = copy / "model-00001-of-00002.safetensors"
    flip_last_bit(file)
    with pytest.raises(OutputError, match="changed after the merge"):
        upload(parcel_of(copy), "me/other", private=True)
    file.unlink()
    with pytest.raises(OutputError, match="is missing"):
        parcel_of(copy)
    with pytest.raises(OutputError, match="owner/name"):
        check_repo("x")
