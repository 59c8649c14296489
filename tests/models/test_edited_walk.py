"""Other weights laid over a walk, and the walk's own model whole: no second copy of anything."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, MORE, TinyPair, load_tensors, save_tensors
from torch import Tensor

from crane_tasks.models.decoding.greedy import decode, load_resident
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.losses import Item, item_losses, losses_of_models
from crane_tasks.models.walk.overlay import Overlay
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.models.walk.stream import LayerStream

CPU = torch.device("cpu")
PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [200], [40, 41, 42], [9, 9, 300, 7, 9]]
ITEMS = [Item(torch.arange(3, 3 + n) % 300, prompt, 0.5) for n, prompt in ((9, 4), (21, 5))]
Pairs = Callable[[str], TinyPair]
Pieces = Iterable[tuple[int, int, Tensor]]


class Stopped(Exception):
    """Stands for whatever ends an edit half way."""


def quiet(step: WalkStep) -> None:
    """Shows no progress."""


def opened(folder: Path, resident: bool | None = True, compute: str = "float32") -> LayerStream:
    return LayerStream(
        Checkpoint.open(folder), device=CPU, compute=getattr(torch, compute), resident=resident
    )


def towards(donor: Path) -> Overlay:
    """The edit whose result is the donor."""
    checkpoint = Checkpoint.open(donor)

    def edit(slot: str) -> Pieces:
        for expert, piece in enumerate(checkpoint.pieces[slot]):
            half = piece.shape[0] // 2
            yield expert, 0, piece.read(0, half)
            yield expert, half, piece.read(half, piece.shape[0])

    return Overlay(edit)


def in_memory(stream: LayerStream) -> dict[str, Tensor]:
    """Every parameter and buffer of a walk, copied."""
    modules = {"": stream._model, **{f"layer {i}": m for i, m in enumerate(stream._layers)}}
    return {
        f"{place} {name}": tensor.detach().clone()
        for place, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[n].is_meta == theirs[n].is_meta
        and (ours[n].is_meta or torch.equal(ours[n].view(-1), theirs[n].view(-1)))
        for n in ours
    )


def answers(stream: LayerStream) -> list[list[int]]:
    with stream.whole() as model:
        return decode(model, PROMPTS, max_new_tokens=12, pad=0, eos=2)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_the_walks_own_model_answers_as_the_one_that_transformers_loads(
    architecture: str, pairs: Pairs
) -> None:
    folder = pairs(architecture).base
    stream = opened(folder)
    before = item_losses(stream, ITEMS, quiet)[0]
    model = load_resident(folder, CPU, torch.float32)
    wanted = decode(model, PROMPTS, max_new_tokens=12, pad=0, eos=2)
    assert answers(stream) == wanted
    with stream.whole() as ours, torch.no_grad():
        ids = torch.tensor([PROMPTS[0]])
        assert torch.equal(ours(ids).logits, model(ids).logits)
        names = {n for n, _ in model.named_parameters()}
        assert {n for n, _ in ours.named_parameters()} == names
    assert item_losses(stream, ITEMS, quiet)[0] == before


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_an_edited_walk_measures_what_the_written_checkpoint_does(
    compute: str, tiny_pair: TinyPair
) -> None:
    wanted, states = item_losses(opened(tiny_pair.donor, compute=compute), ITEMS, quiet)
    said = answers(opened(tiny_pair.donor, compute=compute))
    own = item_losses(opened(tiny_pair.base, compute=compute), ITEMS, quiet)[0]
    assert own != wanted
    for resident in (True, False):
        stream = opened(tiny_pair.base, resident, compute)
        for _ in range(2):  # once with nothing in memory, once with what stayed
            with stream.edited(towards(tiny_pair.donor)):
                found, edited = item_losses(stream, ITEMS, quiet)
                assert found == wanted
                assert all(torch.equal(a, b) for a, b in zip(edited, states, strict=True))
                if resident:
                    assert answers(stream) == said
            assert item_losses(stream, ITEMS, quiet)[0] == own


@pytest.mark.parametrize("form", ["loaded before", "loaded in between", "streamed"])
def test_every_bit_is_back_after_an_edit_and_after_a_failure(
    form: str, tiny_pair: TinyPair
) -> None:
    stream = opened(tiny_pair.base, form != "streamed")
    if form == "loaded before":
        answers(stream)
    fresh = opened(tiny_pair.base, form != "streamed")
    if form != "streamed":
        answers(fresh)
    edit = towards(tiny_pair.donor)
    with stream.edited(edit):
        item_losses(stream, ITEMS, quiet)
        if form != "streamed":
            answers(stream)
        assert not same(in_memory(stream), in_memory(fresh))
    assert same(in_memory(stream), in_memory(fresh))

    calls: list[str] = []

    def failing(slot: str) -> Pieces:
        calls.append(slot)
        if len(calls) == 8:
            raise Stopped
        return edit.pieces(slot)

    with pytest.raises(Stopped), stream.edited(Overlay(failing)):
        item_losses(stream, ITEMS, quiet)
    assert same(in_memory(stream), in_memory(fresh))
    with pytest.raises(Stopped), stream.edited(edit):
        item_losses(stream, ITEMS, quiet)
        raise Stopped
    assert same(in_memory(stream), in_memory(fresh))


def test_what_is_only_carried_stays_the_checkpoints(pairs: Pairs) -> None:
    """GLM's correction of the router is a buffer that no edit touches."""
    pair = pairs("glm4_moe")
    stream = opened(pair.base)
    fresh = in_memory(stream)
    with stream.edited(towards(pair.donor)):
        item_losses(stream, ITEMS, quiet)
        held = in_memory(stream)
    buffers = [n for n in fresh if n.endswith("e_score_correction_bias")]
    assert buffers and all(torch.equal(held[n], fresh[n]) for n in buffers)


def test_a_tied_head_and_its_embedding_are_one_tensor(pairs: Pairs, tmp_path: Path) -> None:
    """Also where the checkpoint stores the head beside the embedding."""
    pair = pairs("qwen3").copy(tmp_path / "pair")
    tensors = load_tensors(pair.base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_tensors(pair.base, tensors)
    stream = opened(pair.base)
    wanted = item_losses(opened(pair.donor), ITEMS, quiet)[0]
    with stream.edited(towards(pair.donor)):
        assert item_losses(stream, ITEMS, quiet)[0] == wanted
        with stream.whole() as model:
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            assert head.weight.data_ptr() == embedding.weight.data_ptr()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_models_that_share_a_walk_lose_what_they_do_alone(
    architecture: str, resident: bool, pairs: Pairs
) -> None:
    """The base itself beside the donor, and afterwards the walk is the base's."""
    pair = pairs(architecture)
    stream = opened(pair.base, resident)
    own, edits = item_losses(stream, ITEMS, quiet), [towards(pair.base), towards(pair.donor)]
    before = in_memory(stream)

    def together(slot: str) -> Iterable[tuple[int, int, list[Tensor]]]:
        for (expert, first, ours), (_, _, theirs) in zip(
            *(edit.pieces(slot) for edit in edits), strict=True
        ):
            yield expert, first, [ours, theirs]

    found = losses_of_models(stream, [ITEMS], edits, together, quiet)
    assert found[0][0][0] == own[0]
    assert found[1][0][0] == item_losses(opened(pair.donor), ITEMS, quiet)[0] != own[0]
    assert same(in_memory(stream), before)
    with stream.edited(edits[1], layers=False), pytest.raises(AssertionError, match="layers"):
        item_losses(stream, ITEMS, quiet)
