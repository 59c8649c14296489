"""On a CUDA device: the walk, the gate's scores and the edits agree with the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tensors, save_tensors
from plain_sums import gain_sums
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.store import Store
from crane_tasks.delta import DELTA, MEDIANS
from crane_tasks.errors import CheckpointError
from crane_tasks.method import keys_of
from crane_tasks.models.decoding.greedy import decode, load_resident
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk import passage
from crane_tasks.models.walk.activations import Sums, walk_activations
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.keeping import HostKeeper, Keeper
from crane_tasks.models.walk.losses import Item, item_losses
from crane_tasks.models.walk.overlay import Overlay
from crane_tasks.models.walk.states import States
from crane_tasks.models.walk.stream import TOKENS, LayerStream
from crane_tasks.numerics.projector import basis_from_gram, gram, project, protection
from crane_tasks.numerics.rounding import round_stochastic
from crane_tasks.numerics.threshold import median_magnitude
from crane_tasks.session import Session, open_context
from crane_tasks.threshold import THRESHOLD, read_thresholds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = "cuda"


def _items(seed: int) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (40, 57, 33)
    return [
        Item(torch.randint(9, 265, (n,), generator=generator), n // 3, 1 / len(lengths))
        for n in lengths
    ]


def _gradients(
    folder: Path,
    device: str,
    compute: torch.dtype,
    scratch: Path,
    *,
    resident: bool | None = None,
    budget: int | None = None,
) -> dict[int | None, dict[str, Gradients]]:
    stream = LayerStream(
        Checkpoint.open(folder), device=torch.device(device), compute=compute, resident=resident
    )
    sets = {"reasoning": _items(1), "agent": _items(2)}
    found: dict[int | None, dict[str, Gradients]] = {}

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        found[layer] = {
            name: {key: grad.cpu() for key, grad in grads.items()}
            for name, grads in gradients.items()
        }

    GradientWalk(stream, sets, States(scratch, budget)).run(visit, (), lambda step: None)
    return found


def _flat(found: dict[int | None, dict[str, Gradients]], name: str) -> Tensor:
    parts = [g[name][key].flatten() for g in found.values() for key in sorted(g[name])]
    return torch.cat(parts).double()


def test_float32_gradients_on_the_device_are_those_of_the_cpu(
    tiny_pair: Any, tmp_path: Path
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    here = _gradients(tiny_pair.base, "cpu", torch.float32, tmp_path / "cpu")
    there = _gradients(tiny_pair.base, CUDA, torch.float32, tmp_path / "gpu")
    for name in ("reasoning", "agent"):
        ours, theirs = _flat(there, name), _flat(here, name)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("architecture", ["gemma3_text", "glm4_moe"])
def test_the_layers_buffers_are_on_the_device_too(
    pairs: Callable[[str], Any], architecture: str, tmp_path: Path
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = pairs(architecture).base
    here = _gradients(folder, "cpu", torch.float32, tmp_path / "cpu")
    there = _gradients(folder, CUDA, torch.float32, tmp_path / "gpu")
    for name in ("reasoning", "agent"):
        ours, theirs = _flat(there, name), _flat(here, name)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("budget", [None, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("in_use", [6, 2**50], ids=["offloaded", "in host memory"])
def test_weights_and_states_that_come_and_go_give_the_bits_of_those_that_stay(
    tiny_pair: Any,
    tmp_path: Path,
    budget: int | None,
    in_use: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("crane_tasks.models.walk.keeping.IN_USE", in_use)
    torch.use_deterministic_algorithms(True)
    stay = _gradients(tiny_pair.base, CUDA, torch.bfloat16, tmp_path / "stay", resident=True)
    go = _gradients(
        tiny_pair.base, CUDA, torch.bfloat16, tmp_path / "go", resident=False, budget=budget
    )
    torch.use_deterministic_algorithms(False)
    for layer, by_set in stay.items():
        for name, gradients in by_set.items():
            for key, gradient in gradients.items():
                assert torch.equal(gradient, go[layer][name][key]), (layer, name, key)


def test_bfloat16_compute_sums_gradients_in_float32_and_scores_within_a_few_percent(
    tiny_pair: Any, tmp_path: Path
) -> None:
    here = _gradients(tiny_pair.base, "cpu", torch.float32, tmp_path / "cpu")
    there = _gradients(tiny_pair.base, CUDA, torch.bfloat16, tmp_path / "gpu")
    assert all(
        g.dtype == torch.float32 for s in there.values() for gs in s.values() for g in gs.values()
    )
    delta = torch.randn(_flat(here, "agent").shape, generator=torch.Generator().manual_seed(3))
    base = torch.ones_like(delta)
    gains = [
        gain_sums(base, delta, _flat(f, "reasoning").float(), _flat(f, "agent").float()).p
        for f in (there, here)
    ]
    assert gains[0] == pytest.approx(gains[1], rel=0.05)


def test_the_bases_of_the_device_protect_what_those_of_the_cpu_do(
    pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = pairs("qwen3_moe").base
    checkpoint = Checkpoint.open(folder)
    items = [(i.ids, torch.ones(i.ids.numel(), dtype=torch.bool)) for i in _items(4)]

    def sums(device: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def visit(layer: int, of_layer: Sums) -> None:
            for site, experts in of_layer.items():
                for expert, total in experts.items():
                    basis = basis_from_gram(total.total, total.rows, rank=16, cutoff=1e-5)
                    weight = protection(basis.sigma, 0.03).float()
                    v = basis.directions
                    found[f"{layer}.{site}.{expert}"] = ((v * weight) @ v.T).cpu()

        walk_activations(
            LayerStream(checkpoint, device=torch.device(device), compute=torch.float32),
            items,
            checkpoint.layout.sites,
            reduce=gram,
            states=States(tmp_path / device),
            done=(),
            visit=visit,
            on_step=lambda step: None,
        )
        return found

    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = sums("cpu"), sums(CUDA)
    assert here.keys() == there.keys()
    for name, ours in here.items():
        assert float((ours - there[name]).norm() / ours.norm()) < 1e-2


def test_rounding_thresholds_and_projection_do_not_depend_on_the_device() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(257, 64, generator=generator)
    assert torch.equal(
        round_stochastic(values.to(CUDA), seed=7).cpu(), round_stochastic(values, seed=7)
    )
    assert float(median_magnitude(values.to(CUDA))) == float(median_magnitude(values))
    directions = torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q
    weight = torch.rand(8, generator=generator)
    torch.backends.cuda.matmul.allow_tf32 = False
    there = project(values.to(CUDA), directions.to(CUDA), weight.to(CUDA)).cpu()
    torch.testing.assert_close(there, project(values, directions, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])  # with and without a tied head
@pytest.mark.parametrize("resident", [True, False])
def test_an_edit_is_laid_over_on_the_device_and_taken_off_again(
    architecture: str, resident: bool, pairs: Callable[[str], Any]
) -> None:
    pair = pairs(architecture)
    donor = Checkpoint.open(pair.donor)

    def edit(slot: str) -> Iterator[tuple[int, int, Tensor]]:
        for expert, piece in enumerate(donor.pieces[slot]):
            yield expert, 0, piece.read()

    def opened(folder: Path) -> LayerStream:
        return LayerStream(
            Checkpoint.open(folder), device=torch.device(CUDA), compute=torch.bfloat16,
            resident=resident,
        )  # fmt: skip

    def losses(stream: LayerStream) -> list[float]:
        return item_losses(stream, _items(1), lambda step: None)[0]

    def answers(stream: LayerStream) -> list[list[int]]:
        with stream.whole() as model:
            return decode(model, [[9, 10, 11], [200]], max_new_tokens=8, pad=0, eos=2)

    stream, other = opened(pair.base), opened(pair.donor)
    own, wanted = losses(stream), losses(other)
    assert own != wanted
    for _ in range(2):
        with stream.edited(Overlay(edit)):
            assert losses(stream) == wanted
            if resident:
                assert answers(stream) == answers(other)
        assert losses(stream) == own
    if resident:
        model = load_resident(pair.base, torch.device(CUDA), torch.bfloat16)
        said = decode(model, [[9, 10, 11], [200]], max_new_tokens=8, pad=0, eos=2)
        assert answers(stream) == said


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_next"])
def test_a_delta_made_on_the_device_is_that_of_the_cpu(
    architecture: str, pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    """Stored differences and medians to the bit, sums but for rounding."""
    pair = pairs(architecture)

    def made(device: str) -> tuple[Artifact, Artifact]:
        session = Session(pair.recipe(f"run.device={device}"), Store(tmp_path / device))
        session.store.prepare()
        ctx = open_context(session)
        keys = keys_of(ctx)
        DELTA.build(ctx, keys)
        THRESHOLD.build(ctx, keys)
        return session.store.open(keys[DELTA]), session.store.open(keys[THRESHOLD])

    (delta, threshold), (other, others) = made("cpu"), made(CUDA)
    assert delta.path.name == other.path.name
    for unit in delta.units():
        assert delta.arrays(unit) == other.arrays(unit)
        for name in delta.arrays(unit):
            ours, theirs = delta.read(unit, name), other.read(unit, name)
            if name == MEDIANS or name.endswith(".stats"):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)
            else:
                assert torch.equal(
                    ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8)
                )
        assert read_thresholds(threshold, unit) == read_thresholds(others, unit)


def test_weights_that_are_not_finite_are_named_on_the_device(
    pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    pair = pairs("qwen3_moe").copy(tmp_path / "pair")
    tensors = load_tensors(pair.donor)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[name][1, 1] = float("nan")
    save_tensors(pair.donor, tensors)
    session = Session(pair.recipe(f"run.device={CUDA}"), Store(tmp_path / "store"))
    session.store.prepare()
    ctx = open_context(session)
    with pytest.raises(CheckpointError, match=f"{name} in .*donor"):
        DELTA.build(ctx, keys_of(ctx))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("place", ["on the device", "offloaded", "on the host"])
@pytest.mark.parametrize("resident", [True, False])
def test_two_gpus_give_the_gradients_of_one(
    place: str,
    resident: bool,
    pairs: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever hidden states wait; and the same bits from run to run."""
    checkpoint = Checkpoint.open(pairs("qwen3_moe").base)
    monkeypatch.setitem(TOKENS, "resident" if resident else "streamed", 64)

    def keeper(device: torch.device, *args: Any, **kwargs: Any) -> Keeper:
        return {
            "on the device": Keeper(device),
            "offloaded": Keeper(device, offload=True),
            "on the host": HostKeeper(device),
        }[place]

    monkeypatch.setattr(passage, "keeper_for", keeper)

    def gradients(name: str, *devices: str) -> dict[Any, Any]:
        first, *others = map(torch.device, devices)
        stream = LayerStream(
            checkpoint, device=first, compute=torch.float32, resident=resident, others=others
        )
        numbers = torch.Generator().manual_seed(3)
        items = [
            Item(torch.randint(300, (n,), generator=numbers), 4, 0.1) for n in range(10, 60, 5)
        ]
        found: dict[Any, Any] = {}

        def visit(layer: int | None, by_set: Any) -> None:
            found.update({(layer, n): g.cpu() for n, g in by_set["both"].items()})

        GradientWalk(stream, {"both": items}, States(tmp_path / name)).run(
            visit, set(), lambda step: None
        )
        return found

    one = gradients("one", "cuda:0")
    two, again = (gradients(name, "cuda:0", "cuda:1") for name in ("two", "again"))
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-3, atol=1e-6)
    assert all(torch.allclose(two[key], again[key], rtol=1e-5, atol=1e-8) for key in two)
