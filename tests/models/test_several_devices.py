"""A walk that is spread over devices gives what a walk on one gives, within rounding."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TinyPair
from torch import Tensor

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.activations import Sums, walk_activations
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.losses import Item, losses_of_models, losses_of_sets
from crane_tasks.models.walk.overlay import Overlay
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import TOKENS, LayerStream

# Two names for one device: what is spread is the same, and every copy is its own.
TWO = (torch.device("cpu"), torch.device("cpu"))
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def quiet(step: WalkStep) -> None:
    """Shows no progress."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several for each device."""
    monkeypatch.setitem(TOKENS, "cpu", 24)


def stream_on(folder: Path, devices: tuple[torch.device, ...]) -> LayerStream:
    first, *others = devices
    return LayerStream(
        Checkpoint.open(folder), device=first, compute=torch.float32, resident=False, others=others
    )


def items(count: int) -> list[Item]:
    numbers = torch.Generator().manual_seed(3)
    return [
        Item(torch.randint(300, (n,), generator=numbers), 4, 1 / count) for n in range(9, 9 + count)
    ]


def test_gradients_of_all_devices_are_added(tiny_pair: TinyPair, tmp_path: Path) -> None:
    def gradients(name: str, devices: tuple[torch.device, ...]) -> dict[object, Gradients]:
        found: dict[object, Gradients] = {}
        sets = {"reasoning": items(6), "agent": items(1)}
        walk = GradientWalk(stream_on(tiny_pair.base, devices), sets, States(tmp_path / name))

        def visit(layer: int | None, by_set: dict[str, Gradients]) -> None:
            found.update({(layer, of): one for of, one in by_set.items()})

        walk.run(visit, set(), quiet)
        return found

    one, two = gradients("one", TWO[:1]), gradients("two", TWO)
    again = gradients("again", TWO)
    assert one.keys() == two.keys()
    for key, by_name in one.items():
        for name, gradient in by_name.items():
            torch.testing.assert_close(two[key][name], gradient, **CLOSE)
            assert torch.equal(two[key][name], again[key][name]), "the same from run to run"


def test_activations_of_all_devices_are_added(tiny_pair: TinyPair, tmp_path: Path) -> None:
    sites = Checkpoint.open(tiny_pair.base).layout.sites

    def sums(name: str, devices: tuple[torch.device, ...]) -> dict[int, Sums]:
        found: dict[int, Sums] = {}
        walk_activations(
            stream_on(tiny_pair.base, devices),
            [(item.ids, torch.ones_like(item.ids, dtype=torch.bool)) for item in items(6)],
            sites,
            reduce=lambda rows: rows.double().T @ rows.double(),
            states=States(tmp_path / name),
            done=set(),
            visit=found.__setitem__,
            on_step=quiet,
        )
        return found

    one, two = sums("one", TWO[:1]), sums("two", TWO)
    for layer, by_site in one.items():
        for site, by_expert in by_site.items():
            assert two[layer][site].keys() == by_expert.keys()
            for expert, wanted in by_expert.items():
                assert two[layer][site][expert].rows == wanted.rows
                torch.testing.assert_close(two[layer][site][expert].total, wanted.total, **CLOSE)


def test_losses_of_items_and_of_models_are_those_of_one_device(tiny_pair: TinyPair) -> None:
    base = Checkpoint.open(tiny_pair.base)

    def scaled(factor: float, slot: str) -> list[tuple[int, int, Tensor]]:
        pieces = enumerate(base.pieces[slot])
        return [(expert, 0, piece.read(0, piece.shape[0]) * factor) for expert, piece in pieces]

    factors = (0.9, 1.0, 1.1)
    edits = [Overlay(partial(scaled, factor)) for factor in factors]

    def together(slot: str) -> list[tuple[int, int, list[Tensor]]]:
        parts = zip(*(scaled(factor, slot) for factor in factors), strict=True)
        return [(same[0][0], same[0][1], [rows for *_, rows in same]) for same in parts]

    for walk in (losses_of_sets, partial(losses_of_models, edits=edits, together=together)):
        one, two = (
            walk(stream_on(tiny_pair.base, devices), [items(5), items(2)], on_step=quiet)
            for devices in (TWO[:1], TWO)
        )
        torch.testing.assert_close(two, one, **CLOSE)
