"""The whole pipeline on a random pair at the true shapes of a published one.

    python tests/benchmarks/full_size.py KIND LAYERS FOLDER [--output FOLDER] [--device cuda]

KIND is 30b (Qwen3-30B-A3B) or 80b (Qwen3-Next-80B-A3B), with so many of its 48 layers. A pair of
weights is written into FOLDER, if none is there (122 GB for all of the 30B: a memory file system
holds it), merged, merged again with another alpha, and swept over two taus and three alphas. What
an earlier run has stored goes. Printed are seconds and peaks of memory per stage, and the ratio to
a plain program that reads both checkpoints twice and writes a delta and an output of their size.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from conftest import write_tokenizer  # noqa: E402
from scoring_case import expert_names  # noqa: E402
from test_scoring import qwen3_30b, qwen3_next_80b  # noqa: E402

from artifacts.store import Built, Store  # noqa: E402
from crane_tasks.models.files.safetensors_io import ShardWriter  # noqa: E402
from crane_tasks.recipe_file import recipe_from  # noqa: E402
from crane_tasks.session import Context, Session  # noqa: E402
from crane_tasks.stage import Keys, Stage  # noqa: E402
from flows.merge import merge  # noqa: E402
from flows.sweep import sweep  # noqa: E402

SPREAD, NOISE = 0.02, 0.02  # of the weights, and of the delta relative to them
WRITERS = 6
INDEX = "model.safetensors.index.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz "
TAUS, ALPHAS = (0.01, 0.03), (0.15, 0.25, 0.35)
GB = 1e9


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def config_of(kind: str, layers: int) -> dict[str, Any]:
    """The config of a published model with so many layers."""
    if kind == "30b":
        return qwen3_30b(layers).config
    types = ["full_attention" if n % 4 == 3 else "linear_attention" for n in range(layers)]
    return {**qwen3_next_80b().config, "num_hidden_layers": layers, "layer_types": types}


def groups_of(config: dict[str, Any], folder: Path) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The published tensors' names and shapes, a group per layer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    build: Any = AutoModelForCausalLM.from_config
    with init_empty_weights():
        model = build(AutoConfig.from_pretrained(folder))
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        group = f"layer-{int(parts[2]):02}" if parts[1] == "layers" else "outside"
        groups.setdefault(group, []).extend(expert_names(name, tuple(parameter.shape)))
    return groups


def write_pair(config: dict[str, Any], folder: Path, device: str) -> None:
    """Base and donor in bfloat16."""
    sides = [folder / "base", folder / "donor"]
    groups = groups_of(config, sides[0])
    shutil.copytree(sides[0], sides[1])

    def write(item: tuple[int, str]) -> int:
        number, group = item
        tensors = groups[group]
        counts = [math.prod(shape) for _, shape in tensors]
        random_numbers = torch.Generator(device).manual_seed(number)
        weights = torch.empty(sum(counts), dtype=torch.bfloat16, device=device)
        weights.normal_(0, SPREAD, generator=random_numbers)
        moved = torch.empty_like(weights).normal_(0, SPREAD * NOISE, generator=random_numbers)
        moved += weights
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        for (name, _), first, last in zip(tensors, ends, ends[1:], strict=False):
            if name.endswith("norm.weight") and config["model_type"] != "qwen3_next":
                weights[first:last] += 1.0
                moved[first:last] += 1.0
        announced = [(name, "BF16", shape) for name, shape in tensors]
        for side, flat in zip(sides, (weights, moved), strict=True):
            file = side / f"{group}.safetensors"
            with ShardWriter(file, announced, {"format": "pt"}, durable=False) as writer:
                writer.write(flat)
                writer.close()
        return 2 * sum(counts)

    with ThreadPoolExecutor(WRITERS) as pool:
        size = sum(pool.map(write, enumerate(groups)))
    weight_map = {n: f"{g}.safetensors" for g, tensors in groups.items() for n, _ in tensors}
    for side in sides:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (side / INDEX).write_text(json.dumps(index))
        write_tokenizer(side)
    return size


def write_rows(folder: Path, times: int) -> None:
    """36 + 16 items of about 90,000 tokens, 400 format rows of 380,000, and 32 held-out rows;
    of each so many times as many."""
    letters = random.Random(3)

    def text(length: int) -> str:
        return "".join(letters.choices(LETTERS, k=length))

    def rows(file: str, count: int, prompt: int, target: int) -> None:
        lines = [
            json.dumps({
                "messages": [{"role": "user", "content": text(prompt)}],
                **({"completion": f"<think>{text(target)}</think>"} if target else {}),
            })
            for _ in range(times * count)
        ]  # fmt: skip
        (folder / file).write_text("\n".join(lines) + "\n")

    rows("reasoning.jsonl", 36, 110, 1920)
    rows("agent.jsonl", 16, 490, 512)
    rows("format.jsonl", 400, 930, 0)
    rows("heldout.jsonl", 16, 110, 900)


def recipe_at(
    folder: Path, output: Path, device: str, memory: str | None = None, **changes: Any
) -> Any:
    """The recipe; given targets, no answers: nothing is decoded."""
    row_set = {"max_prompt_length": 4096}
    data = {
        "name": "full-size",
        "base": str(folder / "base"),
        "donor": str(folder / "donor"),
        "alpha": 0.25,
        "tau": 0.03,
        "calibration": {
            "reasoning": {"data": "reasoning.jsonl", **row_set},
            "agent": {"data": "agent.jsonl", **row_set},
            "format": {"data": "format.jsonl", "max_length": 2048, "patterns": ["<|im_start|>"]},
        },
        "gate": {"store_gradients": False},
        "evaluate": {"reasoning": "heldout.jsonl", "agent": "heldout.jsonl", "generate": 0,
                     "max_prompt_length": 4096, "calls": "hermes"},
        "run": {"device": device, "output": str(output), "gpu_memory": memory},
        **changes,
    }  # fmt: skip
    return recipe_from(data, (folder,), "full-size")


@dataclass
class Watch:
    """What each stage took: seconds, and peaks of one GPU's and host memory in bytes."""

    device: str
    rows: list[tuple[str, float, int, int]] = field(default_factory=list)

    @contextmanager
    def over(self, title: str) -> Iterator[None]:
        """Note a piece of work."""
        cuda = self.device.startswith("cuda")
        if cuda:
            torch.cuda.empty_cache()
            for number in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(number)
        peak, ended = [0], threading.Event()
        process = psutil.Process()

        def look() -> None:
            while not ended.wait(0.1):
                info = process.memory_info()
                peak[0] = max(peak[0], info.rss - info.shared)

        thread = threading.Thread(target=look)
        thread.start()
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            ended.set()
            thread.join()
        gpus = range(torch.cuda.device_count() if cuda else 0)
        on_device = max(map(torch.cuda.max_memory_allocated, gpus), default=0)
        self.rows.append((title, seconds, on_device, peak[0]))
        held = f"{on_device / GB:6.1f} GB GPU  {peak[0] / GB:6.1f} GB host"
        say(f"{title:<28} {seconds:8.1f} s  {held}")

    def call(self, stage: Stage, ctx: Context, keys: Keys) -> Built:
        """Run a stage."""
        with self.over(f"  {stage.title}"):
            return stage.build(ctx, keys)

    def seconds(self, title: str) -> float:
        """Of the last piece of work of this title."""
        return next(s for t, s, _, _ in reversed(self.rows) if t.strip() == title)


