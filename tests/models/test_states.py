"""States between layers: in memory up to a budget, on disk whole or not at all."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crane_tasks.models.walk.states import States


def random_list(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, 3, generator=generator).to(dtype) for n in range(1, 13)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_later_process_finds_every_bit_in_order(tmp_path: Path, dtype: torch.dtype) -> None:
    states, saved = States(tmp_path), random_list(0, dtype)
    states.save("hidden.3", saved)
    states.flush()
    later = States(tmp_path)
    assert later.has("hidden.3")
    assert_same(later.load("hidden.3"), saved)


def test_above_the_budget_lists_come_back_from_disk(tmp_path: Path) -> None:
    saved = {f"hidden.{i}": random_list(i) for i in range(6)}
    one = sum(t.nbytes for t in saved["hidden.0"])
    states = States(tmp_path, budget=2 * one)
    for name, tensors in saved.items():
        states.save(name, tensors)
        held = sum(t.nbytes for kept in states._memory.values() for t in kept)
        assert held <= 2 * one
    states.ask("hidden.1")
    for name, tensors in saved.items():
        assert states.has(name)
        assert_same(states.load(name), tensors)


def test_a_half_written_list_is_not_there(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save("hidden.0", [torch.zeros(2)])
    states.flush()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.unlink()
    (tmp_path / "hidden.0.part").write_bytes(whole[:-3])
    again = States(tmp_path)
    assert not again.has("hidden.0")
    again.save("hidden.0", [torch.ones(2)])
    again.flush()
    assert torch.equal(States(tmp_path).load("hidden.0")[0], torch.ones(2))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_list_torn_by_a_power_cut_is_not_there(tmp_path: Path, damage: str) -> None:
    # A file system may keep the rename and lose the data.
    states = States(tmp_path)
    states.save("grad.2", random_list(1))
    states.flush()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + (b"" if damage == "cut" else bytes(8)))
    assert not States(tmp_path).has("grad.2")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_of_the_walk(tmp_path: Path) -> None:
    states = States(tmp_path / "gone")
    (tmp_path / "gone").rmdir()  # stands for a disk that takes nothing
    states.save("hidden.0", [torch.zeros(2)])
    with pytest.raises(OSError, match=r"hidden\.0"):
        states.flush()


def test_what_is_dropped_is_gone_from_memory_and_disk(tmp_path: Path) -> None:
    states = States(tmp_path / "new")
    states.drop("hidden.9")
    states.save("hidden.9", [torch.ones(1)])
    states.drop("hidden.9")
    states.flush()
    assert not states.has("hidden.9")
    assert not States(tmp_path / "new").has("hidden.9")


def test_names_that_share_a_beginning_are_kept_apart(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save("hidden.1", [torch.zeros(1)])
    states.flush()
    later = States(tmp_path)
    assert later.has("hidden.1") and not later.has("hidden.10") and not later.has("hidden")


def test_a_dropped_list_goes_only_when_its_successor_is_on_disk(tmp_path: Path) -> None:
    """However far the disk is behind, what it holds belongs together."""
    states = States(tmp_path)
    states.save("hidden.4", random_list(4))
    states.save("grad.5", random_list(5))
    states.flush()
    blocked = threading.Event()
    states._disk.submit(blocked.wait)  # stands for a slow disk
    states.save("grad.4", random_list(6))
    states.drop("grad.5")
    states.drop("hidden.4")
    states.save("grad.3", random_list(7))
    states.drop("grad.4")  # before it was written
    later = States(tmp_path)
    assert later.has("grad.5") and later.has("hidden.4")
    blocked.set()
    states.flush()
    assert [file.name.rsplit(".", 2)[0] for file in tmp_path.iterdir()] == ["grad.3"]


def test_a_write_that_failed_removes_nothing(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save("grad.5", random_list(5))
    states.flush()
    (tmp_path / "grad.4.part").mkdir()  # stands for a disk that takes nothing
    with pytest.raises(OSError, match=r"grad\.4"):
        states.save("grad.4", random_list(4))
        states.drop("grad.5")
        states.flush()
    assert States(tmp_path).has("grad.5")
