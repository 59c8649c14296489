"""Checkpoints that are damaged, incomplete or of the wrong kind are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors
from safetensors.torch import load_file, save_file

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.folder import read_config
from crane_tasks.models.files.wording import listed
from crane_tasks.models.walk.skeleton import check_parameters

EXPERTS = "model.layers.{}.mlp.experts."


@pytest.fixture
def moe(moe_pair: TinyPair, tmp_path: Path) -> TinyPair:
    """A copy of the mixture-of-experts pair, to be changed."""
    return moe_pair.copy(tmp_path / "pair")


def change_config(folder: Path, **changes: Any) -> None:
    """Set some keys of a config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def set_weight_map(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Rewrite the index's weight map by a function of it."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    changed = change(index["weight_map"])
    index["weight_map"] = index["weight_map"] if changed is None else changed
    file.write_text(json.dumps(index))


def refused(folder: Path, message: str) -> None:
    """Opening fails, names the folder, and says `message`."""
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)


def test_a_truncated_shard_is_refused(moe: TinyPair) -> None:
    file = first_shard(moe.base)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(moe.base, rf"{file.name}: truncated: .* ends at byte {len(content)}")
    file.write_bytes(content[:100])
    refused(moe.base, rf"{file.name}: truncated or not safetensors")


def test_shards_that_are_missing_are_all_named(moe: TinyPair) -> None:
    for file in moe.base.glob("*.safetensors"):
        file.unlink()
    refused(moe.base, r"missing: model-00001-of-00002.*, model-00002-of-00002.*Finish the download")


def test_no_weights_at_all_are_refused(moe: TinyPair) -> None:
    for file in [*moe.base.glob("*.safetensors"), *moe.base.glob("*.index.json")]:
        file.unlink()
    refused(moe.base, r"holds neither .*index\.json nor model\.safetensors")


def test_an_index_that_promises_another_file_is_refused(moe: TinyPair) -> None:
    def swap(weight_map: dict[str, str]) -> None:
        one, two = sorted(set(weight_map.values()))
        weight_map["model.norm.weight"] = two if weight_map["model.norm.weight"] == one else one

    set_weight_map(moe.base, swap)
    refused(moe.base, r"index promises what is not there: model\.norm\.weight in model-0000")


def test_an_index_that_promises_a_tensor_that_is_nowhere_is_refused(moe: TinyPair) -> None:
    set_weight_map(
        moe.base, lambda m: m | {"model.layers.0.mlp.ghost": "model-00001-of-00002.safetensors"}
    )
    refused(moe.base, r"index promises what is not there: model\.layers\.0\.mlp\.ghost")


def test_an_index_that_conceals_a_tensor_is_refused(moe: TinyPair) -> None:
    set_weight_map(moe.base, lambda m: {k: v for k, v in m.items() if k != "model.norm.weight"})
    refused(moe.base, r"tensors that the index does not list: model\.norm\.weight")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": null}',
    ],
)
def test_a_file_that_is_no_index_is_refused(moe: TinyPair, text: str) -> None:
    (moe.base / "model.safetensors.index.json").write_text(text)
    refused(moe.base, r"index\.json: not an index of safetensors files")


def test_a_tensor_in_two_files_is_refused(moe: TinyPair) -> None:
    shards = sorted(moe.base.glob("*.safetensors"))
    tensors = load_tensors(moe.base)
    save_tensors(moe.folder / "base", tensors, shards=2)
    second = load_file(shards[1]) | {"model.norm.weight": tensors["model.norm.weight"]}
    first = load_file(shards[0]) | {"model.norm.weight": tensors["model.norm.weight"]}
    save_file(first, shards[0])
    save_file(second, shards[1])
    refused(moe.base, r"stored in more than one file: model\.norm\.weight")


def test_an_expert_missing_on_both_sides_is_missed_on_each(moe: TinyPair) -> None:
    name = EXPERTS.format(1) + "2.up_proj.weight"
    for folder in (moe.base, moe.donor):
        tensors = load_tensors(folder)
        del tensors[name]
        save_tensors(folder, tensors, shards=2)
        refused(folder, rf"{name} is missing")


@pytest.mark.parametrize("expert", [0, 3], ids=["first", "last"])
def test_an_expert_missing_whole_is_missed(moe: TinyPair, expert: int) -> None:
    tensors = load_tensors(moe.base)
    gone = [n for n in tensors if f".mlp.experts.{expert}." in n]
    save_tensors(moe.base, {n: t for n, t in tensors.items() if n not in gone})
    refused(moe.base, rf"experts\.{expert}\..*_proj\.weight is missing")


