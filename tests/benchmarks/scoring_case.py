"""A generated model and calibration sets, and the ways to score it that are compared."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.losses import Item
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.numerics.scores import stacked_gain_sums

CHUNK = 2  # layers that the chunked scheme unfreezes at a time
WEIGHTS_AT_ONCE = 32 * 2**20
Gains = dict[str, float]  # kind of parameter -> Σp over all layers


@dataclass(frozen=True)
class Case:
    """A model's config and the lengths (prompt, target) of its items."""

    config: dict[str, Any]
    reasoning: tuple[tuple[int, int], ...]
    agent: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(p + t for p, t in (*self.reasoning, *self.agent))

    def sets(self) -> dict[str, list[Item]]:
        """Random items; each set's weights add up to 1."""
        generator = torch.Generator().manual_seed(7)
        vocabulary = self.config["vocab_size"]

        def items(lengths: tuple[tuple[int, int], ...]) -> list[Item]:
            return [
                Item(torch.randint(vocabulary, (p + t,), generator=generator), p, 1 / len(lengths))
                for p, t in lengths
            ]

        return {"reasoning": items(self.reasoning), "agent": items(self.agent)}


def write_case(case: Case, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
    """The model as a published checkpoint is stored: a tensor per expert, a file per layer."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    config = AutoConfig.from_pretrained(folder)
    build: Any = AutoModelForCausalLM.from_config
    with init_empty_weights():
        model = build(config)
    generator = torch.Generator(device).manual_seed(1)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            values.fill_(1.0)
        else:
            values.normal_(0, 0.02, generator=generator)
        parts = name.split(".")
        group = f"layer-{parts[2]}" if parts[1] == "layers" else "outside"
        groups.setdefault(group, {}).update(_published(name, values.cpu()))
    index = {}
    for group, tensors in groups.items():
        save_file(tensors, folder / f"{group}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(tensors, f"{group}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def _published(name: str, values: Tensor) -> dict[str, Tensor]:
    """A module's parameter under the names of published checkpoints."""
    place, _, last = name.rpartition(".experts.")
    if not place or last not in ("gate_up_proj", "down_proj"):
        return {name: values}
    found = {}
    for expert, matrix in enumerate(values):
        parts = {"down_proj": matrix}
        if last == "gate_up_proj":
            gate, up = matrix.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up}
        for part, weight in parts.items():
            found[f"{place}.experts.{expert}.{part}.weight"] = weight.clone()
    return found


