"""Layers read in the background are the ones asked for, whole, in whatever order."""

import os
from pathlib import Path

import pytest
import torch
from conftest import TinyPair, load_tensors
from torch import nn

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk import loading
from crane_tasks.models.walk.stream import LayerStream

CPU = torch.device("cpu")


def streamed(folder: Path, compute: torch.dtype = torch.bfloat16) -> LayerStream:
    return LayerStream(Checkpoint.open(folder), device=CPU, compute=compute, resident=False)


def assert_layer(module: nn.Module, folder: Path, index: int) -> None:
    """The weights are those of the files; of the experts, one per stack."""
    tensors = load_tensors(folder)
    prefix = f"model.layers.{index}."
    for name, parameter in module.named_parameters():
        if name.endswith("down_proj") and parameter.dim() == 3:
            wanted, found = tensors[f"{prefix}mlp.experts.3.down_proj.weight"], parameter[3]
        elif name.endswith("gate_up_proj"):
            wanted = tensors[f"{prefix}mlp.experts.2.up_proj.weight"]
            found = parameter[2, parameter.shape[1] // 2 :]
        else:
            wanted, found = tensors[prefix + name], parameter
        assert torch.equal(found, wanted.to(parameter.dtype)), name


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1]])
def test_every_layer_has_its_own_weights_when_its_turn_comes(
    tiny_pair: TinyPair, order: list[int], compute: torch.dtype
) -> None:
    stream = streamed(tiny_pair.base, compute)
    stream.expect(order)
    for index in order:
        with stream.layer(index) as module:
            assert_layer(module, tiny_pair.base, index)


def test_the_next_layer_is_being_read_while_one_runs(moe_pair: TinyPair) -> None:
    stream = streamed(moe_pair.base)
    stream.expect([0, 1])
    with stream.layer(0):
        assert stream._loader._asked == 1


def test_an_order_that_is_left_costs_time_and_nothing_else(moe_pair: TinyPair) -> None:
    stream = streamed(moe_pair.base)
    stream.expect([0, 1])
    for index in (0, 0, 1):
        with stream.layer(index) as module:
            assert_layer(module, moe_pair.base, index)


def test_reads_in_small_blocks_give_the_same_bytes(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "BLOCK", 100)
    with streamed(tiny_pair.base).layer(1) as module:
        assert_layer(module, tiny_pair.base, 1)


def test_a_file_cut_while_it_is_read_is_an_error(moe_pair: TinyPair, tmp_path: Path) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    stream = streamed(pair.base)
    for file in pair.base.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 4)
    with pytest.raises(CheckpointError, match=r"ends before byte"), stream.layer(1):
        pass


def test_a_layer_held_for_its_next_turn_is_read_again_if_another_came_between(
    moe_pair: TinyPair,
) -> None:
    stream = streamed(moe_pair.base)
    stream.expect([1, 1])
    with stream.layer(1):
        pass
    stream.expect([0, 1])
    for index in (0, 1):
        with stream.layer(index) as module:
            assert_layer(module, moe_pair.base, index)
