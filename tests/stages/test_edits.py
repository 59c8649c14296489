"""The edits that a recipe can name, against their formulas, and the parts in each other's place."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyPair, load_tensors
from tiny_merge import asked, merged, same_bits, statuses
from torch import Tensor

from crane_tasks.errors import RecipeError
from crane_tasks.merge_section import known_methods
from crane_tasks.method import keys_of
from crane_tasks.scores.gradients import read_gradient
from crane_tasks.session import open_context

Pairs = Callable[[str], TinyPair]
ALPHA = 0.5
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight")


class Shop:
    """One pair, one store; a merge per edit."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair, self.folder = pair, folder
        self.base, self.donor = load_tensors(pair.base), load_tensors(pair.donor)

    def tensors(self, *assignments: str) -> dict[str, Tensor]:
        """The merged tensors but embedding and head, which no edit's parts concern."""
        output = self.folder / str(len(list(self.folder.iterdir())))
        merged(self.pair, self.folder / "store", output, f"alpha={ALPHA}", *assignments)
        return {n: t for n, t in load_tensors(output).items() if n not in OUTSIDE}

    def delta(self, name: str) -> Tensor:
        return self.donor[name].float() - self.base[name].float()

    def rounded(self, name: str, edit: Tensor) -> Tensor:
        return (self.base[name].float() + edit).to(self.base[name].dtype)


