"""The walk with one layer in memory gives what the whole model gives, killed or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, ONE_BY_ONE, TinyPair, tiny_config, write_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.losses import LOGIT_BYTES, Item, item_losses, losses_of_sets
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import LayerStream

CPU = torch.device("cpu")
Found = dict[int | None, dict[str, Gradients]]
# (length, prompt) of each item: one target only, one prompt token only, the longest last.
LENGTHS = {"reasoning": [(9, 8), (17, 1), (70, 22)], "agent": [(5, 2), (23, 11)]}


class Killed(Exception):
    """Stands for whatever ends a walk half way."""


def make_items(vocabulary: int = 320) -> dict[str, list[Item]]:
    """Random items of several lengths for both sets."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: [
            Item(torch.randint(vocabulary, (n,), generator=generator), prompt, 1 / len(lengths))
            for n, prompt in lengths
        ]
        for name, lengths in LENGTHS.items()
    }


def make_stream(folder: Path, compute: torch.dtype = torch.float32) -> LayerStream:
    return LayerStream(Checkpoint.open(folder), device=CPU, compute=compute)


def quiet(step: WalkStep) -> None:
    """Shows no progress."""


def walk(
    folder: Path,
    scratch: Path,
    compute: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
) -> tuple[Found, GradientWalk]:
    """An undisturbed walk."""
    found: Found = {}
    states = States(scratch)
    walked = GradientWalk(
        make_stream(folder, compute), make_items(), states, batch_tokens=batch_tokens
    )
    walked.run(found.__setitem__, set(), quiet)
    return found, walked


def resident(folder: Path, compute: torch.dtype) -> Any:
    """The whole model, as transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()


def whole_model_loss(model: Any, item: Item) -> Tensor:
    """The item's mean token NLL over its targets."""
    logits = model(input_ids=item.ids[None], use_cache=False).logits[0]
    return cross_entropy(logits[item.prompt - 1 : -1], item.ids[item.prompt :])


