"""Gradients that were kept serve again: another donor, another baseline, no pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors
from tiny_merge import merged, weight_bytes

from crane_tasks.scores.gradients import read_gradient
from flows.merge import Merged

Events = list[tuple[str, str]]


def watched(pair: TinyPair, store: Path, output: Path, *assignments: str) -> tuple[Merged, Events]:
    """A merge, and every (stage, text) that its progress said."""
    events: Events = []

    def progress(stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        assert 0 <= done <= total
        events.append((stage, f"{bar}:{what}"))

    return merged(pair, store, output, *assignments, progress=progress), events


def passes(events: Events) -> set[str]:
    """The directions in which the score stage walked through the model."""
    said = {what.split()[0].lstrip(":") for stage, what in events if stage == "scores"}
    return said & {"forward", "backward"}


@pytest.fixture
def another_donor(moe_pair: TinyPair, tmp_path: Path) -> TinyPair:
    """The same base and data, another donor."""
    pair = moe_pair.copy(tmp_path / "another")
    tensors = load_tensors(pair.donor)
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.02
        tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    for file in pair.donor.glob("*.safetensors"):
        file.unlink()
    save_tensors(pair.donor, tensors)
    return pair


@pytest.mark.slow
def test_another_donor_with_targets_from_the_data_needs_no_pass(
    moe_pair: TinyPair, another_donor: TinyPair, tmp_path: Path
) -> None:
    _, events = watched(moe_pair, tmp_path / "store", tmp_path / "first")
    assert passes(events) == {"forward", "backward"}
    again, events = watched(another_donor, tmp_path / "store", tmp_path / "second")
    assert passes(events) == set()
    fresh, events = watched(another_donor, tmp_path / "fresh", tmp_path / "third")
    assert passes(events) == {"forward", "backward"}
    assert again.scores == fresh.scores
    assert weight_bytes(tmp_path / "second") == weight_bytes(tmp_path / "third")


def test_scores_do_not_depend_on_whether_gradients_are_kept(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    kept, _ = watched(moe_pair, tmp_path / "kept", tmp_path / "one")
    gone, _ = watched(moe_pair, tmp_path / "gone", tmp_path / "two", "gate.store_gradients=false")
    assert kept.scores == gone.scores
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")
    assert not (tmp_path / "gone" / "gradients").exists()
    # Kept gradients tell what the edit should do to the losses; without them nobody knows.
    assert all(isinstance(v, float) for v in kept.evaluation["gate"]["predicted"].values())
    assert set(gone.evaluation["gate"]["predicted"].values()) == {None}


def test_what_is_kept_are_both_sets_gradients_of_every_gated_tensor(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    result, _ = watched(tiny_pair, tmp_path / "store", tmp_path / "out")
    kept = result.ctx.store.open(result.keys.refs["gradients"])
    base = result.ctx.pair().base
    for slot in base.slots.values():
        if slot.component in ("embedding", "lm_head"):
            continue
        for name in ("reasoning", "agent"):
            gradient = read_gradient(kept, name, slot, None)
            shape = base.pieces[slot.name][0].shape
            assert tuple(gradient.shape) == ((4, *shape) if slot.stacked else shape)
            assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    assert not result.ctx.store.verify(kept.path)


def test_progress_names_layer_direction_and_tokens_a_second(
    pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    _, events = watched(pairs("qwen3"), tmp_path / "store", tmp_path / "out")
    said = [what for stage, what in events if stage == "scores"]
    for direction in ("forward", "backward"):
        for layer in (1, 2):
            texts = [w for w in said if w.startswith(f":{direction} {layer}/2, ")]
            assert texts and all(w.endswith(" tokens/s") for w in texts)
    assert any(what.startswith("items:") for what in said)