@pytest.fixture(scope="module")
def shop(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Of a sparse pair, with kept gradients in its store."""
    folder = tmp_path_factory.mktemp("shop")
    merged(pairs("qwen3_moe"), folder / "store", folder / "crane", f"alpha={ALPHA}")
    return Shop(pairs("qwen3_moe"), folder)


def largest(delta: Tensor, density: float) -> Tensor:
    """The share of a tensor's entries that is largest, the others 0."""
    size = delta.abs().flatten()
    keep = round(density * size.numel())
    cut = size.sort().values[size.numel() - keep - 1] if keep < size.numel() else -1.0
    return torch.where(delta.abs() > cut, delta, 0.0)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_plain_interpolation_moves_by_alpha(method: str, shop: Shop) -> None:
    for name, found in shop.tensors(f"merge.method={method}").items():
        assert torch.equal(found, shop.rounded(name, ALPHA * shop.delta(name))), name


@pytest.mark.parametrize("density", [0.2, 0.75, 1.0])
def test_ties_keeps_the_largest_and_crane_scales_them_up(density: float, shop: Shop) -> None:
    for method, scale in (("ties", 1.0), ("crane", 1 / density)):
        found = shop.tensors(f"merge.method={method}", f"merge.density={density}",
                             "merge.threshold=top" if scale == 1.0 else "merge.threshold=median",
                             "merge.gate=flat", "merge.projection=none")  # fmt: skip
        for name, tensor in found.items():
            edit = ALPHA * (largest(shop.delta(name), density) * scale)
            wanted = shop.rounded(name, edit).float()
            # The product's factors may be taken in another order: an ulp at a tie.
            off = (tensor.float() - wanted).abs() > 2**-7 * wanted.abs()
            assert not off.any(), (method, name)


def test_dare_drops_at_random_and_keeps_the_mean(shop: Shop) -> None:
    density, kept, total = 0.3, 0, 0
    change = ("merge.method=dare", f"merge.density={density}")
    first = shop.tensors(*change)
    for name, found in first.items():
        moved = found != shop.base[name]
        wanted = shop.rounded(name, ALPHA * shop.delta(name) / density)
        same = (found == wanted) | (found == shop.base[name])
        assert same.all(), name
        kept, total = kept + int(moved.sum()), total + moved.numel()
    assert kept / total == pytest.approx(density, abs=0.02)
    # Neither shards nor windows change what is drawn; the seed does.
    assert same_bits(first, shop.tensors(*change, "run.shard_size=40KB"))
    assert not same_bits(first, shop.tensors(*change, "merge.seed=1"))


def test_slerp_ends_at_base_and_donor_and_keeps_the_angle_in_between(shop: Shop) -> None:
    ends = {0.0: shop.base, 1.0: shop.donor}
    for alpha, wanted in ends.items():
        found = shop.tensors("merge.method=slerp", f"alpha={alpha}")
        assert all(torch.equal(t, wanted[n]) for n, t in found.items())
    for name, found in shop.tensors("merge.method=slerp").items():
        a, b, c = (t.double().flatten() for t in (shop.base[name], shop.donor[name], found))
        if a.numel() < 512:
            continue  # rounding is much of a short vector
        along = [float(torch.dot(end / end.norm(), c)) for end in (a, b)]
        assert along[0] == pytest.approx(along[1], rel=2e-2), name


def test_the_elementwise_gate_keeps_what_lowers_both_losses(shop: Shop) -> None:
    changes = ("merge.method=elementwise", "merge.gate=flat", "merge.projection=none")
    found = shop.tensors(*changes)
    ctx = open_context(asked(shop.pair, shop.folder / "store", *changes))
    kept = ctx.store.open(keys_of(ctx).refs["gradients"])
    base = ctx.pair().base
    for slot in base.slots.values():
        if slot.component in ("embedding", "lm_head"):
            continue
        for expert in range(len(base.pieces[slot.name])):
            name, index = slot.tensor_name(expert), expert if slot.stacked else None
            g_r, g_a = (read_gradient(kept, k, slot, index).float() for k in ("reasoning", "agent"))
            delta = shop.delta(name)
            agreed = torch.minimum(-g_r * delta, -g_a * delta) > 0
            assert torch.equal(found[name], shop.rounded(name, ALPHA * delta * agreed)), name


def test_the_elementwise_gate_needs_kept_gradients(pairs: Pairs, tmp_path: Path) -> None:
    place = (pairs("qwen3"), tmp_path / "store", tmp_path / "out")
    elementwise = "merge.method=elementwise"
    with pytest.raises(RecipeError, match=r"gate\.store_gradients is false"):
        merged(*place, elementwise, "gate.store_gradients=false")
    merged(*place, "gate.store_gradients=false")
    with pytest.raises(RecipeError, match="was scored without keeping them"):
        merged(place[0], place[1], tmp_path / "other", elementwise)


MADE = {
    "crane": {"calibration", "threshold", "scores", "projector"},
    "linear": set(),
    "task_arithmetic": set(),
    "slerp": set(),
    "dare": set(),
    "ties": {"threshold"},
    "elementwise": {"calibration", "scores", "projector"},
    "regmean": {"calibration", "moments"},
    "aim": {"calibration", "magnitudes"},
}
EVERY = set[str]().union(*MADE.values())


@pytest.mark.parametrize("method", known_methods())
def test_a_stage_that_an_edit_does_not_need_is_neither_made_nor_in_its_key(
    method: str, pairs: Pairs, tmp_path: Path
) -> None:
    heldout = ("evaluate.reasoning=null", "evaluate.agent=null")
    result = merged(pairs("qwen3"), tmp_path / "store", tmp_path / "out",
                    f"merge.method={method}", *heldout)  # fmt: skip
    assert statuses(result).keys() == MADE[method] | {"delta", "apply", "evaluate"}
    made = {p.name for p in (tmp_path / "store").iterdir() if p.is_dir()}
    assert made >= MADE[method] and not made & (EVERY - MADE[method])
    apply = result.keys.refs["apply"]
    made_from = {role.split("_")[0] for role in apply.inputs}
    assert made_from & EVERY == MADE[method] - {"calibration"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("P_tau removes" in card) is ("projector" in MADE[method])
    assert ("S weighs" in card) is ("scores" in MADE[method])
    assert ("tau =" in card) is ("projector" in MADE[method])


def test_a_hard_projection_leaves_nothing_where_the_sigmoid_leaves_little(shop: Shop) -> None:
    found = {
        name: shop.tensors(f"merge.projection={name}", "tau=0.2")
        for name in ("sigmoid", "hard", "ridge", "none")
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    base = shop.base[name].float()
    sizes = {kind: float((t[name].float() - base).norm()) for kind, t in found.items()}
    assert sizes["none"] > max(sizes["sigmoid"], sizes["hard"], sizes["ridge"])
    assert len({round(size, 6) for size in sizes.values()}) == 4


def test_further_factors_multiply_and_one_that_matches_nothing_is_refused(shop: Shop) -> None:
    plain = shop.tensors("merge.method=linear")
    scales = "{attention: 0.5, 'layers 1-': 2.0, '*.mlp.experts.*.up_proj.weight': 0.0}"
    found = shop.tensors("merge.method=linear", f"merge.scales={scales}")
    for name, tensor in found.items():
        factor = 2.0 if ".layers.1." in name else 1.0
        factor *= 0.5 if "self_attn" in name else 1.0
        factor *= 0.0 if "up_proj" in name else 1.0
        if factor == 1.0:
            assert torch.equal(tensor, plain[name]), name
        else:
            wanted = shop.rounded(name, ALPHA * factor * shop.delta(name))
            assert torch.equal(tensor, wanted), name
    with pytest.raises(RecipeError, match=r"merge\.scales: 'fnn' matches no tensor.*attention"):
        shop.tensors("merge.scales={fnn: 2.0}")


def test_the_router_may_be_projected_on_either_path(shop: Shop) -> None:
    name = "model.layers.0.mlp.gate.weight"
    found = {
        kind: shop.tensors(f"merge.router={kind}")
        for kind in ("gated", "slerp", "gated-projected", "slerp-projected")
    }
    changed = {
        n for n in found["gated"] for t in found.values() if not t[n].equal(found["gated"][n])
    }
    assert changed and all(n.endswith("mlp.gate.weight") for n in changed)
    assert len({t[name].float().sum().item() for t in found.values()}) == 4


def test_unified_components_share_a_score(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3_next")
    apart = merged(pair, tmp_path / "store", tmp_path / "one")
    place = (pair, tmp_path / "store", tmp_path / "two")
    together = merged(*place, "gate.unify=true")
    assert statuses(together)["scores"] == "reused"
    assert apart.scores is not None and together.scores is not None
    for layer, row in together.scores.per_layer.items():
        assert row.keys() == apart.scores.per_layer[layer].keys()
        assert row["shared_expert"] == row["expert"]
        assert apart.scores.per_layer[layer]["shared_expert"] != row["expert"]
    assert {c: together.scores.per_component[c] for c in ("linear_attn", "attention")} == (
        dict.fromkeys(("linear_attn", "attention"), together.scores.per_component["attention"])
    )


def test_a_method_that_is_not_there_is_refused_by_name(pairs: Pairs) -> None:
    with pytest.raises(RecipeError, match=r"merge\.method: .*one of aim, crane, dare, elementwise"):
        pairs("qwen3").recipe("merge.method=tiess")


def test_a_finer_gate_scales_each_part_by_its_own_score(shop: Shop) -> None:
    plain = ("merge.threshold=none", "merge.projection=none")
    names = ("model.layers.0.mlp.experts.{}.up_proj.weight", "model.layers.0.self_attn.{}.weight")
    experts = [names[0].format(e) for e in range(4)]
    weights = [names[1].format(k) for k in ("q_proj", "k_proj", "v_proj", "o_proj")]

    def factors(found: dict[str, Tensor], chosen: list[str]) -> list[float]:
        """By how much of its delta each tensor moved."""
        moved = {n: found[n].float() - shop.base[n].float() for n in chosen}
        return [
            float((moved[n] * shop.delta(n)).sum() / shop.delta(n).square().sum()) for n in chosen
        ]

    whole, tensor, expert = (
        shop.tensors(*plain, f"gate.per={per}") for per in ("component", "tensor", "expert")
    )
    alike = {"rel": 0.02}  # all are rounded to bfloat16
    assert factors(whole, experts) == pytest.approx([factors(whole, experts)[0]] * 4, **alike)
    assert factors(tensor, experts) == pytest.approx([factors(tensor, experts)[0]] * 4, **alike)
    assert len({round(f, 2) for f in factors(expert, experts)}) > 1
    assert factors(expert, weights) == pytest.approx(factors(whole, weights), **alike)
    assert len({round(f, 2) for f in factors(tensor, weights)}) > 1
    for found in (tensor, expert):  # as long as that of the whole component
        for group in ("self_attn", "experts"):
            own = [n for n in whole if f"layers.0.{group}" in n or f"layers.0.mlp.{group}" in n]
            sizes = [
                sum(float((t[n].float() - shop.base[n].float()).square().sum()) for n in own)
                for t in (whole, found)
            ]
            assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
