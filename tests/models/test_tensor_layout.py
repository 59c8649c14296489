"""Every tensor of an architecture has a component, a layer and a site, or is refused."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import known_architectures, layer_of_unit, layout_of, unit_name
from crane_tasks.models.files.safetensors_io import header_bytes

# What docs/method.md says of a tensor, by the name within its layer, `*` for the expert:
# component, its own site, and whether that site is published.
NORM = ("norm", None, False)
ATTENTION = {
    "self_attn.q_proj.weight": ("attention", "attn_input", True),
    "self_attn.k_proj.weight": ("attention", "attn_input", True),
    "self_attn.v_proj.weight": ("attention", "attn_input", True),
    "self_attn.o_proj.weight": ("attention", "o_proj_input", False),
    "self_attn.q_norm.weight": ("attention", None, False),
    "self_attn.k_norm.weight": ("attention", None, False),
}
NORMS = {"input_layernorm.weight": NORM, "post_attention_layernorm.weight": NORM}
DENSE = {
    "mlp.gate_proj.weight": ("ffn", "ffn_input", True),
    "mlp.up_proj.weight": ("ffn", "ffn_input", True),
    "mlp.down_proj.weight": ("ffn", "down_proj_input", False),
}
SPARSE = {
    "mlp.experts.*.gate_proj.weight": ("expert", "ffn_input", True),
    "mlp.experts.*.up_proj.weight": ("expert", "ffn_input", True),
    "mlp.experts.*.down_proj.weight": ("expert", "expert_inner", False),
    "mlp.gate.weight": ("router", None, False),
}
SHARED = {
    "mlp.shared_expert.gate_proj.weight": ("shared_expert", "ffn_input", True),
    "mlp.shared_expert.up_proj.weight": ("shared_expert", "ffn_input", True),
    "mlp.shared_expert.down_proj.weight": ("shared_expert", "shared_expert_inner", False),
    "mlp.shared_expert_gate.weight": ("router", None, False),
}
LINEAR = {
    "linear_attn.in_proj_qkvz.weight": ("linear_attn", "attn_input", True),
    "linear_attn.in_proj_ba.weight": ("linear_attn", "attn_input", True),
    "linear_attn.out_proj.weight": ("linear_attn", "linattn_inner", True),
    "linear_attn.conv1d.weight": ("linear_attn", None, False),
    "linear_attn.A_log": ("linear_attn", None, False),
    "linear_attn.dt_bias": ("linear_attn", None, False),
    "linear_attn.norm.weight": ("linear_attn", None, False),
}
LAYERS = {
    "qwen3": [NORMS | ATTENTION | DENSE] * 2,
    "qwen3_moe": [NORMS | ATTENTION | SPARSE] * 2,
    "qwen3_next": [NORMS | LINEAR | SPARSE | SHARED, NORMS | ATTENTION | SPARSE | SHARED],
}
OUTSIDE = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"}
HEAD = {"lm_head.weight": "lm_head"}


def test_every_tensor_of_a_transformers_checkpoint_is_what_the_design_says(
    tiny_pair: TinyPair,
) -> None:
    checkpoint = Checkpoint.open(tiny_pair.base)
    groups = dict(checkpoint.layers())
    for layer, wanted in enumerate(LAYERS[tiny_pair.architecture]):
        prefix = f"model.layers.{layer}."
        found = {slot.name.removeprefix(prefix): slot for slot in groups[layer]}
        assert found.keys() == wanted.keys()
        for name, (component, site, published) in wanted.items():
            slot = found[name]
            assert (slot.component, slot.layer) == (component, layer)
            assert (slot.site.name if slot.site else None) == site
            assert slot.site is None or slot.site.extended == (not published)
    tied = tiny_pair.architecture == "qwen3"
    outside = {slot.name: slot.component for slot in groups[None]}
    assert outside == (OUTSIDE if tied else OUTSIDE | HEAD)
    assert checkpoint.carried == []


def test_no_tensor_is_in_two_slots_and_none_in_no_slot(tiny_pair: TinyPair) -> None:
    checkpoint = Checkpoint.open(tiny_pair.base)
    names = [
        slot.tensor_name(expert)
        for _, slots in checkpoint.layers()
        for slot in slots
        for expert in range(len(checkpoint.pieces[slot.name]))
    ]
    assert sorted(names) == sorted(load_tensors(tiny_pair.base))


@pytest.mark.parametrize(
    ("architecture", "components"),
    [
        ("qwen3", {"attention", "ffn"}),
        ("qwen3_moe", {"attention", "expert", "router"}),
        ("qwen3_next", {"attention", "linear_attn", "expert", "shared_expert", "router"}),
    ],
)
def test_the_components_are_those_of_the_method(
    pairs: Callable[[str], TinyPair], architecture: str, components: set[str]
) -> None:
    checkpoint = Checkpoint.open(pairs(architecture).base)
    head = set() if checkpoint.tied else {"lm_head"}
    found = {slot.component for slot in checkpoint.slots.values()}
    assert found == components | {"norm", "embedding"} | head


def test_what_a_projection_borrows_is_captured_by_default(tiny_pair: TinyPair) -> None:
    for slot in Checkpoint.open(tiny_pair.base).slots.values():
        if slot.borrows is not None:
            assert slot.site is not None and slot.site.extended
            assert not slot.borrows.extended


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next"])
def test_fused_experts_have_the_parts_of_the_published_names(architecture: str) -> None:
    layout = layout_of(architecture)
    prefix = "model.layers.31.mlp.experts"
    assert layout.fused_match(f"{prefix}.gate_up_proj") == (
        f"{prefix}.*.gate_proj.weight",
        f"{prefix}.*.up_proj.weight",
    )
    assert layout.fused_match(f"{prefix}.down_proj") == (f"{prefix}.*.down_proj.weight",)
    assert layout.fused_match(f"{prefix}.3.down_proj.weight") is None


def test_a_slot_stands_for_all_experts_and_names_each() -> None:
    layout = layout_of("qwen3_moe")
    found = layout.classify("model.layers.12.mlp.experts.107.up_proj.weight")
    assert found is not None
    slot, expert = found
    assert (slot.name, expert) == ("model.layers.12.mlp.experts.*.up_proj.weight", 107)
    assert slot.stacked and slot.tensor_name(3) == "model.layers.12.mlp.experts.3.up_proj.weight"
    assert (slot.unit, slot.array_name) == ("layer.12", "mlp.experts.up_proj.weight")
    assert layout.classify_slot(slot.name) == slot
    assert unit_name(None) == "outside"
    assert [layer_of_unit(unit_name(layer)) for layer in (None, 0, 12)] == [None, 0, 12]


def test_biases_of_the_attention_are_known() -> None:
    found = layout_of("qwen3").classify("model.layers.0.self_attn.q_proj.bias")
    assert found is not None and found[0].component == "attention" and found[0].site is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.experts.x.up_proj.weight",
        "model.layers.0.mlp.gate.weight.more",
        "x.model.norm.weight",
        "modelXnorm.weight",
        "",
    ],
)
def test_a_name_that_only_resembles_a_listed_one_is_not_classified(name: str) -> None:
    assert layout_of("qwen3_moe").classify(name) is None


def test_tensors_that_no_row_lists_are_refused_by_name(tiny_pair: TinyPair, tmp_path: Path) -> None:
    base = tiny_pair.copy(tmp_path / "pair").base
    odd = {f"model.layers.0.adapter.{i}.weight": torch.zeros(2) for i in range(11)}
    save_tensors(base, load_tensors(base) | odd)
    with pytest.raises(CheckpointError, match=r"adapter\.0\.weight.*and 3 more") as caught:
        Checkpoint.open(base)
    assert f"the layout of {tiny_pair.architecture} lists no tensor" in str(caught.value)


def test_multi_token_prediction_is_carried_and_belongs_to_no_layer(
    pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    base = pairs("qwen3_next").copy(tmp_path / "pair").base
    names = ["mtp.fc.weight", "mtp.layers.0.mlp.experts.1.up_proj.weight", "mtp.norm.weight"]
    extra = {name: torch.zeros(2, 2, dtype=torch.bfloat16) for name in names}
    before = Checkpoint.open(base).slots
    save_tensors(base, load_tensors(base) | extra, shards=2)
    checkpoint = Checkpoint.open(base)
    assert sorted(checkpoint.carried) == sorted(names)
    assert checkpoint.slots.keys() == before.keys()
    assert set(names) < checkpoint.entries.keys()


def test_multi_token_prediction_is_refused_where_the_table_does_not_carry_it(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    base = moe_pair.copy(tmp_path / "pair").base
    save_tensors(base, load_tensors(base) | {"mtp.fc.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight"):
        Checkpoint.open(base)


def test_an_architecture_without_a_table_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"'mamba' has no layout table.*qwen3_moe") as caught:
        layout_of("mamba")
    assert all(name in str(caught.value) for name in known_architectures())


# Many names


def write_many(folder: Path, template: Path, layers: int, experts: int) -> int:
    """A checkpoint of scalars [1, 1] under a large model's names; returns how many."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    ]
    folder.mkdir()
    config = (template / "config.json").read_text()
    config = config.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}')
    config = config.replace('"num_experts": 4', f'"num_experts": {experts}')
    config = config.replace('"num_local_experts": 4', f'"num_local_experts": {experts}')
    (folder / "config.json").write_text(config)
    head = header_bytes([(name, "BF16", (1, 1)) for name in names], {})
    (folder / "model.safetensors").write_bytes(head + bytes(2 * len(names)))
    return len(names)


@pytest.mark.slow
def test_the_work_for_75000_names_is_linear_in_their_number(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    seconds = []
    for number, layers in enumerate((12, 48)):
        folder = tmp_path / str(number)
        count = write_many(folder, moe_pair.base, layers, experts=520)
        tries = []
        for _ in range(2):
            start = time.process_time()
            checkpoint = Checkpoint.open(folder)
            parts = sum(len(checkpoint.pieces[s.name]) for _, g in checkpoint.layers() for s in g)
            tries.append(time.process_time() - start)
            assert parts == count == len(checkpoint.entries)
        seconds.append(min(tries))
    # Four times the names: linear is 4, quadratic 16.
    assert seconds[1] < 8 * seconds[0]
