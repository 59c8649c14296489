"""A model's weights and buffers: whether all fit, put into its modules, and taken out of them."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.memory import free_gpu_memory, free_memory
from crane_tasks.models.walk.loading import Loader
from crane_tasks.models.walk.skeleton import stored_buffers


def fits(checkpoint: Checkpoint, device: torch.device, compute: torch.dtype) -> bool:
    """Whether all weights, in `compute` dtype, may stay.

    They may take half of a GPU's free memory, and a quarter of the host's, where hidden
    states may take half.
    """
    weights = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    if device.type == "cuda":
        return 2 * weights * compute.itemsize <= free_gpu_memory(device)
    return 4 * weights * compute.itemsize <= free_memory()


def give_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters of a module, under its names for them."""
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        module.get_submodule(owner).register_parameter(leaf, parameter)


def drop_weights(module: nn.Module) -> None:
    """Leave the shapes of a module's parameters, and no memory."""
    weights = {n: torch.empty_like(p, device="meta") for n, p in module.named_parameters()}
    give_weights(module, weights)


def replica(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on a device, also on its own."""
    moved: dict[int, Tensor] = {}
    for p in module.parameters():
        there = p.detach().to(device, non_blocking=True, copy=True)
        moved[id(p)] = nn.Parameter(there, requires_grad=p.requires_grad)
    for b in module.buffers():
        moved[id(b)] = b.to(device)
    return copy.deepcopy(module, moved)


def load_buffers(model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    """Put all buffers of a model on the device, the layers' too; those that are stored are read.

    They are few and small, so that they stay. Their dtype is the model's choice, which
    need not be that of the weights (GLM's router works in float32).
    """
    stored = {name: checkpoint.source(name) for name in stored_buffers(model)}
    read = Loader(torch.device("cpu"))
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{place}.{name}" if place else name
            value = buffer
            if full in stored:
                value = read.take(0, {full: stored[full]}, buffer.dtype)[full]
            module._buffers[name] = value.to(device=device, dtype=buffer.dtype)
