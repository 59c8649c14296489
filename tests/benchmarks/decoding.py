"""Answers per second: rows batched by memory that leave when they have ended, and plain batches.

    python tests/benchmarks/decoding.py [--device cuda] [--layers 4] [--rows 256] [--hidden 2048]

A random model of Qwen3-30B-A3B's shape with so many layers answers prompts of 64 to 256 tokens,
of unlike lengths as real answers are. Compared in one run: `generate` of transformers over batches
of 16, as a script does it, and what evaluation does. Printed are seconds and tokens per second.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from test_scoring import qwen3_30b  # noqa: E402

from crane_tasks.models.decoding.greedy import decode  # noqa: E402

BATCH = 16
# What a random model says repeats itself soon: these of its own tokens end its answers.
MEAN = 150


def model_of(layers: int, hidden: int, device: str) -> Any:
    changes: dict[str, Any] = {} if hidden == 2048 else {
        "hidden_size": hidden, "moe_intermediate_size": hidden // 2, "vocab_size": 4096,
        "num_experts": 16,
    }  # fmt: skip
    config = Qwen3MoeConfig(**{**qwen3_30b(layers).config, **changes})
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Qwen3MoeForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def in_plain_batches(
    model: Any, prompts: list[list[int]], stops: list[int], limit: int
) -> list[list[int]]:
    make: Any = GenerationConfig
    settings = make(
        max_new_tokens=limit, eos_token_id=stops or None, pad_token_id=0, do_sample=False
    )
    model.generation_config = settings
    answers = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        with torch.inference_mode():
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
        for row in out[:, width:].tolist():
            answers.append(row[: next((i + 1 for i, t in enumerate(row) if t in stops), None)])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=512)
    options = parser.parse_args()
    model = model_of(options.layers, options.hidden, options.device)
    vocabulary = model.config.vocab_size
    draw = torch.Generator().manual_seed(1)
    random.seed(1)
    lengths = torch.randint(64, 257, (options.rows,), generator=draw).tolist()
    prompts = [torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in lengths]

    stops: list[int] = []

    def ours(some: list[list[int]]) -> list[list[int]]:
        make: Any = GenerationConfig
        model.generation_config = make(eos_token_id=stops or None)
        return decode(model, some, max_new_tokens=options.limit, pad=0, eos=None)

    def plain(some: list[list[int]]) -> list[list[int]]:
        return in_plain_batches(model, some, stops, options.limit)

    free = ours(prompts)
    for answer in free:
        place = min(int(-MEAN * math.log(1 - random.random())), len(answer) - 1)
        if not set(answer[: place + 1]) & set(stops):
            stops.append(answer[place])
    rates = []
    for title, way in (("generate, batches of 16", plain), ("crane", ours)):
        way(prompts if way is ours else prompts[:BATCH])  # loads kernels for each number of rows
        start = time.monotonic()
        found = sum(map(len, way(prompts)))
        seconds = time.monotonic() - start
        rates.append(len(prompts) / seconds)
        sys.stdout.write(
            f"{title:<26} {seconds:8.1f} s {found / seconds:9.0f} tokens/s "
            f"{seconds / len(prompts) * 1e3:8.1f} ms a row, {found / len(prompts):.0f} tokens\n"
        )
    sys.stdout.write(f"crane is {rates[1] / rates[0]:.2f} times as fast per row\n")


if __name__ == "__main__":
    main()
