"""Every architecture that has a table is walked as the library runs it, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    MORE,
    ONE_BY_ONE,
    TinyPair,
    load_tensors,
    save_tensors,
    tiny_config,
)
from test_layer_walk import (
    CPU,
    assert_same_gradients,
    make_items,
    make_stream,
    relative,
    resident,
    walk,
    whole_model_gradients,
)
from test_site_activations import hooked_rows
from test_site_activations import walk as walk_sites

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import known_architectures, layout_of
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.walk.activations import Sums
from crane_tasks.models.walk.losses import item_losses
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.models.walk.skeleton import check_parameters, skeleton
from crane_tasks.models.walk.stream import LayerStream

Pairs = Callable[[str], TinyPair]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
# Where the library's code has the input of each kind of projection: module of the layer and
# side, written down from the models' code and not from the tables.
BEFORE = {"attn_input": ("input_layernorm", "output")}
BARE = {"attn_input": ("self_attn.k_proj", "input"), "ffn_input": ("mlp.up_proj", "input")}
PLAIN = BEFORE | {"ffn_input": ("post_attention_layernorm", "output")}
INNER = {
    "o_proj_input": ("self_attn.o_proj", "input"),
    "down_proj_input": ("mlp.down_proj", "input"),
}
HOOKS = {
    "llama": PLAIN | INNER,
    "mistral": PLAIN | INNER,
    "qwen2": PLAIN | INNER,
    "gemma3_text": BEFORE | {"ffn_input": ("mlp.gate_proj", "input")} | INNER,
    "olmo2": BARE | INNER,
    "olmo3": BARE | INNER,
    "glm4_moe": PLAIN | INNER | {"shared_expert_inner": ("mlp.shared_experts.down_proj", "input")},
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = {"attention", "ffn", "norm", "embedding"}


@pytest.fixture(params=MORE)
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> TinyPair:
    """The random pair of each further architecture in turn."""
    return pairs(request.param)


@pytest.fixture
def glm(pairs: Pairs, tmp_path: Path) -> TinyPair:
    """A copy of the GLM pair, to be changed."""
    return pairs("glm4_moe").copy(tmp_path / "pair")


def quiet(step: WalkStep) -> None:
    """Shows no progress."""


def change_config(folder: Path, **changes: Any) -> None:
    """Set some keys of a config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_every_table_is_tested() -> None:
    assert sorted([*ARCHITECTURES, *MORE]) == known_architectures()
    assert HOOKS.keys() == MORE.keys()


# Gradients


def test_streamed_gradients_are_those_of_the_whole_model_in_float64(
    pair: TinyPair, tmp_path: Path
) -> None:
    # One by one, as the oracle runs them: norms and routers compute in float32 whatever the
    # dtype, so that in a batch their rounding would show at 1e-9.
    found, walked = walk(pair.base, tmp_path, torch.float64, ONE_BY_ONE)
    for name, items in make_items().items():
        wanted, losses = whole_model_gradients(pair.base, items, torch.float64)
        assert walked.losses[name] == pytest.approx(losses, rel=1e-9)
        assert_same_gradients(found, wanted, name, 1e-9)


def test_streamed_gradients_in_batches_are_those_of_the_whole_model_in_float32(
    pair: TinyPair, tmp_path: Path
) -> None:
    found, walked = walk(pair.base, tmp_path)
    for name, items in make_items().items():
        wanted, losses = whole_model_gradients(pair.base, items, torch.float32)
        assert walked.losses[name] == pytest.approx(losses, rel=1e-5)
        assert_same_gradients(found, wanted, name, 1e-5)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "gemma3_text", "olmo3"])
def test_the_items_are_longer_than_the_windows(pairs: Pairs, architecture: str) -> None:
    """Else these tests would prove nothing about sliding windows."""
    folder = pairs(architecture).base
    item = make_items()["reasoning"][2]
    near, _ = item_losses(make_stream(folder), [item], quiet)
    model = resident(folder, torch.float32)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 1000
    model.config.sliding_window = 1000
    logits = model(input_ids=item.ids[None], use_cache=False).logits[0]
    far = torch.nn.functional.cross_entropy(logits[item.prompt - 1 : -1], item.ids[item.prompt :])
    assert abs(near[0] - float(far.detach())) > 1e-4


