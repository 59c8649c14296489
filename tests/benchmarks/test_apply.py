"""Applying an edit: against the ceiling, mergekit's task arithmetic, and a loop over shards.

The ceiling reads both checkpoints and writes one, with nothing in between.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from apply_case import ALPHA, write_pair
from test_scoring import qwen3_moe, show

CUDA = torch.cuda.is_available()
MERGEKIT = "mergekit==0.1.5"
# The true shapes of a layer of Qwen3-30B-A3B.
SHAPES = dict(
    hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8,
)  # fmt: skip
Cost = dict[str, float]


def config(layers: int, experts: int, vocabulary: int) -> dict[str, Any]:
    """Qwen3-MoE with layers of the true shape."""
    return qwen3_moe(layers, num_experts=experts, vocab_size=vocabulary, **SHAPES)


def gigabytes(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9


# A process's peak RSS counts from before its exec, so a small one must start it.
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
found = {"wall": time.perf_counter() - began, "cpu": usage.ru_utime + usage.ru_stime,
         "rss": usage.ru_maxrss * 1024.0}
open(sys.argv[1], "w").write(json.dumps(found))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def took(folder: Path, command: list[str]) -> Cost:
    """Wall time, CPU seconds and peak RSS of a whole process, and what it prints of itself."""
    here = Path(__file__).parent
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    env.pop("OMP_NUM_THREADS", None)  # every way may use all cores
    record = folder / "took.json"
    launch = [sys.executable, "-S", "-c", LAUNCHER, str(record), *command]
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cost: Cost = json.loads(record.read_text())
    last = done.stdout.splitlines()[-1:] or [""]
    return cost | (json.loads(last[0]) if last[0].startswith("{") else {})


def ours(folder: Path, way: str, device: str = "cpu", alpha: float = ALPHA) -> Cost:
    """One of the ways of apply_case in a process of its own; its output is removed."""
    worker = str(Path(__file__).with_name("apply_case.py"))
    command = [sys.executable, worker, way, str(folder), device, str(alpha), str(folder / "out")]
    return took(folder, command)


def best(folder: Path, way: str) -> Cost:
    """The faster of two: the first may wait for pages that others had."""
    return min((ours(folder, way) for _ in range(2)), key=lambda cost: cost["wall"])


def mergekit(folder: Path) -> list[str]:
    """The command of mergekit's task arithmetic on the pair, in an environment of its own."""
    place = Path(__file__).parents[2] / "build" / "mergekit"
    program = place / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        done = subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}", MERGEKIT])
        if done.returncode:
            pytest.skip(f"{MERGEKIT} cannot be installed here")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "donor"), "parameters": {"weight": ALPHA}}],
        "dtype": "bfloat16",
    }
    file = folder / "mergekit.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return [str(program), str(file), str(folder / "out"), "--quiet"]


def table(costs: dict[str, Cost], size: float) -> list[list[str]]:
    """A line per way, with ratios to the ceiling and, where it ran, to mergekit."""
    ceiling, peer = costs["ceiling"]["wall"], costs.get("mergekit task_arithmetic")
    rows = [["", "wall s", "CPU s", "peak RSS MB", "GB/s", "of ceiling", "of mergekit"]]
    for name, cost in costs.items():
        rows.append(
            [
                name,
                f"{cost['wall']:.1f}",
                f"{cost['cpu']:.1f}",
                f"{cost['rss'] / 1e6:.0f}",
                f"{size / cost['wall']:.2f}",
                f"{cost['wall'] / ceiling:.2f}x",
                f"{cost['wall'] / peer['wall']:.2f}x" if peer else "",
            ]
        )
    return rows


@pytest.mark.slow
def test_apply_against_the_ceiling_mergekit_and_a_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole processes, imports included; delta and thresholds are what a first run adds."""
    write_pair(config(layers=2, experts=128, vocabulary=4096), tmp_path)
    size = gigabytes(tmp_path / "base")
    ours(tmp_path, "copy")  # both pairs into the page cache
    prepared = ours(tmp_path, "prepare")
    costs = {
        "ceiling": best(tmp_path, "copy"),
        "ceiling, flushed to disk": best(tmp_path, "copy and sync"),
        "mergekit task_arithmetic": took(tmp_path, mergekit(tmp_path)),
        "shard-at-a-time loop": ours(tmp_path, "loop"),
        "crane: delta and thresholds": prepared,
        "crane: apply": ours(tmp_path, "apply"),
        "crane: apply, new alpha": ours(tmp_path, "apply", alpha=0.15),
    }
    first = [costs["crane: delta and thresholds"], costs["crane: apply"]]
    costs["crane: first run"] = {
        "wall": sum(c["wall"] for c in first),
        "cpu": sum(c["cpu"] for c in first),
        "rss": max(c["rss"] for c in first),
    }
    title = f"apply, {size:.2f} GB of Qwen3-MoE in bfloat16, {os.cpu_count()} cores"
    show(capsys, title, table(costs, size))
    rerun = costs["crane: apply, new alpha"]
    assert rerun["cpu"] < costs["shard-at-a-time loop"]["cpu"]
    assert rerun["rss"] < costs["mergekit task_arithmetic"]["rss"]


@pytest.mark.slow
def test_apply_grows_with_the_model_in_time_but_not_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers of 1 GB: time per GB stays, peak RSS does not follow the size."""
    rows = [["GB", "wall s", "CPU s per GB", "peak RSS MB"]]
    peaks, rates = [], []
    for layers in (1, 2, 4):
        folder = tmp_path / str(layers)
        folder.mkdir()
        write_pair(config(layers, experts=103, vocabulary=1024), folder)
        size = gigabytes(folder / "base")
        ours(folder, "prepare")
        cost = ours(folder, "apply")
        peaks.append(cost["rss"])
        rates.append(cost["cpu"] / size)
        rows.append(
            [f"{size:.1f}", f"{cost['wall']:.1f}", f"{rates[-1]:.1f}", f"{peaks[-1] / 1e6:.0f}"]
        )
        shutil.rmtree(folder)
    show(capsys, "apply, growing", rows)
    assert peaks[-1] < peaks[0] + 200e6, "memory follows the size of the model"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_apply_on_a_gpu_at_the_true_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 layers of Qwen3-30B-A3B; seconds of the work alone."""
    write_pair(config(layers=8, experts=128, vocabulary=151936), tmp_path, "cuda")
    size = gigabytes(tmp_path / "base")
    ours(tmp_path, "prepare", "cuda")
    ways = {"copy": 2, "copy and sync": 2, "loop": 1, "apply": 2}  # the last time counts
    costs = {way: [ours(tmp_path, way, "cuda") for _ in range(n)][-1] for way, n in ways.items()}
    ceiling = costs["copy and sync"]["seconds"]
    rows = [["", "seconds", "GB/s", "of the ceiling", "peak RSS GB", "peak GPU GB"]]
    names = {"copy": "ceiling, not flushed", "copy and sync": "ceiling"}
    for way, cost in costs.items():
        rows.append(
            [
                names.get(way, way),
                f"{cost['seconds']:.2f}",
                f"{size / cost['seconds']:.2f}",
                f"{cost['seconds'] / ceiling:.2f}x",
                f"{cost['rss'] / 1e9:.1f}",
                f"{cost['peak_gpu'] / 1e9:.1f}",
            ]
        )
    show(capsys, f"apply, {size:.1f} GB, {torch.cuda.get_device_name()}", rows)
    assert costs["apply"]["seconds"] < costs["loop"]["seconds"]
