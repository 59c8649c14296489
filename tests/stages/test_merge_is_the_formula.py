"""The merged weights are those of docs/method.md, computed the plain way over the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    TinyPair,
    load_tensors,
    save_tensors,
    tiny_config,
    write_checkpoint,
    write_data,
    write_recipe,
)
from tiny_merge import PlainMerge, bits, merged, same_bits

from crane_tasks.models.files.checkpoint import Checkpoint

Pairs = Callable[[str], TinyPair]
TAU = 0.2  # protection then varies over the directions instead of being 1 for nearly all


def square_pair(folder: Path) -> TinyPair:
    """A dense pair whose o_proj and down_proj are as wide as the bases that they may borrow."""
    folder.mkdir(parents=True)
    config = tiny_config("qwen3", head_dim=8, intermediate_size=32)
    base = write_checkpoint(folder / "base", config, seed=3, dtype=torch.bfloat16)
    write_checkpoint(folder / "donor", config, seed=3, dtype=torch.bfloat16)
    torch.manual_seed(4)
    donor = {n: (t.float() + 0.02 * torch.randn(t.shape)).to(t.dtype) for n, t in base.items()}
    save_tensors(folder / "donor", donor)
    write_data(folder)
    write_recipe(folder)
    return TinyPair("qwen3", folder)


def half_ulp(exact: torch.Tensor) -> torch.Tensor:
    """The largest error of rounding to bfloat16."""
    _, exponent = torch.frexp(exact)
    return torch.ldexp(torch.ones_like(exact), exponent - 9)


def assert_loads(folder: Path) -> None:
    """transformers finds all that it expects in a checkpoint, and nothing else."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {kind: names for kind, names in info.items() if names}
    assert not problems
    tensors = load_tensors(folder)
    state = model.state_dict()
    alike = [n for n in tensors if n in state]
    assert all(torch.equal(state[n], tensors[n]) for n in alike)
    assert "model.embed_tokens.weight" in alike and "model.norm.weight" in alike


SITES = ("published", "all")
CASES = [
    *((name, "published") for name in (*ARCHITECTURES, "square")),
    ("qwen3_moe", "all"),
    ("qwen3_next", "all"),
    # Of the other architectures those that differ most: a bare decoder, norms on both sides
    # of each half, and dense beside sparse layers with a buffer that is stored.
    *(
        pytest.param(name, sites, marks=[pytest.mark.slow] if sites == "published" else [])
        for name in ("llama", "gemma3_text", "glm4_moe")
        for sites in SITES
    ),
]
ROWS = "{'<think>': 0.8, '</think>': 0.8}"


