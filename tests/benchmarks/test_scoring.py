"""Scoring: one forward and one backward per set against the chunked scheme.

The chunked scheme is that of the method's official script, made anew: the whole model
resident, layers unfrozen two at a time, gradient checkpointing, and for every chunk a
forward and backward over all items of each set.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_case import (
    Case,
    worst_difference,
    write_case,
)

CUDA = torch.cuda.is_available()


def qwen3_moe(layers: int, **sizes: Any) -> dict[str, Any]:
    """A config of Qwen3-MoE."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **sizes,
    }


def show(capsys: pytest.CaptureFixture[str], title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    with capsys.disabled():
        sys.stdout.write(f"\n{title}\n")
        for row in rows:
            cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write("  ".join(cells) + "\n")


def cost(case: Case, folder: Path, device: str, scheme: str) -> dict[str, Any]:
    """What a scheme takes in a process of its own, without this one's runtime checks."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(asdict(case)))
    worker = Path(__file__).with_name("scoring_case.py")
    command = [sys.executable, str(worker), str(file), str(folder), device, scheme]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if device == "cpu":
        env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# On a CPU


def cpu_case(layers: int) -> Case:
    """Small enough for one core: 32 experts of 192 on a width of 384, 3,584 tokens.

    The head costs as much as five to six layers, as in Qwen3-30B-A3B.
    """
    config = qwen3_moe(
        layers,
        hidden_size=384,
        intermediate_size=768,
        moe_intermediate_size=192,
        num_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=16384,
    )
    return Case(config, reasoning=((64, 192),) * 8, agent=((128, 128),) * 6)


@pytest.mark.slow
def test_one_pass_costs_a_fraction_of_the_chunked_scheme_and_grows_with_the_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["layers", "chunked CPU s", "walk CPU s", "ratio", "chunked MB", "walk MB", "scores"]]
    ratios: dict[int, float] = {}
    for layers in (6, 12, 24):
        case = cpu_case(layers)
        write_case(case, tmp_path / f"model-{layers}", torch.bfloat16)
        chunked = cost(case, tmp_path / f"model-{layers}", "cpu", "chunks")
        walk = cost(case, tmp_path / f"model-{layers}", "cpu", "walk")
        ratios[layers] = chunked["seconds"] / walk["seconds"]
        off = worst_difference(walk["gains"], chunked["gains"])
        rows.append(
            [
                str(layers),
                f"{chunked['seconds']:.1f}",
                f"{walk['seconds']:.1f}",
                f"{ratios[layers]:.1f}x",
                f"{chunked['memory'] / 1e6:.0f}",
                f"{walk['memory'] / 1e6:.0f}",
                f"within {off:.1%}",
            ]
        )
        assert off < 0.01
        assert walk["memory"] < chunked["memory"]
    show(capsys, "Scoring on one core, both sets, 3,584 tokens, float32", rows)
    assert ratios[6] < ratios[12] < ratios[24]


@pytest.mark.slow
def test_a_long_target_takes_memory_in_proportion_and_less_than_the_chunked_scheme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["target", "chunked MB", "walk MB", "chunked CPU s", "walk CPU s", "scores"]]
    memory: dict[int, int] = {}
    config = {**cpu_case(4).config, "max_position_embeddings": 8192}
    for target in (1500, 3000, 6000):
        case = Case(config, reasoning=((64, target),), agent=((128, 128),) * 2)
        write_case(case, tmp_path / str(target), torch.bfloat16)
        chunked = cost(case, tmp_path / str(target), "cpu", "chunks")
        walk = cost(case, tmp_path / str(target), "cpu", "walk")
        memory[target] = walk["memory"]
        off = worst_difference(walk["gains"], chunked["gains"])
        rows.append(
            [
                f"{target:,}",
                f"{chunked['memory'] / 1e6:.0f}",
                f"{walk['memory'] / 1e6:.0f}",
                f"{chunked['seconds']:.1f}",
                f"{walk['seconds']:.1f}",
                f"within {off:.1%}",
            ]
        )
        assert off < 0.01
        assert walk["memory"] < chunked["memory"]
    show(capsys, "One long target on one core, 4 layers, float32", rows)
    # A matrix of scores per head would grow fourfold at each step.
    assert memory[6000] - memory[3000] < 3 * (memory[3000] - memory[1500])


# On a GPU


def qwen3_30b(layers: int) -> Case:
    """The layer shape of Qwen3-30B-A3B; 30,720 tokens."""
    config = qwen3_moe(
        layers,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
    )
    return Case(config, reasoning=((128, 1920),) * 12, agent=((512, 512),) * 6)


def qwen3_next_80b() -> Case:
    """The layer shape of Qwen3-Next-80B-A3B: one linear and one full attention layer."""
    config = {
        **qwen3_30b(2).config,
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    return Case(config, reasoning=((128, 1920),) * 4, agent=((512, 512),) * 2)


def matmul_rate() -> float:
    """Multiply-adds count two: what a large bfloat16 product reaches here, a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return float(10 * 2 * 8192**3 / (time.perf_counter() - start))


def least_operations(case: Case) -> float:
    """What one forward, one recomputed forward and one backward must multiply; no attention."""
    c = case.config
    width, experts = c["hidden_size"], c["num_experts_per_tok"]
    inner = 3 * width * c["moe_intermediate_size"] * experts
    heads, pairs = c["num_attention_heads"], c["num_key_value_heads"]
    attention = width * c["head_dim"] * (2 * heads + 2 * pairs)
    per_token = (attention + inner) * c["num_hidden_layers"]
    targets = sum(t for _, t in (*case.reasoning, *case.agent))
    return 2.0 * (4 * per_token * case.tokens + 2 * width * c["vocab_size"] * targets)


def compare_on_gpu(
    case: Case,
    folder: Path,
    title: str,
    capsys: pytest.CaptureFixture[str],
    schemes: Mapping[str, str],
) -> dict[str, int]:
    """Print a table of the schemes, the first being the measure; returns their memory."""
    write_case(case, folder / "model", torch.bfloat16, "cuda")
    floor = least_operations(case) / matmul_rate()
    torch.cuda.empty_cache()
    found = {key: cost(case, folder / "model", "cuda", key) for key in schemes}
    shutil.rmtree(folder / "model")
    rows = [["", "seconds", "ratio", "tokens/s", "of the floor", "peak GB", "scores"]]
    first = next(iter(found.values()))
    for key, name in schemes.items():
        seconds = found[key]["seconds"]
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{first['seconds'] / seconds:.1f}x",
                f"{case.tokens / seconds:,.0f}",
                f"{floor / seconds:.0%}",
                f"{found[key]['memory'] / 1e9:.1f}",
                f"within {worst_difference(found[key]['gains'], first['gains']):.1%}",
            ]
        )
    device = torch.cuda.get_device_name()
    show(capsys, f"{title}, {case.tokens:,} tokens, bfloat16, {device}; floor {floor:.2f} s", rows)
    for one in found.values():
        assert worst_difference(one["gains"], first["gains"]) < 0.05
    return {key: one["memory"] for key, one in found.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device here")
def test_layers_of_qwen3_30b_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schemes = {
        "chunks": "chunked scheme, resident",
        "resident": "walk, resident",
        "streamed": "walk, streamed",
    }
    title = "8 layers of Qwen3-30B-A3B's shape"
    memory = compare_on_gpu(qwen3_30b(8), tmp_path, title, capsys, schemes)
    assert memory["streamed"] < memory["resident"]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device here")
def test_layers_of_qwen3_next_80b_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without flash-linear-attention, transformers' own code for the gated delta rule.
    schemes = {"resident": "walk, resident", "streamed": "walk, streamed"}
    title = "2 layers of Qwen3-Next-80B-A3B's shape"
    compare_on_gpu(qwen3_next_80b(), tmp_path, title, capsys, schemes)
