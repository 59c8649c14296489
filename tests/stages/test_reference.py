"""The whole merge against what the method's official code gave on the reference pairs."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_tensors
from safetensors.torch import load_file
from torch import Tensor

from artifacts.store import Store
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.layout import Slot
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.walk.losses import Item, item_losses
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.numerics.projector import project, protection
from crane_tasks.numerics.threshold import keep_above, median_magnitude
from crane_tasks.recipe_file import load_recipe
from crane_tasks.rendering import render
from crane_tasks.rows import load_rows
from crane_tasks.session import Session
from flows.merge import Merged, merge

TAU = 0.03
HELDOUT = 40
# The official figures were computed in bfloat16. A norm has 96 coordinates per layer and a
# router a few hundred, over which its rounding errors average out less.
TOLERANCE = {"router": 0.10, "norm": 0.05}


@dataclass(frozen=True)
class Reference:
    """A reference pair, the official results on it, and our merge."""

    folder: Path
    merged: Merged

    @property
    def official(self) -> Path:
        return self.folder / "official"

    @property
    def output(self) -> Path:
        return self.merged.ctx.output


def write_recipe(reference: Path, folder: Path) -> Path:
    """The recipe of the official run: alpha 0.5, tau 0.03, that script's defaults."""
    head = {"lm_head": {"scale": 0.03, "keep_special": False}}
    recipe = {
        "name": "reference",
        "base": str(reference / "base"),
        "donor": str(reference / "donor"),
        "alpha": 0.5,
        "tau": TAU,
        "calibration": {
            kind: {"data": str(reference / f"{kind}.jsonl")}
            for kind in ("reasoning", "agent", "format")
        },
        "merge": {"router": "slerp", **({} if Checkpoint.open(reference / "base").tied else head)},
        "run": {"output": str(folder / "merged"), "device": "cpu"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Reference]:
    """Merges a reference pair once."""
    known: dict[Path, Reference] = {}

    def get(reference: Path) -> Reference:
        if reference not in known:
            folder = tmp_path_factory.mktemp(reference.name)
            recipe = load_recipe(write_recipe(reference, folder))
            session = Session(recipe, Store(folder / "store"))
            known[reference] = Reference(reference, merge(session))
        return known[reference]

    return get


@pytest.fixture
def run(reference: Path, merges: Callable[[Path], Reference]) -> Reference:
    """Our merge of each reference pair in turn."""
    return merges(reference)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_scores_per_layer_and_component_are_the_official_ones(run: Reference) -> None:
    assert run.merged.scores is not None
    official = json.loads((run.official / "scores.json").read_text())
    found = run.merged.scores
    assert {str(layer) for layer in found.per_layer} == official["per_layer_S_reason"].keys()
    for layer, wanted in official["per_layer_S_reason"].items():
        ours = found.per_layer[int(layer)]
        assert ours.keys() == wanted.keys()
        for component, score in wanted.items():
            limit = TOLERANCE.get(component, 0.03)
            assert ours[component] == pytest.approx(score, rel=limit), (layer, component)
    wanted = official["per_component_S_reason"]
    assert found.per_component.keys() == wanted.keys()
    for component, score in wanted.items():
        limit = TOLERANCE.get(component, 0.03)
        assert found.per_component[component] == pytest.approx(score, rel=limit), component


def test_the_official_baseline_scores_one_in_every_layer(run: Reference) -> None:
    assert run.merged.scores is not None
    metadata = json.loads((run.official / "scores.json").read_text())["metadata"]
    baseline = metadata["baseline_component"]
    assert set(run.merged.scores.baseline.values()) == {baseline}
    assert all(row[baseline] == 1.0 for row in run.merged.scores.per_layer.values())


def weighted_projector(directions: Tensor, sigma: Tensor) -> Tensor:
    """V diag(w) Vᵀ in float64."""
    wide = directions.double()
    return wide * protection(sigma.double(), TAU) @ wide.T


def test_projectors_are_the_official_ones(run: Reference) -> None:
    official = load_file(run.official / "projectors.safetensors")
    ours = run.merged.ctx.store.open(run.merged.keys.refs["projector"])
    names = sorted(n.removesuffix(".sigma") for n in official if n.endswith(".sigma"))
    assert len(names) == 12
    for name in names:  # layer_3_attn_input
        _, layer, site = name.split("_", 2)
        unit = f"layer.{layer}"
        wanted = weighted_projector(official[f"{name}.V_r"], official[f"{name}.sigma"])
        sigma = ours.read(unit, f"{site}.sigma")
        found = weighted_projector(ours.read(unit, f"{site}.directions"), sigma)
        assert relative(found, wanted) < 0.03, name
        strongest = float(official[f"{name}.sigma"][0])
        assert float(sigma[0]) == pytest.approx(strongest, rel=0.01), name


def edits(merged: Path, base: Path) -> dict[str, Tensor]:
    """What a merge changed, per tensor, float32."""
    theirs = load_tensors(base)
    return {n: t.float() - theirs[n].float() for n, t in load_tensors(merged).items()}


def by_component(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of each component as one vector, in the order of their names."""
    checkpoint = Checkpoint.open(folder)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name in sorted(tensors):
        slot, _ = checkpoint.stored_parts(checkpoint.entries[name])[0]
        parts[checkpoint.slots[slot].component].append(tensors[name].flatten())
    return {component: torch.cat(found) for component, found in parts.items()}


def test_the_merged_edit_of_each_component_is_the_official_one(run: Reference) -> None:
    base = run.folder / "base"
    ours = by_component(base, edits(run.output, base))
    official = edits(run.official / "merged_a0.5_tau0.03", base)
    theirs = by_component(base, official)
    assert ours.keys() == theirs.keys()
    assert not theirs["embedding"].any()
    for component, wanted in theirs.items():
        if wanted.any():
            assert relative(ours[component], wanted) < 0.03, component
        else:
            assert not ours[component].any(), component


def test_no_single_tensor_strays_from_the_official_one(run: Reference) -> None:
    base = run.folder / "base"
    ours, theirs = edits(run.output, base), edits(run.official / "merged_a0.5_tau0.03", base)
    for name, wanted in theirs.items():
        # The official delta is subtracted in bfloat16, where hundreds of entries can be tied
        # at the median: all of them are dropped there, and half of them kept here. One
        # expert's edit differs by 14 % for that reason (1 % if subtracted like that: next
        # test). A norm's edit is a few units in the
        # last place, so that rounding alone is much of it.
        if wanted.any() and wanted.dim() > 1:
            assert relative(ours[name], wanted) < 0.16, name


def official_basis(run: Reference, slot: Slot, width: int) -> tuple[Tensor, Tensor] | None:
    """V and w that the official script projects a tensor with, or None."""
    site = slot.borrows if slot.site is not None and slot.site.extended else slot.site
    if site is None:
        return None
    found = load_file(run.official / "projectors.safetensors")
    directions = found[f"layer_{slot.layer}_{site.name}.V_r"].float()
    sigma = found[f"layer_{slot.layer}_{site.name}.sigma"].float()
    return (directions, protection(sigma, TAU)) if directions.shape[0] == width else None


def test_with_the_official_subtraction_the_formulas_give_each_official_matrix(
    run: Reference,
) -> None:
    base, donor = (load_tensors(run.folder / side) for side in ("base", "donor"))
    official = edits(run.official / "merged_a0.5_tau0.03", run.folder / "base")
    scores = json.loads((run.official / "scores.json").read_text())["per_layer_S_reason"]
    checkpoint = Checkpoint.open(run.folder / "base")
    checked = 0
    for name, weight in base.items():
        slot = checkpoint.slots[checkpoint.stored_parts(checkpoint.entries[name])[0][0]]
        if slot.site is None or slot.layer is None:
            continue
        delta = (donor[name] - weight).float()  # in bfloat16
        step = 0.5 * scores[str(slot.layer)][slot.component]
        step = step * keep_above(delta, median_magnitude(delta))
        basis = official_basis(run, slot, weight.shape[-1])
        edit = project(step, *basis) if basis else step
        realised = (weight.float() + edit).to(torch.bfloat16).float() - weight.float()
        assert relative(realised, official[name]) < 0.03, name
        checked += 1
    assert checked >= 6 * 7


def heldout_items(reference: Path, recipe: Path, kind: str) -> list[Item]:
    """The first held-out rows with their own completions."""
    tokenizer = load_tokenizer(reference / "base")
    rows = load_rows(load_recipe(recipe), str(reference / f"heldout_{kind}.jsonl")).rows[:HELDOUT]
    items = []
    for row in rows:
        text = render(tokenizer, row, prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        target = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*prompt, *target, tokenizer.eos_token_id])
        items.append(Item(ids, len(prompt), 1 / len(rows)))
    return items


def mean_loss(folder: Path, items: list[Item]) -> float:
    checkpoint = Checkpoint.open(folder)
    stream = LayerStream(checkpoint, device=torch.device("cpu"), compute=torch.float32)
    losses, _ = item_losses(stream, items, lambda step: None)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["reasoning", "agent"])
def test_the_held_out_loss_is_that_of_the_official_merge(run: Reference, kind: str) -> None:
    items = heldout_items(run.folder, run.output.parent / "recipe.yaml", kind)
    assert len(items) == HELDOUT
    ours = mean_loss(run.output, items)
    official = mean_loss(run.official / "merged_a0.5_tau0.03", items)
    assert ours == pytest.approx(official, rel=0.03, abs=0.005)


def test_the_merge_reasons_better_than_the_base_and_calls_tools_better_than_the_donor(
    run: Reference,
) -> None:
    recipe = run.output.parent / "recipe.yaml"
    reasoning = heldout_items(run.folder, recipe, "reasoning")
    agent = heldout_items(run.folder, recipe, "agent")
    base, donor = run.folder / "base", run.folder / "donor"
    assert mean_loss(run.output, reasoning) < mean_loss(base, reasoning)
    assert mean_loss(run.output, agent) < mean_loss(donor, agent)
