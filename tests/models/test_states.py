"""States on disk between layers are there whole or not at all."""

from pathlib import Path

import pytest
import torch

from crane_tasks.models.states import States


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_come_back_bit_for_bit_and_in_order(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    saved = [torch.randn(1, n, 3, generator=generator).to(dtype) for n in range(1, 13)]
    States(tmp_path).save("hidden.3", saved)
    found = States(tmp_path).load("hidden.3")
    assert len(found) == len(saved)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(found, saved, strict=True))


def test_a_half_written_list_is_not_there(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save("hidden.0", [torch.zeros(2)])
    whole = (tmp_path / "hidden.0.safetensors").read_bytes()
    states.drop("hidden.0")
    (tmp_path / "hidden.0.part").write_bytes(whole[:-3])
    assert not states.has("hidden.0")
    states.save("hidden.0", [torch.ones(2)])
    assert states.has("hidden.0")
    assert torch.equal(states.load("hidden.0")[0], torch.ones(2))
    assert not list(tmp_path.glob("*.part"))


def test_dropping_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    States(tmp_path / "new").drop("hidden.9")
    assert not States(tmp_path / "new").has("hidden.9")


def test_names_that_share_a_beginning_are_kept_apart(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save("hidden.1", [torch.zeros(1)])
    assert states.has("hidden.1") and not states.has("hidden.10") and not states.has("hidden")