# Activations


@pytest.mark.parametrize(
    ("compute", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_gram_sums_of_all_sites_are_those_of_hooks_on_the_whole_model(
    pair: TinyPair, tmp_path: Path, compute: torch.dtype, rel: float
) -> None:
    found: dict[int, Sums] = {}
    walk_sites(pair, tmp_path, found, compute)
    checked = 0
    for (layer, site, expert), parts in hooked_rows(
        pair, compute, HOOKS[pair.architecture]
    ).items():
        rows = torch.cat(parts).double()
        if rows.shape[0] == 0:
            assert expert not in found[layer].get(site, {})
            continue
        assert found[layer][site][expert].rows == rows.shape[0]
        assert relative(found[layer][site][expert].total, rows.T @ rows) < rel
        checked += 1
    assert checked == sum(len(experts) for sums in found.values() for experts in sums.values())


def test_published_sites_are_the_inputs_of_attention_and_feed_forward(
    pair: TinyPair, tmp_path: Path
) -> None:
    sites = tuple(s for s in Checkpoint.open(pair.base).layout.sites if not s.extended)
    found: dict[int, Sums] = {}
    everything: dict[int, Sums] = {}
    walk_sites(pair, tmp_path / "published", found, sites=sites)
    walk_sites(pair, tmp_path / "all", everything)
    for layer, sums in found.items():
        assert sums.keys() == {"attn_input", "ffn_input"}
        for site, experts in sums.items():
            assert torch.equal(experts[0].total, everything[layer][site][0].total)


def test_every_projection_has_the_basis_of_what_it_reads(pair: TinyPair, tmp_path: Path) -> None:
    """The site of each matrix is as wide as its input, and what it may borrow is captured."""
    found: dict[int, Sums] = {}
    walk_sites(pair, tmp_path, found)
    checkpoint = Checkpoint.open(pair.base)
    for slot in checkpoint.slots.values():
        if slot.site is None or slot.layer is None:
            continue
        width = checkpoint.pieces[slot.name][0].shape[1]
        for taken in found[slot.layer][slot.site.name].values():
            assert taken.total.shape == (width, width), slot.name
        if slot.borrows is not None:
            assert slot.site.extended and not slot.borrows.extended


# Tables


def test_every_tensor_that_transformers_saves_is_classified(pair: TinyPair) -> None:
    checkpoint = Checkpoint.open(pair.base)
    check_parameters(checkpoint)
    names = [
        slot.tensor_name(expert)
        for _, slots in checkpoint.layers()
        for slot in slots
        for expert in range(len(checkpoint.pieces[slot.name]))
    ]
    assert sorted(names + checkpoint.carried) == sorted(load_tensors(pair.base))
    Pair.open(pair.base, pair.donor)


def test_components_and_sites_are_those_of_the_method(pair: TinyPair) -> None:
    checkpoint = Checkpoint.open(pair.base)
    sparse = {"expert", "shared_expert", "router"} if pair.architecture == "glm4_moe" else set()
    head = set() if checkpoint.tied else {"lm_head"}
    assert {s.component for s in checkpoint.slots.values()} == DENSE | sparse | head
    for slot in checkpoint.slots.values():
        matrix = len(checkpoint.pieces[slot.name][0].shape) == 2
        gated = slot.component in ("attention", "ffn", "expert", "shared_expert")
        assert (slot.site is not None) == (matrix and gated), slot.name
        if matrix and ".self_attn." in slot.name:
            assert slot.component == "attention"
        if "norm.weight" in slot.name and ".self_attn." not in slot.name:
            assert slot.component == "norm"
    extended = {s.name.split(".")[-2] for s in checkpoint.slots.values() if s.borrows}
    assert extended == {"o_proj", "down_proj"}


def test_the_models_parameters_and_buffers_are_those_that_transformers_loads(
    pair: TinyPair,
) -> None:
    stream = LayerStream(
        Checkpoint.open(pair.base), device=CPU, compute=torch.bfloat16, resident=True
    )
    model = resident(pair.base, torch.bfloat16)
    wanted = dict(model.named_buffers())
    found = dict(stream._model.named_buffers())
    for index in range(stream.num_layers):
        with stream.layer(index) as module:
            prefix = f"model.layers.{index}."
            found |= {prefix + n: b for n, b in module.named_buffers()}
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, model.get_parameter(prefix + name)), prefix + name
    assert found.keys() == wanted.keys()
    for name, buffer in wanted.items():
        assert torch.equal(found[name], buffer) and found[name].dtype == buffer.dtype, name


@pytest.mark.parametrize("architecture", known_architectures())
def test_heads_are_tied_by_default_where_the_library_ties_them(architecture: str) -> None:
    from transformers import AutoConfig

    assert layout_of(architecture).tied == AutoConfig.for_model(architecture).tie_word_embeddings


def test_a_config_that_does_not_say_that_the_head_is_tied(pairs: Pairs, tmp_path: Path) -> None:
    # As those of the published Gemma models.
    base = pairs("gemma3_text").copy(tmp_path / "pair").base
    change_config(base, tie_word_embeddings=None)
    checkpoint = Checkpoint.open(base)
    assert checkpoint.tied
    check_parameters(checkpoint)
    items = make_items()["agent"]
    losses, _ = item_losses(make_stream(base), items, quiet)
    _, wanted = whole_model_gradients(base, items, torch.float32)
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_rotary_frequencies_of_early_checkpoints_are_carried(pairs: Pairs, tmp_path: Path) -> None:
    base = pairs("llama").copy(tmp_path / "pair").base
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    save_tensors(base, load_tensors(base) | {n: torch.ones(4) for n in names})
    checkpoint = Checkpoint.open(base)
    assert sorted(checkpoint.carried) == names
    check_parameters(checkpoint)


# Fused experts


def fused_by(transform: Any) -> tuple[str, tuple[str, ...]]:
    """What a transformation of the library's stacks: the fused name's end, and the parts'.

    Any operation but stacking experts and concatenating their rows is one that `[[fused]]`
    cannot say.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    assert type(transform) is WeightConverter, f"{transform} is no converter"
    [target] = transform.target_patterns
    sources = tuple(transform.source_patterns)
    wanted = [(MergeModulelist, 0), (Concatenate, 1)][: 1 if len(sources) == 1 else 2]
    found = [(type(op), getattr(op, "dim", None)) for op in transform.operations]
    assert found == wanted, f"{target} is made by {found}"
    return target, sources


@pytest.mark.parametrize("architecture", known_architectures())
def test_the_table_fuses_what_the_library_fuses(architecture: str, pairs: Pairs) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = skeleton(Checkpoint.open(pairs(architecture).base), torch.bfloat16)
    # The legacy renamings of gamma and beta match no name of any table.
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    wanted: dict[str, tuple[str, ...]] = {}
    for transform in transforms:
        target, sources = fused_by(transform)
        for name, _ in model.named_parameters():
            if name.endswith(f".{target}"):
                place = name.removesuffix(target)
                wanted[name] = tuple(place + source for source in sources)
    layout = layout_of(architecture)
    found = {name: layout.fused_match(name) for name, _ in model.named_parameters()}
    assert {name: parts for name, parts in found.items() if parts} == wanted
    assert bool(wanted) == bool(layout.fused)


def test_an_operation_that_a_table_cannot_say_is_noticed() -> None:
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        Transpose,
        WeightConverter,
        WeightRenaming,
    )

    parts = ["experts.*.a.weight", "experts.*.b.weight"]
    stack = [MergeModulelist(dim=0), Concatenate(dim=1)]
    assert fused_by(WeightConverter(parts, "experts.ab", stack)) == ("experts.ab", tuple(parts))
    for odd in (
        WeightConverter(parts, "experts.ab", [*stack, Transpose(1, 2)]),
        WeightConverter(parts, "experts.ab", [MergeModulelist(dim=0), Concatenate(dim=2)]),
        WeightConverter(parts, "experts.ab", [Concatenate(dim=1)]),
        WeightRenaming("experts.a", "experts.b"),
    ):
        with pytest.raises(AssertionError):
            fused_by(odd)


def test_experts_may_be_fused_or_single(glm: TinyPair, tmp_path: Path) -> None:
    single = Checkpoint.open(glm.base)
    model = resident(glm.base, torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    whole = Checkpoint.open(tmp_path / "fused")
    check_parameters(whole)
    assert "model.layers.1.mlp.experts.gate_up_proj" in whole.entries.keys() - single.entries.keys()
    assert whole.slots == single.slots and sorted(whole.carried) == sorted(single.carried)
    for name, pieces in single.pieces.items():
        for expert in range(len(pieces)):
            assert torch.equal(whole.read(name, expert), single.read(name, expert)), name


# Buffers


def test_the_correction_of_the_router_is_what_the_checkpoint_says(glm: TinyPair) -> None:
    items = make_items()["agent"]
    before, _ = item_losses(make_stream(glm.base), items, quiet)
    tensors = load_tensors(glm.base)
    save_tensors(glm.base, tensors | {BIAS: -8 * tensors[BIAS]})
    after, _ = item_losses(make_stream(glm.base), items, quiet)
    _, wanted = whole_model_gradients(glm.base, items, torch.float32)
    assert after == pytest.approx(wanted, rel=1e-5)
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > 1e-4


def test_a_stored_buffer_that_is_missing_or_misshapen_is_refused(glm: TinyPair) -> None:
    tensors = load_tensors(glm.base)
    save_tensors(glm.base, {n: t for n, t in tensors.items() if n != BIAS})
    checkpoint = Checkpoint.open(glm.base)
    with pytest.raises(CheckpointError, match=rf"{BIAS} is missing"):
        check_parameters(checkpoint)
    with pytest.raises(CheckpointError, match=rf"no tensor for {BIAS}"):
        LayerStream(checkpoint, device=CPU, compute=torch.float32)
    save_tensors(glm.base, tensors | {BIAS: tensors[BIAS][:-1].clone()})
    with pytest.raises(CheckpointError, match=rf"{BIAS} is \[7\], the config says \[8\]"):
        check_parameters(Checkpoint.open(glm.base))


def test_layers_for_multi_token_prediction_are_carried_as_far_as_the_config_goes(
    glm: TinyPair,
) -> None:
    before = Checkpoint.open(glm.base)
    names = ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.1.up_proj.weight"]
    save_tensors(glm.base, load_tensors(glm.base) | {n: torch.zeros(2, 2) for n in names})
    checkpoint = Checkpoint.open(glm.base)
    assert set(checkpoint.carried) == {*before.carried, *names}
    assert checkpoint.slots == before.slots
    check_parameters(checkpoint)
    change_config(glm.base, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        Checkpoint.open(glm.base)


# Refusals


def bare(folder: Path, config: Any) -> Checkpoint:
    """A checkpoint of a model without a table, as if its names were those of Llama."""
    config.save_pretrained(folder)
    known = json.loads((folder / "config.json").read_text())
    return Checkpoint(folder, known, layout_of("llama"), [], {}, {})


@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral", "gemma3", "gpt_neox"])
def test_a_model_type_without_a_table_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{architecture}' has no layout table.*glm4_moe"):
        layout_of(architecture)


def test_a_model_that_keeps_its_layers_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPTNeoXConfig

    for number, (config, name) in enumerate(
        [
            (GPTNeoXConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2), "GPTNeoX"),
            (GPT2Config(n_embd=32, n_head=4, n_layer=2), "GPT2LMHead"),
        ]
    ):
        checkpoint = bare(tmp_path / str(number), config)
        with pytest.raises(CheckpointError, match=rf"{name}\w* does not keep its decoder layers"):
            LayerStream(checkpoint, device=CPU, compute=torch.float32)


def test_a_model_that_looks_ahead_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(CheckpointError, match=r"later tokens in model\.layers\.0\.self_attn"):
        skeleton(bare(tmp_path, config), torch.float32)


def test_more_experts_per_token_than_there_are_are_refused(glm: TinyPair) -> None:
    change_config(glm.base, num_experts_per_tok=9)
    with pytest.raises(CheckpointError, match="9 experts per token of 8"):
        check_parameters(Checkpoint.open(glm.base))
