"""Pairs on the hub: looked at before they are downloaded, and no more of them than is needed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_site import COMMIT, Hub, serving
from safetensors.torch import load_file, save_file

import flows
from crane_tasks.errors import BadInput, CheckpointError, OutputError
from crane_tasks.identity import name_in_cache
from flows.publish import check_repo, parcel_of, upload
from flows.rebuild import Places, rebuild

STORE = ("--store", "store")
RECIPES = Path(str(flows.__file__)).parent / "recipes"


class Desk:
    """A recipe whose pair is on a hub, and commands in processes of their own."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.recipe = folder / "recipe.yaml"
        data = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
        data |= {"base": "tiny/base", "donor": "tiny/donor"}
        data["evaluate"]["generate"] = 0
        self.write(data)
        own = shutil.ignore_patterns("base", "donor")
        shutil.copytree(RECIPES / "tiny", folder / "tiny", ignore=own)

    def write(self, data: dict[str, Any]) -> None:
        self.recipe.write_text(yaml.safe_dump(data))

    def crane(self, *arguments: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """A command on the recipe; its output."""
        return self.plain(*arguments, str(self.recipe), code=code, **env)

    def plain(self, *arguments: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """A command that takes a store, or none that needs one."""
        # The hub's newer way of uploading has servers of its own.
        own = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_" + 34 * "a",
               "HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.folder / "hf"),
               "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **env}  # fmt: skip
        command = [sys.executable, "-m", "flows.cli", *arguments]
        ended = subprocess.run(
            command,
            env=os.environ | own,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
        return ended


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Both sides of the demo pair, with what a repository has besides."""
    repos = {}
    for side in ("base", "donor"):
        repos[f"tiny/{side}"] = own = tmp_path / "hub" / side
        shutil.copytree(RECIPES / "tiny" / side, own)
        (own / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        (own / "LICENSE").write_text("Apache License")
        (own / "consolidated.safetensors").write_bytes(b"x" * 10_000)
        (own / "onnx").mkdir()
        (own / "onnx" / "config.json").write_text("{}")
    (tmp_path / "desk").mkdir()
    with serving(Hub(repos, new=tmp_path / "new")) as hub:
        yield Desk(hub, tmp_path / "desk")


def weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("model*.safetensors"))


def test_a_plan_downloads_no_weights_and_its_keys_are_the_merges(desk: Desk) -> None:
    plan = json.loads(desk.crane("plan", "--json", *STORE).stdout)
    stages = {s["name"]: s for s in plan["stages"]}
    assert stages["delta"]["status"] == "computed" and stages["delta"]["disk"] > 0
    whole = sum(weights(folder) for folder in desk.hub.repos.values())
    # Headers alone, which the library asks for in 100 KB.
    assert desk.hub.fetched(".safetensors") < 0.2 * whole
    assert not list((desk.folder / "hf").rglob("model*.safetensors"))
    ended = desk.crane("merge", "--json", *STORE, "--output", str(desk.folder / "out"))
    merged = json.loads(ended.stdout)
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
    told = desk.crane("merge", code=2).stderr
    assert "tiny/donor" in told and "Check the spelling" in " ".join(told.split())
    assert desk.hub.fetched(".safetensors") == 0


def test_a_pair_that_does_not_fit_is_refused_from_the_headers(desk: Desk) -> None:
    file = min(desk.hub.repos["tiny/donor"].glob("model*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name] = tensors[name][:, :16].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    told = desk.crane("merge", code=2).stderr
    assert name in "".join(told.split())
    assert not list((desk.folder / "hf").rglob("model*.safetensors"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [("gated", "hf auth login"), ("revision", "no such revision"), ("away", "cannot be reached")],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(desk: Desk, spoil: str, told: str) -> None:
    env = {}
    if spoil == "gated":
        desk.hub.gated.add("tiny/donor")
    elif spoil == "revision":
        desk.write(yaml.safe_load(desk.recipe.read_text()) | {"donor": "tiny/donor@v2"})
    else:
        env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    said = " ".join(desk.crane("plan", code=2, **env).stderr.split())
    assert told in said and "Traceback" not in said


def test_a_download_that_broke_ends_well_and_without_a_network_the_cache_serves(desk: Desk) -> None:
    base = desk.hub.repos["tiny/base"]
    largest = max(base.glob("model*.safetensors"), key=lambda f: f.stat().st_size)
    desk.hub.breaks[largest.name] = 1000
    told = desk.crane("merge", "--output", str(desk.folder / "out")).stderr
    assert desk.hub.breaks == {} and "downloading 2 files of weights" in " ".join(told.split())
    desk.crane("plan", HF_ENDPOINT="http://127.0.0.1:9")


def test_a_folder_of_the_cache_is_called_by_its_id(tmp_path: Path) -> None:
    place = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    assert name_in_cache(place) == ("Qwen/Qwen3-0.6B", COMMIT)
    assert name_in_cache(tmp_path / "snapshots" / "x") is None


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The demo's merge from a pair on a hub, pushed there by itself."""
    folder = tmp_path_factory.mktemp("published")
    repos = {}
    for side in ("base", "donor"):
        repos[f"tiny/{side}"] = folder / "hub" / side
        shutil.copytree(RECIPES / "tiny" / side, repos[f"tiny/{side}"])
    (folder / "desk").mkdir()
    with serving(Hub(repos, new=folder / "new")) as hub:
        desk = Desk(hub, folder / "desk")
        desk.crane("merge", "--output", str(desk.folder / "out"), "--store", "store")
        yield desk


def test_a_merge_is_shown_asked_for_pushed_privately_and_made_again_by_others(
    published: Desk, tmp_path: Path
) -> None:
    desk, hub = published, published.hub
    shown = desk.plain("card", "out").stdout
    assert "base_model" in shown and "model-00001-of-00002.safetensors" in shown
    told = desk.plain("push", "out", "me/merge", code=2).stderr
    assert "--yes" in told and "private" in told and "me/merge" not in hub.repos
    hub.full = 1
    desk.plain("push", "out", "me/merge", "--yes", code=2)
    before = len(hub.sent)
    desk.plain("push", "out", "me/merge", "--yes")
    assert hub.private == {"me/merge"} and 0 < before < len(hub.sent)
    there = {p.name: p.read_bytes() for p in hub.repos["me/merge"].iterdir()}
    assert there == {p.name: p.read_bytes() for p in (desk.folder / "out").iterdir()}

    other = Desk(hub, tmp_path)
    shutil.rmtree(tmp_path / "tiny")  # a stranger has neither recipe nor rows
    other.recipe.unlink()
    rebuilt = json.loads(other.plain("rebuild", "me/merge", "--json").stdout)
    assert rebuilt["same"] and rebuilt["notes"] == []
    assert {"model-00001-of-00002.safetensors", "config.json"} <= rebuilt["files"].keys()

    changed = hub.repos["me/merge"] / "model-00002-of-00002.safetensors"
    whole = bytearray(changed.read_bytes())
    whole[-1] ^= 1
    changed.write_bytes(whole)
    (hub.repos["me/merge"] / "modeling_evil.py").write_text("print()")
    found = other.plain("rebuild", "me/merge", code=1).stdout
    assert "not made" in found and "differs" in found
    # A merge that is pushed over another leaves none of its weights.
    (hub.repos["me/merge"] / "model-00003-of-00003.safetensors").write_bytes(b"old")
    desk.plain("push", "out", "me/merge", "--yes")
    assert not (hub.repos["me/merge"] / "model-00003-of-00003.safetensors").exists()


def test_a_rebuild_says_what_is_missing_before_any_work(published: Desk, tmp_path: Path) -> None:
    copy, store = tmp_path / "merge", tmp_path / "store"
    shutil.copytree(published.folder / "out", copy)
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
    (copy / "crane.json").unlink()
    with pytest.raises(CheckpointError, match=r"no crane\.json"):
        rebuild(str(copy), Places(store=store))


def test_what_was_changed_after_the_merge_is_not_pushed(published: Desk, tmp_path: Path) -> None:
    copy = tmp_path / "merge"
    shutil.copytree(published.folder / "out", copy)
    file = copy / "model-00001-of-00002.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(OutputError, match="changed after the merge"):
        upload(parcel_of(copy), "me/other", private=True)
    file.unlink()
    with pytest.raises(OutputError, match="is missing"):
        parcel_of(copy)
    with pytest.raises(OutputError, match="owner/name"):
        check_repo("x")
