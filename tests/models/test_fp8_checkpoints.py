"""Block-scaled FP8 is read as the bfloat16 that it stands for; other forms are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, fp8_blocks, load_tensors, save_tensors, write_fp8
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.identity import local_folder
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.safetensors_io import byte_view, read_span
from crane_tasks.models.walk.loading import Loader
from crane_tasks.models.walk.skeleton import check_parameters, skeleton


@pytest.fixture
def moe(moe_pair: TinyPair, tmp_path: Path) -> TinyPair:
    """A copy of the mixture-of-experts pair, to be changed."""
    return moe_pair.copy(tmp_path / "pair")


def parameters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of the transformers module, as a walk loads it."""
    names = [name for name, _ in skeleton(checkpoint, torch.bfloat16).named_parameters()]
    sources = {name: checkpoint.source(name) for name in names}
    return Loader(torch.device("cpu")).take(0, sources, torch.bfloat16)


@pytest.mark.parametrize("block", [(8, 8), (16, 32), (128, 128), (5, 7)])
def test_a_weight_is_its_fp8_value_times_its_blocks_scale(
    moe: TinyPair, block: tuple[int, int]
) -> None:
    """Also where the last blocks are not whole."""
    meant = write_fp8(moe.base, block)
    checkpoint = Checkpoint.open(moe.base)
    assert checkpoint.packed and checkpoint.entries.keys() == meant.keys()
    for name, pieces in checkpoint.pieces.items():
        for expert, piece in enumerate(pieces):
            wanted = meant[checkpoint.slots[name].tensor_name(expert)]
            assert piece.dtype == torch.bfloat16 and torch.equal(piece.read(), wanted)
            assert torch.equal(piece.read(1, 3), wanted[1:3])
    check_parameters(checkpoint)


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16])
def test_any_range_of_bytes_is_that_of_the_bfloat16_tensor(
    moe: TinyPair, scale: torch.dtype
) -> None:
    weight = torch.randn(37, 21)
    packed, scales = fp8_blocks(weight, (8, 4))
    write_fp8(moe.base, (8, 4))
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_tensors(moe.base) | {name: packed, f"{name}_scale_inv": scales.to(scale)}
    save_tensors(moe.base, stored)
    wide = scales.to(scale).float().repeat_interleave(8, 0).repeat_interleave(4, 1)[:37, :21]
    wanted = (packed.float() * wide).bfloat16().flatten()
    entry = Checkpoint.open(moe.base).entries[name]
    for first, last in ((0, 777), (0, 1), (776, 777), (20, 22), (100, 700)):
        found = torch.empty(last - first, dtype=torch.bfloat16)
        read_span(entry.span(2 * first, 2 * (last - first)), byte_view(found))
        assert torch.equal(found, wanted[first:last])


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "qwen3_next"])
def test_parameters_are_those_that_transformers_dequantises(
    architecture: str, pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.utils import logging

    base = pairs(architecture).copy(tmp_path / "pair").base
    write_fp8(base)
    logging.disable_progress_bar()
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=how
    )
    loaded = dict(model.named_parameters(remove_duplicate=False))
    found = parameters(Checkpoint.open(base))
    assert found.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert torch.equal(found[name], tensor), name


def test_fp8_without_its_scales_is_refused(moe: TinyPair) -> None:
    write_fp8(moe.base)
    tensors = load_tensors(moe.base)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_tensors(moe.base, {n: t for n, t in tensors.items() if n != f"{name}_scale_inv"})
    with pytest.raises(CheckpointError, match=rf"{name} has dtype F8_E4M3, .*{name}_scale_inv"):
        Checkpoint.open(moe.base)
    save_tensors(moe.base, tensors | {f"{name}_scale_inv": torch.ones(8, 5)})
    with pytest.raises(CheckpointError, match=r"in blocks of \[8, 8\] needs scales \[8, 4\]"):
        Checkpoint.open(moe.base)


# Other forms

QUANTISED = {
    "AWQ": {"quant_method": "awq", "bits": 4},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {"a": 1}},
    "FP8 without blocks": {"quant_method": "fp8", "activation_scheme": "static"},
    "hqq": {"quant_method": "hqq"},
    "an unknown method": {"bits": 4},
}


def sentence(folder: Path) -> str:
    """What is said of a folder, with its name cut away."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value).removeprefix(str(folder)).removeprefix("/config.json")
    assert len(text) < 250 and text.count(". ") == 0, text
    return text


@pytest.mark.parametrize("name", QUANTISED)
def test_other_quantisations_are_named_with_what_to_do(name: str, moe: TinyPair) -> None:
    file = moe.base / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": QUANTISED[name]}
    file.write_text(json.dumps(config))
    assert f"quantised by {name}, which is not read: name the checkpoint" in sentence(moe.base)


def only(folder: Path, **files: Any) -> Path:
    """A folder with these files, `_` for the dot before the suffix."""
    folder.mkdir()
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(json.dumps(content))
    return folder


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    made_for = {"base_model_name_or_path": "Qwen/Qwen3-4B"}
    folder = only(tmp_path / "a", adapter_config_json=made_for, adapter_model_safetensors={})
    assert "a LoRA adapter for Qwen/Qwen3-4B, not a checkpoint: merge it" in sentence(folder)


def test_a_gguf_model_is_no_checkpoint(tmp_path: Path, moe: TinyPair) -> None:
    folder = only(tmp_path / "a", model_gguf={})
    assert "a GGUF model (model.gguf), which is not read" in sentence(folder)
    recipe = moe.recipe(f"base={folder / 'model.gguf'}")
    with pytest.raises(CheckpointError, match=r"model\.gguf: a GGUF model"):
        local_folder(recipe, recipe.base)


@pytest.mark.parametrize("name", ["pytorch_model_bin", "consolidated_pt", "model_pth"])
def test_pickles_are_not_opened(name: str, tmp_path: Path) -> None:
    folder = only(tmp_path / "a", **{"config_json": {"num_hidden_layers": 2}, name: {}})
    (folder / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 2}')
    assert "PyTorch's pickles" in sentence(folder)
