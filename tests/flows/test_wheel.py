"""The wheel, as `pip install` brings it into an environment that has nothing of this folder."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from prefect_site import running

ROOT = Path(__file__).parents[2]


def told(*command: str | Path, folder: Path, **env: str) -> str:
    """What a command prints, run in a folder without this project on the path."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=own | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and what its ranges bring."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files in its folder, which the next one takes up
    parts = ("flows", "crane_tasks", "artifacts", "pyproject.toml", "README.md", "LICENSE")
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / part, source / part)
    told(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, folder=folder)
    told(sys.executable, "-m", "venv", folder / "env", folder=folder)
    python = folder / "env" / "bin" / "python"
    # Any range of torch brings gigabytes for a GPU; all else is as new as there is.
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    (folder / "torch.txt").write_text(f"{torch}\n")
    (wheel,) = folder.glob("crane_merge-*.whl")
    told(python, "-m", "pip", "install", "--quiet", "-c", folder / "torch.txt",
         f"{wheel}[trackio]", folder=folder)  # fmt: skip
    return python


@pytest.mark.slow
def test_the_wheel_merges_the_demo_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    crane = python.with_name("crane")
    merged = json.loads(
        told(crane, "merge", "tiny", "--set", "evaluate.generate=0", "--json", folder=tmp_path)
    )
    losses = {name: m["reasoning_loss"] for name, m in merged["evaluation"]["models"].items()}
    assert losses["merged"] < 0.1 * losses["base"]
    load = (
        "import sys, transformers; "
        "print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())"
    )
    assert int(told(python, "-c", load, merged["output"], folder=tmp_path)) > 0
    assert f"crane {metadata.version('crane-merge')}\n" == told(crane, "--version", folder=tmp_path)


@pytest.mark.slow
def test_a_sweep_tells_a_tracker_of_each_point(python: Path, tmp_path: Path) -> None:
    swept = json.loads(
        told(
            python.with_name("crane"), "sweep", "tiny", "--alpha", "0.2,0.6", "--json",
            "--set", "evaluate.generate=0", "--set", "run.tracker=trackio",
            folder=tmp_path, TRACKIO_DIR=str(tmp_path / "tracked"),
        )
    )  # fmt: skip
    with sqlite3.connect(tmp_path / "tracked" / "crane-tiny.db") as tracked:
        known = [json.loads(m) for (m,) in tracked.execute("select metrics from metrics")]
    found = [point["metrics"]["reasoning_loss"] for point in swept["points"]]
    assert [one["reasoning_loss"] for one in known] == pytest.approx(found)


@pytest.mark.slow
def test_the_wheel_brings_the_page(python: Path, tmp_path: Path) -> None:
    with running(tmp_path, python) as site:
        assert site.deployment("merge")["name"] == "merge"
        run = site.start("merge", recipe="tiny", advanced={"overrides": ["evaluate.generate=0"]})
        assert site.state(run) == "Completed", site.logs(run)