def whole_model_gradients(
    folder: Path, items: list[Item], compute: torch.dtype
) -> tuple[dict[str, Tensor], list[float]]:
    """Autograd through the whole model: gradient of the mean of the items' losses."""
    model = resident(folder, compute)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    losses = [whole_model_loss(model, item) for item in items]
    torch.stack(losses).mean().backward()
    return (
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        [float(loss.detach()) for loss in losses],
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative error of a tensor; that of a zero tensor is 0 only if both are."""
    error, size = float((found - wanted).norm()), float(wanted.norm())
    return error / size if size else error


def assert_same_gradients(found: Found, wanted: dict[str, Tensor], name: str, rel: float) -> None:
    """Every parameter in and behind the layers has the oracle's gradient."""
    seen = set()
    for layer, by_set in found.items():
        prefix = "" if layer is None else f"model.layers.{layer}."
        for parameter, gradient in by_set[name].items():
            full = prefix + parameter
            error = relative(gradient, wanted[full])
            assert error < rel, f"{name}: {full} is off by {error:.1e}"
            seen.add(full)
    plain = {"model.embed_tokens.weight", "lm_head.weight"}
    assert seen == wanted.keys() - plain
    assert "model.norm.weight" in seen


@pytest.mark.parametrize(
    ("compute", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_streamed_gradients_are_those_of_the_whole_model(
    tiny_pair: TinyPair, tmp_path: Path, compute: torch.dtype, rel: float
) -> None:
    # One by one, as the oracle runs them: the gated delta rule's torch code works in float32
    # whatever the dtype, so that in a batch its rounding would show at 1e-9.
    found, walked = walk(tiny_pair.base, tmp_path, compute, ONE_BY_ONE)
    assert list(found) == [None, 1, 0]
    for name, items in make_items().items():
        wanted, losses = whole_model_gradients(tiny_pair.base, items, compute)
        assert walked.losses[name] == pytest.approx(losses, rel=rel)
        assert_same_gradients(found, wanted, name, rel)


def test_items_in_padded_batches_have_the_gradients_of_items_one_by_one(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    together, walked = walk(tiny_pair.base, tmp_path / "together")
    apart, alone = walk(tiny_pair.base, tmp_path / "apart", batch_tokens=ONE_BY_ONE)
    for name in make_items():
        assert walked.losses[name] == pytest.approx(alone.losses[name], rel=1e-6)
        for layer, by_set in together.items():
            for parameter, gradient in by_set[name].items():
                assert relative(gradient, apart[layer][name][parameter]) < 1e-5


def test_a_dense_layer_of_a_sparse_model_is_walked_like_the_others(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", mlp_only_layers=[0])
    write_checkpoint(tmp_path / "mixed", config, seed=4, dtype=torch.bfloat16)
    found, _ = walk(tmp_path / "mixed", tmp_path / "scratch")
    for name, items in make_items().items():
        wanted, _ = whole_model_gradients(tmp_path / "mixed", items, torch.float32)
        assert_same_gradients(found, wanted, name, 1e-5)


def test_an_expert_that_no_token_reached_has_gradient_zero(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    # The loss depends on the first token's state alone, which two experts of four handle.
    items = {"reasoning": [Item(torch.tensor([7, 9]), 1, 1.0)]}
    found: Found = {}
    walked = GradientWalk(make_stream(moe_pair.base), items, States(tmp_path))
    walked.run(found.__setitem__, set(), quiet)
    wanted, _ = whole_model_gradients(moe_pair.base, items["reasoning"], torch.float32)
    assert_same_gradients(found, wanted, "reasoning", 1e-5)
    stack = found[0]["reasoning"]["mlp.experts.down_proj"]
    assert sorted(bool(expert.any()) for expert in stack) == [False, False, True, True]


def test_logits_made_in_blocks_give_the_same_gradients(
    moe_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, walked = walk(moe_pair.base, tmp_path / "whole")
    # Five positions of 320 float32 logits at a time.
    monkeypatch.setitem(LOGIT_BYTES, "cpu", 5 * 320 * 4)
    parts, cut = walk(moe_pair.base, tmp_path / "parts")
    for name in LENGTHS:
        assert cut.losses[name] == pytest.approx(walked.losses[name], rel=1e-6)
        for layer, by_set in parts.items():
            for parameter, gradient in by_set[name].items():
                assert relative(gradient, whole[layer][name][parameter]) < 1e-5


def test_bfloat16_gradients_are_summed_in_float32(tiny_pair: TinyPair, tmp_path: Path) -> None:
    exact, _ = walk(tiny_pair.base, tmp_path / "exact")
    found, _ = walk(tiny_pair.base, tmp_path / "rough", torch.bfloat16)
    for layer, by_set in found.items():
        for name, gradients in by_set.items():
            assert all(g.dtype == torch.float32 for g in gradients.values())
            rough = torch.cat([g.flatten() for g in gradients.values()])
            wanted = torch.cat([exact[layer][name][p].flatten() for p in gradients])
            assert relative(rough, wanted) < 0.3


def test_the_weights_of_the_items_and_not_their_lengths_decide(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    """The objective is the mean of the items' means: repeating an item changes nothing."""
    item = make_items()["reasoning"][2]
    once = {"reasoning": [Item(item.ids, item.prompt, 1.0)]}
    twice = {"reasoning": [Item(item.ids, item.prompt, 0.5)] * 2}
    found: list[Found] = []
    for number, items in enumerate((once, twice)):
        found.append({})
        states = States(tmp_path / str(number))
        walked = GradientWalk(make_stream(moe_pair.base), items, states)
        walked.run(found[-1].__setitem__, set(), quiet)
    for layer, by_set in found[0].items():
        for parameter, gradient in by_set["reasoning"].items():
            assert relative(found[1][layer]["reasoning"][parameter], gradient) < 1e-6


def test_no_streamed_layer_keeps_its_weights_after_its_turn(tiny_pair: TinyPair) -> None:
    stream = LayerStream(
        Checkpoint.open(tiny_pair.base), device=CPU, compute=torch.float32, resident=False
    )
    for index in range(stream.num_layers):
        with stream.layer(index, grad=True) as module:
            assert not any(p.is_meta for p in module.parameters())
        assert all(p.is_meta for p in module.parameters())


# Killed and resumed


def assert_identical(found: Found, wanted: Found) -> None:
    """Bit by bit."""
    assert found.keys() == wanted.keys()
    for layer, by_set in wanted.items():
        for name, gradients in by_set.items():
            assert found[layer][name].keys() == gradients.keys()
            for parameter, gradient in gradients.items():
                assert torch.equal(found[layer][name][parameter], gradient), parameter


def test_layers_that_stay_and_layers_that_go_give_the_same_bits(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    found: list[Found] = []
    for resident in (True, False):
        stream = LayerStream(
            Checkpoint.open(tiny_pair.base), device=CPU, compute=torch.float32, resident=resident
        )
        bits: Found = {}
        states = States(tmp_path / str(resident))
        GradientWalk(stream, make_items(), states).run(bits.__setitem__, set(), quiet)
        found.append(bits)
    assert_identical(found[0], found[1])


def killed_walk(
    folder: Path, scratch: Path, found: Found, *, at_step: int, committed: bool = False
) -> None:
    """A walk that dies at its n-th event, a step forward or a visit, counted from 1.

    A visit dies before its layer is committed to `found`, or right after.
    """
    events = 0

    def happen() -> None:
        nonlocal events
        events += 1
        if events == at_step:
            raise Killed

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        if committed:
            found[layer] = gradients
        happen()
        found[layer] = gradients

    def progress(step: WalkStep) -> None:
        if step.between and step.direction == "forward":
            happen()

    stream = make_stream(folder)
    GradientWalk(stream, make_items(), States(scratch)).run(visit, set(found), progress)


@pytest.mark.parametrize("committed", [False, True], ids=["before commit", "after commit"])
@pytest.mark.parametrize("at_step", [1, 2, 3, 4, 5])
def test_a_walk_killed_anywhere_resumes_to_bit_identical_gradients(
    moe_pair: TinyPair, tmp_path: Path, at_step: int, committed: bool
) -> None:
    wanted, _ = walk(moe_pair.base, tmp_path / "undisturbed")
    found: Found = {}
    scratch = tmp_path / "killed"
    with pytest.raises(Killed):
        killed_walk(moe_pair.base, scratch, found, at_step=at_step, committed=committed)
    assert len(found) == max(0, at_step - 3 + committed)
    kept = {layer: id(by_set) for layer, by_set in found.items()}
    killed_walk(moe_pair.base, scratch, found, at_step=100)
    assert_identical(found, wanted)
    # What was committed was not computed again.
    assert all(id(found[layer]) == known for layer, known in kept.items())


@pytest.mark.parametrize("at_step", [3, 4, 5])
def test_a_walk_killed_on_its_way_back_takes_no_step_forward_again(
    moe_pair: TinyPair, tmp_path: Path, at_step: int
) -> None:
    found: Found = {}
    with pytest.raises(Killed):
        killed_walk(moe_pair.base, tmp_path, found, at_step=at_step)
    steps: list[WalkStep] = []
    walked = GradientWalk(make_stream(moe_pair.base), make_items(), States(tmp_path))
    walked.run(found.__setitem__, set(found), steps.append)
    assert {step.direction for step in steps} == {"backward"}
    assert steps[-1].done == steps[-1].total


def test_a_walk_resumed_with_other_batches_walks_anew_and_visits_what_is_left(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    # As after a kill on a GPU, whose batches are larger, and a rerun on a CPU.
    wanted, _ = walk(moe_pair.base, tmp_path / "undisturbed", batch_tokens=ONE_BY_ONE)
    found: Found = {}
    with pytest.raises(Killed):
        killed_walk(moe_pair.base, tmp_path / "killed", found, at_step=4)
    known = set(found)
    assert known and known != set(wanted)
    states = States(tmp_path / "killed")
    walked = GradientWalk(make_stream(moe_pair.base), make_items(), states, batch_tokens=ONE_BY_ONE)
    walked.run(found.__setitem__, known, quiet)
    rest = {layer: by_set for layer, by_set in found.items() if layer not in known}
    assert_identical(rest, {layer: wanted[layer] for layer in rest})
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_walk_that_dies_at_every_step_still_ends_at_the_same_gradients(
    pairs: Callable[[str], TinyPair], architecture: str, tmp_path: Path
) -> None:
    folder = pairs(architecture).base
    wanted, _ = walk(folder, tmp_path / "undisturbed")
    found: Found = {}
    deaths = 0
    # Every attempt dies at its second event, so that each gets one further.
    while len(found) < len(wanted):
        try:
            killed_walk(folder, tmp_path / "killed", found, at_step=2)
        except Killed:
            deaths += 1
    assert deaths >= 3
    assert_identical(found, wanted)


def test_a_finished_walk_leaves_no_states(moe_pair: TinyPair, tmp_path: Path) -> None:
    walk(moe_pair.base, tmp_path)
    assert not list(tmp_path.rglob("*.*"))


# Losses alone


def test_item_losses_and_last_states_are_those_of_the_whole_model(tiny_pair: TinyPair) -> None:
    items = [item for chosen in make_items().values() for item in chosen]
    losses, states = item_losses(make_stream(tiny_pair.base), items, quiet)
    model = resident(tiny_pair.base, torch.float32)
    seen: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(args[0][0]))
    with torch.no_grad():
        wanted = [float(whole_model_loss(model, item)) for item in items]
    assert losses == pytest.approx(wanted, rel=1e-6)
    for state, resident_state in zip(states, seen, strict=True):
        assert relative(state, resident_state) < 1e-6


def test_losses_of_the_walk_are_the_losses_of_the_forward_pass_alone(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    _, walked = walk(tiny_pair.base, tmp_path)
    for name, items in make_items().items():
        losses, _ = item_losses(make_stream(tiny_pair.base), items, quiet)
        assert walked.losses[name] == losses


def test_sets_in_one_walk_have_the_bits_of_each_alone(tiny_pair: TinyPair) -> None:
    sets = list(make_items().values())
    steps: list[WalkStep] = []
    together = losses_of_sets(make_stream(tiny_pair.base), sets, steps.append)
    for items, (losses, states) in zip(sets, together, strict=True):
        alone, own = item_losses(make_stream(tiny_pair.base), items, quiet)
        assert losses == alone
        assert all(torch.equal(a, b) for a, b in zip(states, own, strict=True))
    # Once through the layers, whatever the number of sets.
    assert len(sets) > 1 and sum(step.between for step in steps) == 2


# Models that cannot be walked


def test_a_model_that_passes_objects_from_layer_to_layer_is_refused(tiny_pair: TinyPair) -> None:
    stream = make_stream(tiny_pair.base)
    model: Any = stream._model
    plain_forward = model.model.layers[0].forward

    def sharing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # As gemma3n's layers are given the dictionary of shared key-value states.
        out: Tensor = plain_forward(hidden_states, *args, shared_states={}, **kwargs)
        return out

    model.model.layers[0].forward = sharing
    with pytest.raises(CheckpointError, match=r"layer 0 is given shared_states.*not supported"):
        stream.enter(torch.tensor([[3, 4, 5]]))
