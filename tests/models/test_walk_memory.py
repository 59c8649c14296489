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
# A walk in a process of its own: FOLDER BUDGET SCRATCH; prints its peak in bytes.
WALK = """
import json, resource, sys
from pathlib import Path
import torch
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.gradients import GradientWalk
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.losses import Item
from crane_tasks.models.walk.stream import LayerStream

folder, budget, scratch = sys.argv[1:]
stream = LayerStream(
    Checkpoint.open(Path(folder)), device=torch.device("cpu"), compute=torch.float32, resident=False
)
items = [Item(torch.arange(32), 8, 1 / 4)] * 4
states = States(Path(scratch), None if budget == "all" else int(budget))
walk = GradientWalk(stream, {"reasoning": items, "agent": items}, states, kept=torch.bfloat16)
walk.run(lambda layer, gradients: None, (), lambda step: None)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
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


def growth(depths: dict[int, Path], budget: str, scratch: Path) -> int:
    """Bytes by which the deep model's peak exceeds the shallow one's."""
    peaks: list[int] = []
    for layers in (SHALLOW, DEEP):
        command = [sys.executable, "-c", WALK, str(depths[layers]), budget, str(scratch / budget)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks.append(json.loads(done.stdout))
    return peaks[1] - peaks[0]


def float32_bytes(checkpoint: Checkpoint) -> int:
    """The weights in the dtype of the walk."""
    return 2 * sum(entry.nbytes for entry in checkpoint.entries.values())


def test_peak_memory_does_not_grow_with_the_layers(depths: dict[int, Path], tmp_path: Path) -> None:
    more = sum(
        sign * float32_bytes(Checkpoint.open(depths[layers]))
        for layers, sign in ((DEEP, 1), (SHALLOW, -1))
    )
    # Spilled to disk, the boundaries do not count; one layer is a sixteenth of `more`.
    assert growth(depths, "0", tmp_path) < more / 16


def test_beyond_that_it_grows_by_the_boundaries_alone(
    depths: dict[int, Path], tmp_path: Path
) -> None:
    boundary = TOKENS * 256 * 4
    layer = float32_bytes(Checkpoint.open(depths[SHALLOW])) / SHALLOW
    assert growth(depths, "all", tmp_path) < (DEEP - SHALLOW + 2) * boundary + layer
