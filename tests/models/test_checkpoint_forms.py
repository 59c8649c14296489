"""One canonical form of however a checkpoint is stored, and pairs of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors, tiny_config, write_checkpoint
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.walk.loading import Loader
from crane_tasks.models.walk.skeleton import check_parameters, skeleton

MOE = ["qwen3_moe", "qwen3_next"]
EXPERTS = "model.layers.{}.mlp.experts."


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the experts of each layer stacked, as transformers 5 saves them."""
    found = {n: t for n, t in tensors.items() if ".mlp.experts." not in n}
    for layer in range(2):
        prefix = EXPERTS.format(layer)
        gate, up, down = (
            [tensors[f"{prefix}{e}.{part}_proj.weight"] for e in range(4)]
            for part in ("gate", "up", "down")
        )
        pairs = [torch.cat(both) for both in zip(gate, up, strict=True)]
        found[f"{prefix}gate_up_proj"] = torch.stack(pairs)
        found[f"{prefix}down_proj"] = torch.stack(down)
    return found


def same_weights(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Slots, experts and bits are equal, whatever the files look like."""
    assert ours.slots == theirs.slots
    for name, pieces in ours.pieces.items():
        assert len(pieces) == len(theirs.pieces[name])
        for expert in range(len(pieces)):
            mine, other = ours.read(name, expert), theirs.read(name, expert)
            assert mine.dtype == other.dtype and torch.equal(mine, other)


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """One parameter of the transformers module in its stored dtype."""
    source = checkpoint.source(name)
    return Loader(torch.device("cpu")).take(0, {name: source}, source.dtype)[name]


def parameters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of the transformers module."""
    names = [name for name, _ in skeleton(checkpoint, torch.bfloat16).named_parameters()]
    return {name: read_parameter(checkpoint, name) for name in names}


@pytest.fixture
def pair(tiny_pair: TinyPair, tmp_path: Path) -> TinyPair:
    """A copy of each pair, to be changed."""
    return tiny_pair.copy(tmp_path / "pair")


@pytest.fixture
def moe(moe_pair: TinyPair, tmp_path: Path) -> TinyPair:
    """A copy of the mixture-of-experts pair, to be changed."""
    return moe_pair.copy(tmp_path / "pair")


@pytest.fixture
def dense(pairs: Callable[[str], TinyPair], tmp_path: Path) -> TinyPair:
    """A copy of the dense pair, to be changed."""
    return pairs("qwen3").copy(tmp_path / "pair")


def change_config(folder: Path, **changes: Any) -> None:
    """Set some keys of a config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# One canonical form


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_how_a_checkpoint_is_sharded_does_not_matter(pair: TinyPair, shards: int) -> None:
    before = Checkpoint.open(pair.base)
    again = pair.folder / "again"
    again.mkdir()
    (again / "config.json").write_text((pair.base / "config.json").read_text())
    save_tensors(again, load_tensors(pair.base), shards=shards)
    after = Checkpoint.open(again)
    assert len(after.files) == shards
    same_weights(after, before)


@pytest.mark.parametrize("architecture", MOE)
@pytest.mark.parametrize("shards", [1, 3])
def test_fused_experts_show_the_slots_and_bits_of_single_ones(
    pairs: Callable[[str], TinyPair], tmp_path: Path, architecture: str, shards: int
) -> None:
    pair = pairs(architecture).copy(tmp_path / "pair")
    stacked = tmp_path / "fused"
    stacked.mkdir()
    (stacked / "config.json").write_text((pair.base / "config.json").read_text())
    save_tensors(stacked, fused(load_tensors(pair.base)), shards=shards)
    single, whole = Checkpoint.open(pair.base), Checkpoint.open(stacked)
    assert whole.entries.keys() != single.entries.keys()
    same_weights(whole, single)
    wanted = parameters(single)
    for name, tensor in parameters(whole).items():
        assert torch.equal(tensor, wanted[name]), name
    check_parameters(whole)
    check_parameters(single)


@pytest.mark.parametrize("architecture", MOE)
def test_a_pair_may_be_fused_on_one_side_and_single_on_the_other(
    pairs: Callable[[str], TinyPair], tmp_path: Path, architecture: str
) -> None:
    pair = pairs(architecture).copy(tmp_path / "pair")
    published = load_tensors(pair.donor)
    save_tensors(pair.donor, fused(published), shards=2)
    both = Pair.open(pair.base, pair.donor)
    for name, pieces in both.base.pieces.items():
        for expert in range(len(pieces)):
            wanted = published[both.base.slots[name].tensor_name(expert)]
            assert torch.equal(both.donor_tensor(name, expert), wanted)


def test_parameters_are_those_that_transformers_loads(tiny_pair: TinyPair) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.base, dtype=torch.bfloat16)
    found = parameters(Checkpoint.open(tiny_pair.base))
    loaded = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("architecture", MOE)
def test_the_parts_of_a_fused_tensor_are_in_the_order_of_its_bytes(
    pairs: Callable[[str], TinyPair], tmp_path: Path, architecture: str
) -> None:
    pair = pairs(architecture).copy(tmp_path / "pair")
    stacked = fused(load_tensors(pair.base))
    save_tensors(pair.base, stacked)
    checkpoint = Checkpoint.open(pair.base)
    for entry in checkpoint.entries.values():
        parts = [checkpoint.read(*part).flatten() for part in checkpoint.stored_parts(entry)]
        assert torch.equal(torch.cat(parts), stacked[entry.name].flatten())


def test_rows_of_a_piece_are_read_alone(tiny_pair: TinyPair) -> None:
    checkpoint = Checkpoint.open(tiny_pair.base)
    piece = checkpoint.pieces["model.embed_tokens.weight"][0]
    assert torch.equal(piece.read(3, 9), piece.read()[3:9])


def test_layers_come_in_order_and_what_is_outside_comes_last(tiny_pair: TinyPair) -> None:
    groups = list(Checkpoint.open(tiny_pair.base).layers())
    assert [layer for layer, _ in groups] == [0, 1, None]
    assert all(slot.layer == layer for layer, slots in groups for slot in slots)


def test_either_spelling_of_the_number_of_experts_is_read(moe: TinyPair) -> None:
    for old, new in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        change_config(moe.base, **{old: None, new: 4})
        assert len(Checkpoint.open(moe.base).pieces[EXPERTS.format(0) + "*.up_proj.weight"]) == 4


def test_float32_tensors_among_bfloat16_ones_keep_their_dtype(
    pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    pair = pairs("qwen3_next").copy(tmp_path / "pair")
    tensors = load_tensors(pair.base)
    name = "model.layers.0.linear_attn.A_log"
    tensors[name] = tensors[name].float() + 1e-6
    save_tensors(pair.base, tensors)
    assert torch.equal(Checkpoint.open(pair.base).read(name), tensors[name])
    Pair.open(pair.base, pair.donor)  # the donor's is bfloat16: allowed


# Tied heads


@pytest.mark.parametrize("side", ["base", "donor", "both"])
def test_a_tied_head_may_be_stored_or_not_on_either_side(dense: TinyPair, side: str) -> None:
    for name in ("base", "donor"):
        if side in (name, "both"):
            folder = dense.folder / name
            tensors = load_tensors(folder)
            head = tensors["model.embed_tokens.weight"].clone()
            save_tensors(folder, tensors | {"lm_head.weight": head}, shards=2)
    both = Pair.open(dense.base, dense.donor)
    assert both.base.tied
    embedding = both.donor.read("model.embed_tokens.weight")
    assert torch.equal(both.donor_tensor("lm_head.weight"), embedding)
    assert torch.equal(
        read_parameter(both.base, "lm_head.weight"), both.base.read("model.embed_tokens.weight")
    )
    if side != "donor":
        # Edited like the embedding, so that it stays equal to it.
        assert both.base.slots["lm_head.weight"].component == "embedding"
    check_parameters(both.base)


def test_a_head_that_is_not_tied_is_missed(moe: TinyPair) -> None:
    tensors = load_tensors(moe.base)
    del tensors["lm_head.weight"]
    save_tensors(moe.base, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        check_parameters(Checkpoint.open(moe.base))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is only in the donor"):
        Pair.open(moe.base, moe.donor)


@pytest.mark.parametrize("stored", [False, True], ids=["absent", "stored"])
def test_a_donors_own_head_is_left_where_the_bases_is_its_embedding(
    dense: TinyPair, stored: bool
) -> None:
    donor = load_tensors(dense.donor)
    donor["lm_head.weight"] = torch.zeros_like(donor["model.embed_tokens.weight"])
    save_tensors(dense.donor, donor)
    change_config(dense.donor, tie_word_embeddings=False)
    if stored:
        base = load_tensors(dense.base)
        save_tensors(dense.base, base | {"lm_head.weight": base["model.embed_tokens.weight"] + 0})
    both = Pair.open(dense.base, dense.donor)
    for name in ("model.embed_tokens.weight", "lm_head.weight")[: 1 + stored]:
        assert torch.equal(both.donor_tensor(name), donor["model.embed_tokens.weight"])


def test_a_tied_donors_embedding_stands_for_the_head_of_a_base_that_has_one(
    moe: TinyPair,
) -> None:
    donor = load_tensors(moe.donor)
    del donor["lm_head.weight"]
    save_tensors(moe.donor, donor)
    change_config(moe.donor, tie_word_embeddings=True)
    both = Pair.open(moe.base, moe.donor)
    assert torch.equal(both.donor_tensor("lm_head.weight"), donor["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_one_side_lacks_are_the_bases_or_left_out(
    moe: TinyPair, dtype: torch.dtype
) -> None:
    donor = {n: t.to(dtype) for n, t in load_tensors(moe.donor).items()}
    for rows in (300, 320, 400):
        base, short = load_tensors(moe.base), dict(donor)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            short[name] = torch.cat([donor[name], donor[name]])[:rows].clone()
        save_tensors(moe.donor, short, shards=2)
        both = Pair.open(moe.base, moe.donor)
        assert both.rows == (320, rows)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found, common = both.donor_tensor(name), min(rows, 320)
            assert found.shape == base[name].shape
            assert torch.equal(found[:common].to(dtype), short[name][:common])
            assert torch.equal(found[common:].float(), base[name][common:].float())


def test_a_fused_tensor_that_is_no_stack_is_refused(moe: TinyPair) -> None:
    tensors = fused(load_tensors(moe.base))
    name = EXPERTS.format(0) + "gate_up_proj"
    for wrong in (tensors[name][0].clone(), tensors[name][:, 1:].clone()):
        save_tensors(moe.base, tensors | {name: wrong})
        with pytest.raises(CheckpointError, match=r"gate_up_proj should be \[experts, rows"):
            Checkpoint.open(moe.base)


# Pairs


def test_models_of_unlike_types_do_not_pair(pairs: Callable[[str], TinyPair]) -> None:
    with pytest.raises(CheckpointError, match="the base is qwen3, the donor qwen3_moe"):
        Pair.open(pairs("qwen3").base, pairs("qwen3_moe").base)


def test_every_difference_of_a_pair_is_named_at_once(moe: TinyPair) -> None:
    tensors = load_tensors(moe.donor)
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors[bias] = torch.zeros(64, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, 1:].clone()
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_tensors(moe.donor, tensors)
    with pytest.raises(CheckpointError) as caught:
        Pair.open(moe.base, moe.donor)
    message = str(caught.value)
    assert f"{bias} is only in the donor" in message
    assert "model.layers.1.self_attn.q_norm.weight is only in the base" in message
    assert "model.embed_tokens.weight: [320, 32] against [320, 31]" in message
    assert str(moe.base) in message and str(moe.donor) in message


def test_pairs_of_unlike_numbers_of_experts_do_not_pair(moe: TinyPair, tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", num_experts=6)
    write_checkpoint(tmp_path / "six", config, seed=3, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="4 experts against 6"):
        Pair.open(moe.base, tmp_path / "six")


def test_a_pair_sharded_differently_pairs_by_name(tiny_pair: TinyPair) -> None:
    both = Pair.open(tiny_pair.base, tiny_pair.donor)
    assert len(both.base.files) != len(both.donor.files)
    ours, theirs = load_tensors(tiny_pair.base), load_tensors(tiny_pair.donor)
    for name, slot in both.base.slots.items():
        for expert in range(len(both.base.pieces[name])):
            tensor = slot.tensor_name(expert)
            assert torch.equal(both.base.read(name, expert), ours[tensor])
            assert torch.equal(both.donor_tensor(name, expert), theirs[tensor])
