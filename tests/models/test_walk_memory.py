"""Peak memory of a walk: a layer, its gradients and the boundaries, however many layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_checkpoint

from crane_tasks.models.files.checkpoint import Checkpoint

SHALLOW, DEEP = 4, 20
TOKENS = 2 * 4 * 32
# Walks, each in a process of its own that is forked from one with all libraries: FOLDER BUDGET
# SCRATCH of each; prints their peaks in bytes.
WALKS = """
import gc, json, os, resource, sys
from pathlib import Path
import torch
from transformers.models.qwen3 import modeling_qwen3
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.gradients import GradientWalk
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.losses import Item
from crane_tasks.models.walk.stream import LayerStream

def walk(folder, budget, scratch):
    stream = LayerStream(
        Checkpoint.open(Path(folder)), device=torch.device("cpu"), compute=torch.float32,
        resident=False,
    )
    items = [Item(torch.arange(32), 8, 1 / 4)] * 4
    states = States(Path(scratch), None if budget == "all" else int(budget))
    both = {"reasoning": items, "agent": items}
    walk = GradientWalk(stream, both, states, kept=torch.bfloat16)
    walk.run(lambda layer, gradients: None, (), lambda step: None)

gc.collect()
gc.freeze()
for args in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        walk(*args)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
"""


@pytest.fixture(scope="module")
def depths(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model with few and with many layers."""
    folder = tmp_path_factory.mktemp("depths")
    found = {}
    for layers in (SHALLOW, DEEP):
        config = tiny_config(
            "qwen3", num_hidden_layers=layers, hidden_size=256, intermediate_size=8192
        )
        write_checkpoint(folder / str(layers), config, seed=1, dtype=torch.bfloat16)
        found[layers] = folder / str(layers)
    return found


@pytest.fixture(scope="module")
def growths(depths: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """By budget, the bytes by which the deep model's peak exceeds the shallow one's."""
    scratch, budgets = tmp_path_factory.mktemp("scratch"), ("0", "all")
    walks = [
        (str(depths[layers]), budget, str(scratch / f"{budget}-{layers}"))
        for budget in budgets
        for layers in (SHALLOW, DEEP)
    ]
    command = [sys.executable, "-c", WALKS, json.dumps(walks)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peaks = [int(line) for line in done.stdout.split()]
    shallow, deep = peaks[::2], peaks[1::2]
    return {b: d - s for b, s, d in zip(budgets, shallow, deep, strict=True)}


def float32_bytes(checkpoint: Checkpoint) -> int:
    """The weights in the dtype of the walk."""
    return 2 * sum(entry.nbytes for entry in checkpoint.entries.values())


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_layers(
    depths: dict[int, Path], growths: dict[str, int]
) -> None:
    more = sum(
        sign * float32_bytes(Checkpoint.open(depths[layers]))
        for layers, sign in ((DEEP, 1), (SHALLOW, -1))
    )
    # Spilled to disk, the boundaries do not count; one layer is a sixteenth of `more`.
    assert growths["0"] < more / 16


@pytest.mark.slow
def test_beyond_that_it_grows_by_the_boundaries_alone(
    depths: dict[int, Path], growths: dict[str, int]
) -> None:
    boundary = TOKENS * 256 * 4
    layer = float32_bytes(Checkpoint.open(depths[SHALLOW])) / SHALLOW
    assert growths["all"] < (DEEP - SHALLOW + 2) * boundary + layer