@pytest.mark.parametrize(("which", "sites"), CASES)
def test_every_merged_weight_is_the_formulas_value_rounded(
    which: str, sites: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair = square_pair(tmp_path / "pair") if which == "square" else pairs(which)
    result = merged(
        pair,
        tmp_path / "store",
        tmp_path / "out",
        f"tau={TAU}",
        f"projector.sites={sites}",
        f"merge.embedding.rows={ROWS}",
        *([] if tied(pair) else [f"merge.lm_head.rows={ROWS}"]),
    )
    plain = PlainMerge(pair, alpha=0.5, tau=TAU, sites=sites)
    assert result.scores is not None
    for layer, row in plain.scores.items():
        assert result.scores.per_layer[layer] == pytest.approx(row, rel=1e-4)
    found = load_tensors(tmp_path / "out")
    assert found.keys() == plain.base.keys()
    alike = total = 0
    for name, base in plain.base.items():
        edit = plain.edit(name)
        exact = base.double() + edit
        # Beyond the rounding only what float32 products lose, far below the edit.
        room = half_ulp(exact) * 1.001 + 2e-4 * edit.abs().max()
        assert bool(((found[name].double() - exact).abs() <= room).all()), name
        alike += int((found[name] == exact.to(base.dtype)).sum())
        total += base.numel()
    assert alike > 0.999 * total
    changed = sum(int((found[n] != plain.base[n]).sum()) for n in found)
    assert changed > 0.1 * total
    assert_loads(tmp_path / "out")


def test_borrowing_a_basis_matters_where_the_widths_are_equal(tmp_path: Path) -> None:
    pair = square_pair(tmp_path / "pair")
    plain = PlainMerge(pair, alpha=0.5, tau=TAU, sites="published")
    name = "model.layers.0.self_attn.o_proj.weight"
    with_borrowed = plain.edit(name)
    plain.inputs["model.layers.0.input_layernorm"] = torch.zeros(0, 32, dtype=torch.float64)
    assert float((with_borrowed - plain.edit(name)).norm() / with_borrowed.norm()) > 0.1


def tied(pair: TinyPair) -> bool:
    """Whether the head is the embedding, so that no section of its own rules it."""
    return Checkpoint.open(pair.base).tied


def test_alpha_zero_gives_the_bases_bits(tiny_pair: TinyPair, tmp_path: Path) -> None:
    nothing = ["alpha=0", *([] if tied(tiny_pair) else ["merge.lm_head.scale=0"])]
    merged(tiny_pair, tmp_path / "store", tmp_path / "out", *nothing)
    assert same_bits(load_tensors(tmp_path / "out"), load_tensors(tiny_pair.base))


def test_stochastic_rounding_does_not_depend_on_the_shards(pairs: Pairs, tmp_path: Path) -> None:
    pair, store = pairs("qwen3"), tmp_path / "store"
    outs = {}
    for size, name in ((None, "own"), (20_000, "small")):
        more = [] if size is None else [f"run.shard_size={size}"]
        merged(pair, store, tmp_path / name, "merge.rounding=stochastic", *more)
        outs[name] = load_tensors(tmp_path / name)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    assert same_bits(outs["own"], outs["small"])
    merged(pair, store, tmp_path / "nearest")
    nearest = load_tensors(tmp_path / "nearest")
    assert any(bits(nearest[n]) != bits(outs["own"][n]) for n in nearest)
    for name, tensor in nearest.items():
        gap = (tensor.double() - outs["own"][name].double()).abs()
        assert bool((gap <= 4 * half_ulp(tensor.double())).all()), name


def test_slerp_moves_the_router_by_a_third_of_alpha(moe_pair: TinyPair, tmp_path: Path) -> None:
    merged(moe_pair, tmp_path / "store", tmp_path / "out", "merge.router=slerp", "alpha=0.9")
    name = "model.layers.1.mlp.gate.weight"
    base = load_tensors(moe_pair.base)[name].double()
    donor = load_tensors(moe_pair.donor)[name].double()
    found = load_tensors(tmp_path / "out")[name]
    cosine = (base * donor).sum() / base.norm() / donor.norm()
    assert float(cosine) < 0.9995
    omega = torch.arccos(cosine)
    wanted = (torch.sin(0.7 * omega) * base + torch.sin(0.3 * omega) * donor) / torch.sin(omega)
    assert bool(((found.double() - wanted).abs() <= 1.01 * half_ulp(wanted) + 1e-6).all())


def test_weights_in_float16_are_rounded_as_asked(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    for side in (pair.base, pair.donor):
        save_tensors(side, {n: t.to(torch.float16) for n, t in load_tensors(side).items()})
    found = {}
    for kind in ("nearest", "stochastic"):
        place = (pair, tmp_path / "store", tmp_path / kind)
        merged(*place, "merge.method=linear", "alpha=0.3", f"merge.rounding={kind}")
        found[kind] = load_tensors(tmp_path / kind)
    name = "model.layers.0.mlp.up_proj.weight"
    near, drawn = found["nearest"][name], found["stochastic"][name]
    assert drawn.dtype == torch.float16 and 0.2 < float((near != drawn).float().mean()) < 0.8
    assert float((near.double() - drawn.double()).mean().abs()) < 1e-6