def expert_names(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes that published checkpoints have for a module's parameter."""
    place, _, last = name.rpartition(".experts.")
    if not place or last not in ("gate_up_proj", "down_proj"):
        return [(name, shape)]
    parts = ["down_proj"] if last == "down_proj" else ["gate_proj", "up_proj"]
    each = (shape[1] // len(parts), shape[2])
    return [
        (f"{place}.experts.{expert}.{part}.weight", each)
        for expert in range(shape[0])
        for part in parts
    ]


@cache
def made_up_delta(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A delta for some tensors of one shape; made once."""
    steps = torch.linspace(-1e-3, 1e-3, shape[0] * shape[1] * shape[2], device=device)
    return steps.reshape(shape)


def add_gains(gains: dict[str, Tensor], gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The gate's work on a layer, with a made-up delta: the same for every scheme."""
    for name, g_r in gradients["reasoning"].items():
        g_a = gradients["agent"][name]
        rows = g_r.shape[0] if g_r.dim() == 3 else 1
        shape = (rows, g_r.numel() // rows // g_r.shape[-1], g_r.shape[-1])
        step = max(1, WEIGHTS_AT_ONCE // (shape[1] * shape[2]))
        r, a = (g.reshape(shape) for g in (g_r, g_a))
        for first in range(0, rows, step):
            here, other = r[first : first + step], a[first : first + step]
            delta = made_up_delta(tuple(here.shape), here.device)
            gained = stacked_gain_sums(here, delta, here, other)[:, 0].sum()
            gains[name] = gains[name] + gained if name in gains else gained


def numbers(gains: dict[str, Tensor]) -> Gains:
    """The gains on the CPU."""
    return {name: float(gained) for name, gained in gains.items()}


def score_by_walk(stream: LayerStream, case: Case, scratch: Path) -> Gains:
    """This project: one forward and one backward for all layers and both sets."""
    gains: dict[str, Tensor] = {}

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        if layer is not None:
            add_gains(gains, gradients)

    walk = GradientWalk(stream, case.sets(), States(scratch), kept=torch.bfloat16)
    walk.run(visit, (), lambda step: None)
    return numbers(gains)


def open_stream(folder: Path, device: str, compute: torch.dtype, *, resident: bool) -> LayerStream:
    """The streaming engine on a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    return LayerStream(checkpoint, device=torch.device(device), compute=compute, resident=resident)


def load_whole(folder: Path, device: str, compute: torch.dtype) -> Any:
    """The whole model, as the chunked scheme holds it."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=compute, experts_implementation="grouped_mm", device_map=device)
    return model.requires_grad_(False)


def score_by_chunks(model: Any, case: Case) -> Gains:
    """The chunked scheme: the whole model resident, a few layers unfrozen at a time.

    Every chunk takes one forward and backward over all items of each set, item by item,
    with gradient checkpointing.
    """
    model.train()  # gradient checkpointing works in training mode alone; there is no dropout
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    gains: dict[str, Tensor] = {}
    layers = model.model.layers
    for first in range(0, len(layers), CHUNK):
        chunk = [dict(layer.named_parameters()) for layer in layers[first : first + CHUNK]]
        for parameters in chunk:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        gradients: dict[str, list[dict[str, Tensor]]] = {}
        for name, items in case.sets().items():
            for item in items:
                torch.autograd.backward(_item_loss(model, item))
            gradients[name] = [{k: _taken(p) for k, p in found.items()} for found in chunk]
        for place, parameters in enumerate(chunk):
            add_gains(gains, {name: found[place] for name, found in gradients.items()})
            for parameter in parameters.values():
                parameter.requires_grad_(False)
    return numbers(gains)


def _taken(parameter: Tensor) -> Tensor:
    found, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if found is None else found


def _item_loss(model: Any, item: Item) -> Tensor:
    ids = item.ids.to(model.device)
    labels = ids.clone()
    labels[: item.prompt] = -100
    loss: Tensor = model(input_ids=ids[None], labels=labels[None]).loss
    return loss * item.weight


def worst_difference(ours: Gains, theirs: Gains) -> float:
    """Largest relative difference of any kind of parameter's gain."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[k] - theirs[k]) / abs(theirs[k]) for k in theirs)


def cost_on_cpu(case: Case, folder: Path, scheme: str) -> dict[str, Any]:
    """CPU seconds, and bytes of memory above those of the interpreter and its libraries."""
    before, start = _resident_bytes(), time.process_time()
    if scheme == "walk":
        stream = open_stream(folder, "cpu", torch.float32, resident=False)
        gains = score_by_walk(stream, case, folder / "scratch")
    else:
        gains = score_by_chunks(load_whole(folder, "cpu", torch.float32), case)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.process_time() - start, "memory": peak - before, "gains": gains}


def cost_on_gpu(case: Case, folder: Path, scheme: str) -> dict[str, Any]:
    """Seconds of a second scoring, and the peak of the device's memory in it.

    The first one chooses kernels and page-locks memory, which a model of 48 layers does
    once, too.
    """
    bf16 = torch.bfloat16
    if scheme == "chunks":
        model = load_whole(folder, "cuda", bf16)

        def score(case: Case, scratch: str) -> Gains:
            return score_by_chunks(model, case)
    else:
        stream = open_stream(folder, "cuda", bf16, resident=scheme == "resident")

        def score(case: Case, scratch: str) -> Gains:
            return score_by_walk(stream, case, folder / scratch)

    score(case, f"{scheme}-warm")
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    gains = score(case, scheme)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated(), "gains": gains}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Score in a process of its own: CASE.json FOLDER DEVICE SCHEME; prints the cost as JSON."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401  (not to be timed)

    file, folder, device, scheme = sys.argv[1:]
    case = Case(**json.loads(Path(file).read_text()))
    measure = cost_on_cpu if device == "cpu" else cost_on_gpu
    sys.stdout.write(json.dumps(measure(case, Path(folder), scheme)) + "\n")


if __name__ == "__main__":
    main()
