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
from crane_tasks.identity import name_in_cache

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
        """A command; its output."""
        own = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.folder / "hf"),
               "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **env}  # fmt: skip
        command = [sys.executable, "-m", "flows.cli", *arguments, str(self.recipe)]
        command += ["--store", str(self.folder / "store")]
        ended = subprocess.run(
            command, env=os.environ | own, cwd=self.folder, capture_output=True, text=True
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
    with serving(Hub(repos)) as hub:
        yield Desk(hub, tmp_path / "desk")


def weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("model*.safetensors"))


def test_a_plan_downloads_no_weights_and_its_keys_are_the_merges(desk: Desk) -> None:
    plan = json.loads(desk.crane("plan", "--json").stdout)
    stages = {s["name"]: s for s in plan["stages"]}
    assert stages["delta"]["status"] == "computed" and stages["delta"]["disk"] > 0
    whole = sum(weights(folder) for folder in desk.hub.repos.values())
    # Headers alone, which the library asks for in 100 KB.
    assert desk.hub.fetched(".safetensors") < 0.2 * whole
    assert not list((desk.folder / "hf").rglob("model*.safetensors"))
    ended = desk.crane("merge", "--json", "--output", str(desk.folder / "out"))
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