def test_many_problems_are_counted_and_the_first_listed(moe: TinyPair) -> None:
    tensors = load_tensors(moe.base)
    kept = {n: t for n, t in tensors.items() if ".down_proj." not in n or ".experts.0." in n}
    half = {n: t for n, t in kept.items() if ".up_proj." not in n or ".experts.0." in n}
    save_tensors(moe.base, half)
    refused(moe.base, r"is missing, .* and 4 more")
    assert listed(str(i) for i in range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert listed(["a", "b"]) == "a, b"


def test_a_slot_missing_whole_is_missed_by_the_models_own_list(moe: TinyPair) -> None:
    gone = "model.layers.1.self_attn.k_norm.weight"
    tensors = load_tensors(moe.base)
    experts = [n for n in tensors if ".experts." in n and ".layers.0." in n and ".down_" in n]
    kept = {n: t for n, t in tensors.items() if n != gone and n not in experts}
    save_tensors(moe.base, kept)
    with pytest.raises(CheckpointError, match=rf"{gone} is missing") as caught:
        check_parameters(Checkpoint.open(moe.base))
    assert EXPERTS.format(0) + "down_proj is missing" in str(caught.value)


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(moe: TinyPair) -> None:
    tensors = load_tensors(moe.base)
    tensors["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
    save_tensors(moe.base, tensors)
    with pytest.raises(CheckpointError, match=r"norm\.weight is \[31\], the config says \[32\]"):
        check_parameters(Checkpoint.open(moe.base))


def test_experts_of_unlike_shapes_are_refused(moe: TinyPair) -> None:
    tensors = load_tensors(moe.base)
    name = EXPERTS.format(0) + "1.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_tensors(moe.base, tensors)
    refused(moe.base, r"experts\.\*\.up_proj\.weight: the experts differ in shape")


def test_a_layer_more_or_fewer_than_the_config_says_is_refused(moe: TinyPair) -> None:
    change_config(moe.base, num_hidden_layers=3)
    refused(moe.base, r"the config has 3 layers, the files have \[0, 1\]")
    change_config(moe.base, num_hidden_layers=1)
    refused(moe.base, r"the config has 1 layers, the files have \[0, 1\]")


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float8_e4m3fn, r"model\.norm\.weight has dtype F8_E4M3, .*Dequantise"),
        (torch.int8, r"model\.norm\.weight is I8, not a float that can be merged"),
        (torch.float64, r"model\.norm\.weight is F64, not a float that can be merged"),
    ],
)
def test_a_dtype_that_cannot_be_merged_is_refused(
    moe: TinyPair, dtype: torch.dtype, message: str
) -> None:
    tensors = load_tensors(moe.base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_tensors(moe.base, tensors)
    refused(moe.base, message)


# Configs


def test_a_folder_that_is_absent_or_has_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is no checkpoint"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: not JSON"),
        ("\udcff", r"config\.json: not JSON"),
        ("[]", r"not the config of a decoder-only language model"),
        ('{"model_type": "bert"}', r"not the config of a decoder-only language model"),
    ],
)
def test_a_config_that_is_none_is_refused(moe: TinyPair, text: str, message: str) -> None:
    (moe.base / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(moe.base, message)


@pytest.mark.parametrize("layers", ["two", None, [2], -1])
def test_a_config_with_no_number_of_layers_is_refused(moe: TinyPair, layers: Any) -> None:
    file = moe.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    refused(moe.base, r"decoder-only language model|num_hidden_layers is -1")


def test_an_architecture_without_a_table_is_refused_by_its_name(moe: TinyPair) -> None:
    change_config(moe.base, model_type="gpt_oss")
    with pytest.raises(CheckpointError, match="architecture 'gpt_oss' has no layout table"):
        Checkpoint.open(moe.base)


def test_two_answers_to_what_the_weights_are_are_refused(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    shutil.copyfile(
        next(pair.base.glob("model-00001*.safetensors")), pair.base / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="holds both"):
        Checkpoint.open(pair.base)


def test_an_index_that_leads_out_of_the_folder_is_refused(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    index = pair.base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../donor/model-00001"))
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint.open(pair.base)
