"""Gram matrices of the walk are those of hooks on the whole model, killed or not."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors
from torch import Tensor
from torch.nn.functional import linear, silu

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Site
from crane_tasks.models.walk.activations import Sums, walk_activations
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.numerics.projector import gram

Rows = dict[tuple[int, str, int], list[Tensor]]  # (layer, site, expert) -> rows
EVERYWHERE = {"attn_input", "ffn_input"}
ATTENTION = EVERYWHERE | {"o_proj_input"}
SITES = {
    "qwen3": [ATTENTION | {"down_proj_input"}] * 2,
    "qwen3_moe": [ATTENTION | {"expert_inner"}] * 2,
    "qwen3_next": [
        EVERYWHERE | {"linattn_inner", "expert_inner", "shared_expert_inner"},
        ATTENTION | {"expert_inner", "shared_expert_inner"},
    ],
}
Hooks = dict[str, tuple[str, str]]  # site -> module of the layer, side
HOOKS: Hooks = {
    "attn_input": ("input_layernorm", "output"),
    "ffn_input": ("post_attention_layernorm", "output"),
    "o_proj_input": ("self_attn.o_proj", "input"),
    "down_proj_input": ("mlp.down_proj", "input"),
    "linattn_inner": ("linear_attn.out_proj", "input"),
    "shared_expert_inner": ("mlp.shared_expert.down_proj", "input"),
}


class Killed(Exception):
    """Stands for whatever ends a walk half way."""


def make_items() -> list[tuple[Tensor, Tensor]]:
    """Token ids and the positions that are taken: a few, all, and none of them."""
    generator = torch.Generator().manual_seed(5)
    lengths = (7, 30, 12, 4)
    ids = [torch.randint(320, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.5 for n in lengths]
    masks[2][:], masks[3][:] = True, False
    return list(zip(ids, masks, strict=True))


def all_sites(pair: TinyPair) -> tuple[Site, ...]:
    return Checkpoint.open(pair.base).layout.sites


def quiet(step: WalkStep) -> None:
    """Shows no progress."""


def walk(
    pair: TinyPair,
    scratch: Path,
    found: dict[int, Sums],
    compute: torch.dtype = torch.float32,
    *,
    sites: tuple[Site, ...] | None = None,
    kill_at: int | None = None,
    committed: bool = False,
) -> None:
    """Walk into `found`, skipping what it has; `kill_at` dies at the visit of that layer."""

    def visit(layer: int, sums: Sums) -> None:
        if layer == kill_at and not committed:
            raise Killed
        assert layer not in found, "visited once"
        found[layer] = sums
        if layer == kill_at:
            raise Killed

    walk_activations(
        LayerStream(Checkpoint.open(pair.base), device=torch.device("cpu"), compute=compute),
        make_items(),
        all_sites(pair) if sites is None else sites,
        reduce=gram,
        states=States(scratch),
        done=set(found),
        visit=visit,
        on_step=quiet,
    )


def hooked_rows(pair: TinyPair, compute: torch.dtype, hooks: Hooks = HOOKS) -> Rows:
    """The rows at every site by hooks on the whole model.

    An expert's inner rows are computed from the tensors of the file, one expert each, and
    from the choices of the model's own router.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=compute).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    tensors = load_tensors(pair.base)
    rows: Rows = defaultdict(list)
    mask = torch.empty(0)

    def tap(layer: int, site: str, side: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states = output if side == "output" else args[0]
            rows[layer, site, 0].append(states.reshape(-1, states.shape[-1])[mask])

        return hook

    def routed(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states, chosen = args[0].reshape(-1, args[0].shape[-1]), output[2]
            for expert in range(module.weight.shape[0]):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}."
                gate, up = (tensors[f"{prefix}{p}_proj.weight"].to(compute) for p in ("gate", "up"))
                mine = states[mask & (chosen == expert).any(dim=-1)]
                rows[layer, "expert_inner", expert].append(
                    silu(linear(mine, gate)) * linear(mine, up)
                )

        return hook

    for number, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        for site, (name, side) in hooks.items():
            if name in modules:
                modules[name].register_forward_hook(tap(number, site, side))
        if "mlp.gate" in modules:
            modules["mlp.gate"].register_forward_hook(routed(number))
    with torch.no_grad():
        for ids, mask in make_items():  # noqa: B007  the hooks read it
            model(input_ids=ids[None], use_cache=False)
    return rows


@pytest.mark.parametrize(
    ("compute", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_gram_sums_are_those_of_hooks_on_the_whole_model(
    tiny_pair: TinyPair, tmp_path: Path, compute: torch.dtype, rel: float
) -> None:
    found: dict[int, Sums] = {}
    walk(tiny_pair, tmp_path, found, compute)
    rows = hooked_rows(tiny_pair, compute)
    checked = 0
    for (layer, site, expert), parts in rows.items():
        stacked = torch.cat(parts).double()
        if stacked.shape[0] == 0:
            assert expert not in found[layer][site]
            continue
        ours = found[layer][site][expert]
        wanted = stacked.T @ stacked
        assert ours.rows == stacked.shape[0]
        assert ours.total.dtype == torch.float64
        assert float((ours.total - wanted).norm() / wanted.norm()) < rel
        checked += 1
    assert checked == sum(len(experts) for sums in found.values() for experts in sums.values())


def test_every_layer_has_the_sites_of_its_kind_and_no_other(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    found: dict[int, Sums] = {}
    walk(tiny_pair, tmp_path, found)
    assert [found[layer].keys() for layer in (0, 1)] == SITES[tiny_pair.architecture]


def test_published_sites_alone_take_no_others(tiny_pair: TinyPair, tmp_path: Path) -> None:
    published = tuple(site for site in all_sites(tiny_pair) if not site.extended)
    found: dict[int, Sums] = {}
    walk(tiny_pair, tmp_path, found, sites=published)
    wanted = EVERYWHERE | {"linattn_inner"}
    for layer, sites in enumerate(SITES[tiny_pair.architecture]):
        assert found[layer].keys() == sites & wanted


def test_each_row_goes_to_as_many_experts_as_the_router_takes(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    found: dict[int, Sums] = {}
    walk(moe_pair, tmp_path, found)
    taken = sum(int(mask.sum()) for _, mask in make_items())
    for sums in found.values():
        assert sums["ffn_input"][0].rows == taken
        assert sum(s.rows for s in sums["expert_inner"].values()) == 2 * taken


@pytest.mark.parametrize("kill_at", [0, 1])
@pytest.mark.parametrize("committed", [False, True], ids=["before commit", "after commit"])
def test_a_walk_killed_anywhere_resumes_to_bit_identical_sums(
    tiny_pair: TinyPair, tmp_path: Path, kill_at: int, committed: bool
) -> None:
    wanted: dict[int, Sums] = {}
    walk(tiny_pair, tmp_path / "undisturbed", wanted)
    found: dict[int, Sums] = {}
    with pytest.raises(Killed):
        walk(tiny_pair, tmp_path / "killed", found, kill_at=kill_at, committed=committed)
    assert len(found) == kill_at + committed
    walk(tiny_pair, tmp_path / "killed", found)
    assert found.keys() == wanted.keys()
    for layer, sums in wanted.items():
        for site, experts in sums.items():
            for expert, one in experts.items():
                assert torch.equal(found[layer][site][expert].total, one.total)
                assert found[layer][site][expert].rows == one.rows
