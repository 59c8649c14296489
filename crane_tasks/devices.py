"""Where a process computes, and what it may take there."""

import torch

from crane_tasks.errors import RecipeError
from crane_tasks.models.files.memory import bound_gpu_memory
from crane_tasks.recipe import Run


def prepare(run: Run) -> tuple[str, ...]:
    """The torch devices that a recipe means, its first one first; this process is held to what
    it may take of them, and to its number of threads.

    "cuda" are all GPUs that are visible, "auto" is the first of them or the CPU.

    Raises:
        RecipeError: a device is not there.
    """
    devices = _devices(run.device)
    if run.gpu_memory and devices != ("cpu",):
        for device in devices:
            bound_gpu_memory(torch.device(device), run.gpu_memory)
    if run.threads:
        torch.set_num_threads(run.threads)
    return devices


def _devices(wanted: str) -> tuple[str, ...]:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not visible):
        return ("cpu",)
    if not visible:
        raise RecipeError(f"run.device: {wanted}, but torch finds no CUDA device; use cpu")
    if wanted in ("auto", "cuda"):
        return tuple(f"cuda:{number}" for number in range(visible if wanted == "cuda" else 1))
    named = tuple(dict.fromkeys(wanted.split(",")))
    if absent := [name for name in named if int(name.removeprefix("cuda:")) >= visible]:
        raise RecipeError(
            f"run.device: {', '.join(absent)}, but torch finds {visible} CUDA devices, "
            "from cuda:0 on"
        )
    return named