def copying(folder: Path, store: Path, output: Path) -> float:
    """Seconds to read both checkpoints twice and write their size twice, from a quarter of it."""
    files = sorted(folder.glob("*/*.safetensors"))[::4]
    whole = sum(f.stat().st_size for f in folder.glob("*/*.safetensors"))
    part = sum(f.stat().st_size for f in files)
    block = 2**24

    def read(file: Path) -> None:
        buffer = bytearray(block)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    def write(job: tuple[Path, Path]) -> Path:
        source, target = job
        copy = target / f".copy-{source.parent.name}-{source.name}"
        with source.open("rb", buffering=0) as stream, copy.open("wb", buffering=0) as into:
            while data := stream.read(block):
                into.write(data)
            os.fdatasync(into.fileno())
        return copy

    def timed(work: Any, jobs: list[Any]) -> float:
        start = time.monotonic()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            made = list(pool.map(work, jobs))
        seconds = time.monotonic() - start
        for file in filter(None, made):
            file.unlink()
        return seconds

    reading = timed(read, files)
    writing = sum(
        timed(write, [(f, place) for f in files if f.parent.name == side])
        for side, place in (("base", store), ("donor", output))
    )
    return (2 * reading + writing) * whole / part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("30b", "80b"))
    parser.add_argument("layers", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="where the outputs go; default in FOLDER")
    parser.add_argument("--device", default="cuda", help="as run.device; cuda: all GPUs")
    parser.add_argument("--rows", type=int, default=1, help="so many times the rows")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--gpu-memory", help="what may be taken of the GPU, as 24GB")
    asked = parser.parse_args()
    folder: Path = asked.folder.absolute()
    output: Path = (asked.output or folder).absolute()
    name = torch.cuda.get_device_name() if asked.device.startswith("cuda") else "CPU"
    watch = Watch(asked.device)
    if not (folder / "donor" / INDEX).exists():
        with watch.over("writing the pair"):
            write_pair(config_of(asked.kind, asked.layers), folder, asked.device.split(",")[0])
        write_rows(folder, asked.rows)
    size = json.loads((folder / "base" / INDEX).read_text())["metadata"]["total_size"]
    for earlier in (folder / "store", output / "out", output / "out-report", output / "sweep"):
        shutil.rmtree(earlier, ignore_errors=True)
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / GB:.0f} GB of memory"
    say(f"{asked.kind}, {asked.layers} layers, {size / GB:.1f} GB a side; {name}, {machine}")
    store = Store(folder / "store")
    store.prepare()
    output.mkdir(exist_ok=True)
    ceiling = copying(folder, store.root, output)
    say(f"reading both twice, writing two of their size: {ceiling:.1f} s")

    def run(title: str, alpha: float) -> None:
        recipe = recipe_at(folder, output / "out", asked.device, asked.gpu_memory, alpha=alpha)
        with watch.over(title):
            merge(Session(recipe, store, force=True), watch.call)

    run("first merge", 0.25)
    rest = watch.seconds("scores") + watch.seconds("projector")
    whole = watch.seconds("first merge") - watch.seconds("evaluate")
    say(f"first merge without evaluation: {whole:.1f} s, of which scores and projector {rest:.1f}; "
        f"the rest is {(whole - rest) / ceiling:.2f} of copying")  # fmt: skip
    run("the same again", 0.25)
    shutil.rmtree(output / "out")
    run("another alpha", 0.3)
    if asked.no_sweep:
        return
    recipe = recipe_at(folder, output / "out", asked.device, asked.gpu_memory)
    with watch.over("a point alone"):
        sweep(Session(recipe, store), [0.2], [TAUS[1]], folder=output / "sweep")
    with watch.over("six points"):
        sweep(Session(recipe, store), ALPHAS, TAUS, folder=output / "sweep")
    known = sum(alpha in (0.25, 0.3) for alpha in ALPHAS)  # merged at the second tau above
    more = (watch.seconds("six points") - watch.seconds("a point alone")) / (6 - known - 1)
    say(f"an additional point: {more:.1f} s")


if __name__ == "__main__":
    main()
